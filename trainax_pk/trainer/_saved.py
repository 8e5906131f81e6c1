"""What a checkpoint holds of a training loop, and how it is taken up again."""

import importlib.metadata
import platform
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from trainax_pk.checkpoint._arrays import fill, name_leaves
from trainax_pk.checkpoint._identity import Identity, describe
from trainax_pk.checkpoint._store import Checkpoint
from trainax_pk.checkpoint._writer import Frozen
from trainax_pk.step import TrainState
from trainax_pk.trainer._history import HistoryBuilder, StoredRecord

_LIBRARIES = ("trainax_pk", "jax", "jaxlib", "equinox", "optax", "numpy")
# Where the data are kept changes no number.
_PLACE = "data.residency"
# Settings of JAX that change numbers.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


def identify(
    parts: dict[str, Any],
    data_fields: dict[str, str],
    model: PyTree[Any],
    key: PRNGKeyArray,
    may: dict[str, Any],
) -> Identity:
    """What a run is made of.

    Args:
        parts: What determines its numbers, by name: configuration, optimizer, options.
        data_fields: The data, described.
        model: Where it starts; its arrays are in the state.
        key: Its key.
        may: What may change on the way, by name.
    """
    static = eqx.filter(model, eqx.is_array, inverse=True)
    must = {**describe(static, "model"), **describe(key, "key")}
    for name, part in parts.items():
        must |= describe(part, name)
    for name in _SETTINGS:
        must |= describe(getattr(jax.config, name), name)
    must |= {n: x for n, x in data_fields.items() if n != _PLACE}
    free = {_PLACE: data_fields.get(_PLACE, "nothing"), **_surroundings()}
    for name, part in may.items():
        free |= describe(part, name)
    return Identity(must, free)


def freeze(
    state: TrainState, history: HistoryBuilder, done: int, facts: dict[str, Any]
) -> Frozen:
    """A checkpoint's content as it is now, gathered when the result is called.

    Args:
        state: State after `done` updates; its arrays are never written to.
        history: What was recorded. Callbacks at `done` itself run again.
        done: Number of updates done.
        facts: JSON values to add.
    """
    chunks, records = history.so_far(done)

    def gather() -> tuple[dict[str, Any], dict[str, Any]]:
        arrays = name_leaves(state, "state")
        for name in ("loss", "grad_norm"):
            arrays[f"history.{name}"] = np.concatenate(
                [np.asarray(chunk[name]) for chunk in chunks]
            )[:done]
        held = {}
        for name, record in records().items():
            held[name] = {"steps": list(record.steps), "paths": list(record.paths)}
            for i, leaf in enumerate(record.leaves):
                if leaf is not None:
                    arrays[f"records.{name}[{i}]"] = leaf
        return arrays, {**facts, "records": held}

    return gather


def fill_state(found: Checkpoint, state: TrainState) -> TrainState:
    """The state of a checkpoint, in the place of one like it."""
    return fill(state, found.arrays, "state")


def thaw(
    found: Checkpoint, history: HistoryBuilder
) -> tuple[dict[str, np.ndarray], dict[str, StoredRecord]]:
    """Fills the history with what a checkpoint holds, and returns it."""
    series = {n: found.arrays[f"history.{n}"] for n in ("loss", "grad_norm")}
    records = {}
    for name, held in found.meta["records"].items():
        paths = tuple(held["paths"])
        leaves = [found.arrays.get(f"records.{name}[{i}]") for i in range(len(paths))]
        records[name] = StoredRecord(tuple(held["steps"]), tuple(leaves), paths)
    history.restore(series, records)
    return series, records


def _surroundings() -> dict[str, str]:
    device = jax.devices()[0]
    versions = {f"versions.{name}": _version(name) for name in _LIBRARIES}
    return {
        **versions,
        "versions.python": platform.python_version(),
        "device": f"{jax.default_backend()} {device.device_kind}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
