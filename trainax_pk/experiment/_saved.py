"""What members of a sweep leave on disk: arrays, whole or not there, and metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from trainax_pk._extras import load
from trainax_pk._files import LocalFiles
from trainax_pk.checkpoint._log import MetricLog

_NOTE = "note"


class Saved(NamedTuple):
    """What was read.

    Attributes:
        arrays: By their place.
        note: What was written beside them.
    """

    arrays: dict[str, np.ndarray]
    note: str

    def like(self, place: str, tree: PyTree[Any]) -> PyTree[Any]:
        """The part at a place, in a tree of its structure."""
        arrays, static = eqx.partition(tree, _is_array)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(arrays)
        found = [
            _as_like(self.arrays[place + jax.tree_util.keystr(inner)], x)
            for inner, x in leaves
        ]
        return eqx.combine(treedef.unflatten(found), static)


def save_arrays(path: Path, tree: PyTree[Any], note: str) -> None:
    """Writes all arrays of a tree, keys among them."""
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, _is_array))[0]
    named = {jax.tree_util.keystr(place): _plain(x) for place, x in leaves}
    content = load("safetensors.numpy").save(named, {_NOTE: note})
    LocalFiles(path.parent).write(path.name, content)


def read_arrays(path: Path) -> Saved | None:
    """What `save_arrays` wrote, None where nothing is."""
    if not path.is_file():
        return None
    with load("safetensors").safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Saved(arrays, file.metadata()[_NOTE])


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _plain(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.ascontiguousarray(x)


def _as_like(found: np.ndarray, x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(x))
    return jnp.asarray(found) if isinstance(x, jax.Array) else found


def write_metrics(
    folder: Path,
    every: int,
    series: dict[str, np.ndarray],
    records: Sequence[tuple[int, dict[str, Any]]],
    i: int,
) -> None:
    """Leaves the metric log that a run of its own would have left.

    Args:
        folder: Of the run.
        every: Updates per line.
        series: Loss and gradient norm, each `(num_updates,)`.
        records: What callbacks said of all members, by update.
        i: The row of the member.
    """
    log = MetricLog(folder / "metrics.jsonl", every)
    log.resume(0, {})
    done = 0
    for step, values in records:
        if step > done:
            log.add_updates({k: x[done:step] for k, x in series.items()})
        done = step
        for name, value in values.items():
            log.add_record(step, name, jax.tree.map(lambda x: x[i], value))
    if done < len(series["loss"]):
        log.add_updates({k: x[done:] for k, x in series.items()})
    log.flush()
    log.settle()
