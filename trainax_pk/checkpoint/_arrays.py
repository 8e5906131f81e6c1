"""Named arrays in a folder: orbax writes them, digests say what they were."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from trainax_pk._extras import load

ORBAX = "orbax.checkpoint"
SAFETENSORS = "safetensors.numpy"
_AVERAGE = re.compile(r"^state\.(?:ema(?=\W)|more_ema\[(\d+)\])")
# What every version of the stored format knows; other types travel as integers.
_PLAIN = "biufc"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of a stored array without reading it.

    Attributes:
        path: Where it stands in the tree, such as "state.params.weight".
        name: What it is stored under.
        shape: Shape.
        dtype: Name of its dtype.
        key: Name of the random number implementation, for keys.
        digest: SHA-256 of its bytes.
        file: The file of its own that it shares with others of its kind, or None.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    key: str | None
    digest: str
    file: str | None = None

    @property
    def is_stored(self) -> bool:
        """Whether there is anything to store."""
        return math.prod(self.shape) > 0

    def describe(self) -> str:
        """Type and shape, for messages."""
        return f"{self.key or self.dtype}{list(self.shape)}"


def name_leaves(tree: PyTree[Any], prefix: str) -> dict[str, Any]:
    """The arrays of a tree by their paths, which begin with `prefix`."""
    return {
        prefix + jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_host(x: Any) -> tuple[np.ndarray, str | None]:
    """An array in host memory, and for a key its implementation."""
    if is_key(x):
        return np.asarray(jax.random.key_data(x)), str(jax.random.key_impl(x))
    return np.asarray(x), None


def is_key(x: Any) -> bool:
    """Whether an array is a typed random key."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def make_leaves(arrays: Mapping[str, Any]) -> list[tuple[Leaf, np.ndarray]]:
    """What is known of arrays, and the arrays in host memory, in order."""
    names: set[str] = set()
    leaves = []
    for path, x in arrays.items():
        host, key = to_host(x)
        name = _free_name(path, names)
        names.add(name)
        facts = (path, name, host.shape, host.dtype.name, key, digest(host))
        leaves.append((Leaf(*facts, _file_of(path, host)), host))
    return leaves


def digest(x: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(
        np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    ).hexdigest()


def write_arrays(folder: Path, leaves: Iterable[tuple[Leaf, np.ndarray]]) -> None:
    """Writes arrays into a folder that does not exist yet.

    Moving averages go into files of their own beside it, for those who want nothing
    else. A checkpointer serves one save: one that has failed to write fails again without
    trying.
    """
    ocp = load(ORBAX)
    stored = [(leaf, x) for leaf, x in leaves if leaf.is_stored]
    tree = {leaf.name: _plain(x) for leaf, x in stored if leaf.file is None}
    for file in sorted({leaf.file for leaf, _ in stored if leaf.file is not None}):
        own = {_short(leaf.path): x for leaf, x in stored if leaf.file == file}
        # NumPy makes one axis of none.
        own = {k: np.ascontiguousarray(x).reshape(x.shape) for k, x in own.items()}
        load(SAFETENSORS).save_file(own, folder.with_name(file))
    with _checkpointer(ocp) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


def read_arrays(folder: Path, leaves: Iterable[Leaf]) -> dict[str, np.ndarray]:
    """Arrays by path, as they were given to `write_arrays`."""
    ocp = load(ORBAX)
    leaves = list(leaves)
    files = {leaf.file for leaf in leaves if leaf.file is not None}
    own = {f: load(SAFETENSORS).load_file(folder.with_name(f)) for f in files}
    names = [leaf.name for leaf in leaves if leaf.is_stored and leaf.file is None]
    with _checkpointer(ocp) as checkpointer:
        stored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                restore_args={
                    n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names
                }
            ),
        )
    arrays = {}
    for leaf in leaves:
        x = np.zeros(leaf.shape, leaf.dtype)
        if leaf.file is not None:
            x = own[leaf.file][_short(leaf.path)]
        elif leaf.is_stored:
            x = np.asarray(stored[leaf.name]).view(np.dtype(leaf.dtype))
        arrays[leaf.path] = x
    return arrays


def fill(
    template: PyTree[Any], arrays: Mapping[str, np.ndarray], prefix: str
) -> PyTree[Any]:
    """A tree like the template, with arrays in the place of its leaves."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    leaves = [
        restore_leaf(arrays[prefix + jax.tree_util.keystr(path)], like)
        for path, like in paths
    ]
    return treedef.unflatten(leaves)


def restore_leaf(x: np.ndarray, like: Any) -> Any:
    """An array where and as `like` is."""
    if not isinstance(like, jax.Array):
        return x
    # On one device unless the template says otherwise: a program is compiled for where
    # its arguments have to be.
    array = put(x, like.sharding) if like.committed else jnp.array(x)
    if is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return array


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that is split or repeated over devices, those of other processes too.

    Args:
        x: The whole array, the same in every process.
        sharding: Where its parts go.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if is_key(x):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])


def compare_leaves(
    written: Mapping[str, Leaf], template: PyTree[Any], prefix: str
) -> dict[str, str]:
    """Where stored arrays do not fit a tree, and how, by path.

    Args:
        written: What is stored, by path.
        template: What is asked for.
        prefix: First part of the paths.
    """
    asked = name_leaves(template, prefix)
    differences = {}
    for path, x in asked.items():
        key = str(jax.random.key_impl(x)) if is_key(x) else None
        shape = jax.random.key_data(x).shape if key else x.shape
        wanted = f"{key or np.dtype(x.dtype).name}{list(shape)}"
        if path not in written:
            differences[path] = f"nothing was saved, now {wanted}"
        elif written[path].describe() != wanted:
            differences[path] = f"{written[path].describe()} was saved, now {wanted}"
    for path, leaf in written.items():
        if path.startswith(prefix) and path not in asked:
            differences[path] = f"{leaf.describe()} was saved, now nothing"
    return differences


def _checkpointer(ocp: Any) -> Any:
    """What saves and restores for this process alone, whatever others there are."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(here, {here})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _plain(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x).reshape(x.shape)
    if x.dtype.kind in _PLAIN:
        return x
    return x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))


def _file_of(path: str, x: np.ndarray) -> str | None:
    """Where the leaf of a moving average goes, if the format of these files knows it."""
    place = _AVERAGE.match(path)
    if place is None or x.dtype.kind not in "biuf" or not x.size:
        return None
    number = 1 if place[1] is None else int(place[1]) + 2
    return "ema.safetensors" if number == 1 else f"ema-{number}.safetensors"


def _short(path: str) -> str:
    """The place of a moving average's leaf in the model."""
    return _AVERAGE.sub("", path)


def _free_name(path: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_]+", ".", path).strip(".") or "array"
    name, i = base, 2
    while name in taken:
        name, i = f"{base}.{i}", i + 1
    return name
