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
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    key: str | None
    digest: str

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
        leaf = Leaf(path, name, host.shape, host.dtype.name, key, digest(host))
        leaves.append((leaf, host))
    return leaves


def digest(x: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(
        np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    ).hexdigest()


def write_arrays(folder: Path, leaves: Iterable[tuple[Leaf, np.ndarray]]) -> None:
    """Writes arrays into a folder that does not exist yet.

    A checkpointer serves one save: one that has failed to write fails again without
    trying.
    """
    ocp = load(ORBAX)
    tree = {leaf.name: _plain(x) for leaf, x in leaves if leaf.is_stored}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


def read_arrays(folder: Path, leaves: Iterable[Leaf]) -> dict[str, np.ndarray]:
    """Arrays by path, as they were given to `write_arrays`."""
    ocp = load(ORBAX)
    leaves = list(leaves)
    names = [leaf.name for leaf in leaves if leaf.is_stored]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
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
        if leaf.is_stored:
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
    if is_key(like):
        return jax.random.wrap_key_data(jnp.array(x), impl=jax.random.key_impl(like))
    if not isinstance(like, jax.Array):
        return x
    # On one device unless the template says otherwise: a program is compiled for where
    # its arguments have to be.
    return jax.device_put(x, like.sharding) if like.committed else jnp.array(x)


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


def _plain(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x).reshape(x.shape)
    if x.dtype.kind in _PLAIN:
        return x
    return x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))


def _free_name(path: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_]+", ".", path).strip(".") or "array"
    name, i = base, 2
    while name in taken:
        name, i = f"{base}.{i}", i + 1
    return name
