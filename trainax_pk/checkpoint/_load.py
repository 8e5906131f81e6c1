"""Weights of a run, for use and for other runs to start from."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._tree import check_count
from trainax_pk.checkpoint._arrays import compare_leaves, name_leaves, restore_leaf
from trainax_pk.checkpoint._folder import check_path
from trainax_pk.checkpoint._store import Checkpoint, Store

Weights = Literal["current", "ema"]


@dataclasses.dataclass(frozen=True)
class Match:
    """What of a run went into a model.

    Attributes:
        step: Number of updates that the run had done.
        matched: Paths of the leaves that were taken over.
        missing: Leaves of the model that stay as they were, each with the reason.
        unused: Paths of the leaves of the run that have no place in the model.
    """

    step: int
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_model(
    run_dir: str | os.PathLike[str],
    model: PyTree[Any],
    *,
    weights: Weights = "current",
    average: int = 1,
    step: int | None = None,
    partial: bool = False,
) -> tuple[PyTree[Any], Match]:
    """The model of a run, from its newest valid checkpoint.

    It only reads: nothing is moved or removed, and the run may be under way.

    Args:
        run_dir: The run.
        model: One of the same structure, such as it was before training; its static
            parts are kept. With `partial`, one that shares leaves with it.
        weights: "current", or "ema" for the moving average where it trains.
        average: Which of several moving averages, counted from 1.
        step: Of which checkpoint; None for the newest.
        partial: Take over what fits in path, shape and dtype, and leave the rest.

    Returns:
        The model, and what matched.

    Raises:
        FileNotFoundError: No checkpoint, or none of that step.
        CheckpointDamaged: None is valid, or that of `step` is not.
        ValueError: Leaves that do not fit, without `partial`; no moving average; an
            average or a step that is no such number; no path.

    Example:
        >>> import tempfile
        >>> import equinox as eqx
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> model = eqx.nn.Linear(3, 3, key=jax.random.key(0))
        >>> trainer = tx.trainer.SupervisedTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(1)),
        ...     optimizer=optax.sgd(1e-3), num_training_steps=5, batch_size=4,
        ...     progress=False,
        ... )
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     trained, _ = trainer(model, key=jax.random.key(2), run_dir=run_dir)
        ...     loaded, match = tx.checkpoint.load_model(run_dir, model)
        >>> bool((loaded.weight == trained.weight).all()), match.matched
        (True, ('.weight', '.bias'))
    """
    if weights not in ("current", "ema"):
        raise ValueError(
            f"Expected `weights` to be 'current' or 'ema', got {weights!r}. Choose one "
            "of them."
        )
    average = check_count("average", average)
    found = find(check_path("run_dir", run_dir), step)
    averaged = "state.ema" if average == 1 else f"state.more_ema[{average - 2}]"
    trained = "state.params" if weights == "current" else averaged
    if not any(path.startswith(trained) for path in found.leaves):
        raise no_average(run_dir, average)
    places = {
        path.removeprefix(prefix): path
        for prefix in (trained, "state.buffers")
        for path in found.leaves
        if path.startswith(prefix)
    }
    arrays, static = eqx.partition(model, eqx.is_array)
    stored = {short: found.leaves[path] for short, path in places.items()}
    differences = compare_leaves(stored, arrays, "")
    if differences and not partial:
        lines = "\n  ".join(f"{path}: {why}" for path, why in differences.items())
        raise ValueError(
            f"Expected a model like the run's, got differences:\n  {lines}\nBuild it as "
            "it was, or pass partial=True."
        )
    asked = name_leaves(arrays, "")
    matched = [path for path in asked if path not in differences]
    taken = {path: found.arrays[places[path]] for path in matched}
    match = Match(
        found.step,
        tuple(matched),
        tuple(f"{path}: {differences[path]}" for path in asked if path in differences),
        tuple(path for path in stored if path not in taken),
    )
    return _take_over(taken, arrays, static), match


def no_average(run_dir: Any, number: int = 1) -> ValueError:
    """What to say of a run that keeps no moving average of this number."""
    which = "a moving average" if number == 1 else f"{number} moving averages"
    return ValueError(
        f"Expected a run with {which} in {run_dir}, got none or fewer. Train with "
        "ema_decay=, or load the current weights."
    )


def find(run_dir: Path, step: int | None) -> Checkpoint:
    """A checkpoint of a run, or its newest; nothing is moved."""
    if step is not None:
        step = check_count("step", step, minimum=0)
    store = Store(run_dir / "checkpoints")
    steps = store.steps()
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"Expected a checkpoint in {store.folder}, got "
            f"{f'those of the steps {steps}' if steps else 'none'}. Name a run that was "
            "saved."
        )
    found = store.newest(move=False) if step is None else store.read(step)
    assert found is not None
    return found


def _take_over(
    taken: dict[str, np.ndarray], arrays: PyTree[Any], static: PyTree[Any]
) -> PyTree[Any]:
    paths, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    leaves = []
    for key_path, like in paths:
        path = jax.tree_util.keystr(key_path)
        leaves.append(restore_leaf(taken[path], like) if path in taken else like)
    return eqx.combine(treedef.unflatten(leaves), static)
