"""Arguments of simulated datasets: checked, and turned into plans."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._tree import check_count
from trainax_pk.data._forward import (
    Observed,
    Parametric,
    is_forward_model,
    split_observers,
)
from trainax_pk.data._prior import check_prior
from trainax_pk.data._simulation_program import Recipe, check_steps
from trainax_pk.data._simulation_run import Simulated

# Distinct samples of a fresh stream: what an int32 index can name.
_NUM_FRESH = 2**31 - 1
# What one block of samples may hold. Neither the memory budget nor the chunk size may
# change it, since the last bits of a vmapped program depend on its width.
_BLOCK_BYTES = 2**25
_MAX_BLOCK = 4096


def as_rows(indices: Any, length: int) -> np.ndarray:
    """Row numbers of an index, a slice or an array, checked; int64."""
    if isinstance(indices, slice):
        return np.arange(*indices.indices(length), dtype=np.int64)
    array = np.atleast_1d(np.asarray(indices))
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            "Expected an integer, a slice or a 1D array of integers as index, got "
            f"{array.dtype}{list(array.shape)}. Use np.flatnonzero for a mask."
        )
    array = array.astype(np.int64)
    outside = (array < -length) | (array >= length)
    if outside.any():
        raise IndexError(
            f"Expected indices in [{-length}, {length}), got {array[outside][0]}. Pass "
            "an index below len(dataset)."
        )
    return np.where(array < 0, array + length, array)


def make_recipe(
    forward_model: Any,
    prior: Any,
    num_steps: int | None,
    stride: int,
    num_warmup_steps: int,
    observation: Any,
    on_failure: str,
    divergence_limit: float | None,
    max_attempts: int,
) -> Recipe:
    """What determines the samples; every number is checked."""
    base = split_observers(forward_model)[0]
    if not (is_forward_model(base) or callable(base) or isinstance(base, Parametric)):
        raise ValueError(
            f"Expected a forward model, got {forward_model!r}. Pass an object with "
            "step(state, dt) and dt, or a callable params -> output."
        )
    if on_failure not in ("raise", "mask", "keep", "resample"):
        raise ValueError(
            "Expected `on_failure` to be 'raise', 'mask', 'keep' or 'resample', got "
            f"{on_failure!r}. Choose one of them."
        )
    check_count("stride", stride)
    check_count("num_warmup_steps", num_warmup_steps, minimum=0)
    if num_steps is not None and check_count("num_steps", num_steps) % stride:
        raise ValueError(
            f"Expected `stride` to divide `num_steps`, got {stride} and {num_steps}. "
            f"Pass num_steps={num_steps // stride * stride or stride}."
        )
    if num_steps is None and stride != 1:
        raise ValueError(
            f"Expected stride=1 without `num_steps`, got {stride}. Pass num_steps for "
            "trajectories."
        )
    if divergence_limit is not None and not divergence_limit > 0:
        raise ValueError(
            f"Expected `divergence_limit` > 0 or None, got {divergence_limit!r}."
        )
    check_count("max_attempts", max_attempts)
    check_steps(base, num_steps, num_warmup_steps)
    forward = forward_model
    if observation is not None:
        forward = Observed(forward_model, observation)
    return Recipe(
        forward=forward,
        prior=check_prior(prior),
        num_steps=num_steps,
        stride=stride,
        num_warmup_steps=num_warmup_steps,
        limit=None if divergence_limit is None else float(divergence_limit),
        max_attempts=max_attempts if on_failure == "resample" else 1,
        blank=on_failure == "mask",
    )


def check_num_samples(num_samples: int | None, *, on_the_fly: bool) -> int:
    """Number of samples, that of indices for an endless stream."""
    if not on_the_fly:
        count = check_count("num_samples", num_samples)
        if count > _NUM_FRESH:
            raise ValueError(
                f"Expected `num_samples` <= {_NUM_FRESH}, got {count}. Indices are "
                "int32: make several datasets with different seeds."
            )
        return count
    if num_samples is not None:
        raise ValueError(
            f"Expected num_samples=None with on_the_fly=True, got {num_samples}. The "
            "stream is endless; leave num_samples out."
        )
    return _NUM_FRESH


def row_bytes(spec: PyTree[Any]) -> int:
    """Bytes of one sample."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(spec))


def plan_block(block_size: int | None, nbytes: int, num_samples: int) -> int:
    """Width of the compiled block."""
    if block_size is not None:
        return check_count("block_size", block_size)
    fitting = max(1, min(_BLOCK_BYTES // max(nbytes, 1), _MAX_BLOCK))
    needed = 1 << (num_samples - 1).bit_length()
    return min(1 << (fitting.bit_length() - 1), needed)


def plan_chunk(
    chunk_size: int | None, nbytes: int, memory_budget: int, block_size: int
) -> int:
    """Samples of a chunk that keeps within the budget."""
    check_count("memory_budget", memory_budget)
    # Blocks under way, the chunk they are copied to, and the copy that a reader makes.
    block_bytes = 3 * block_size * nbytes
    if block_bytes > memory_budget:
        raise ValueError(
            f"Expected a memory budget of at least {block_bytes} bytes, three times one "
            f"block of {block_size} samples, got {memory_budget}. Pass a smaller "
            "block_size, or a larger memory_budget."
        )
    if chunk_size is not None:
        return check_count("chunk_size", chunk_size)
    return block_size * (memory_budget // block_bytes)


def check_failures(
    simulated: Simulated, rows: np.ndarray, on_failure: str, length: int
) -> None:
    """Raises what the policy does not let pass, of a dataset of some length."""
    failed = simulated.failed
    if not failed.any():
        return
    share = f"{int(failed.sum())} of {len(rows)} samples"
    first = rows[failed][:8].tolist()
    if on_failure in ("raise", "resample"):
        tried = (
            f" after {int(simulated.attempts.max())} draws each"
            if on_failure == "resample"
            else ""
        )
        raise FloatingPointError(
            f"Expected finite simulations, got {share} that failed{tried}, first at the "
            f"indices {first}. Narrow the prior, use a smaller time step, or pass "
            "on_failure='mask'."
        )
    # Some may all fail by chance, which is what these policies are for: what is made
    # must not depend on how it is cut. A cache asks all of its parts.
    whole = len(rows) >= length and len(np.unique(rows)) == length
    if failed.all() and whole and on_failure != "keep":
        raise FloatingPointError(
            f"Expected some finite simulations, got {share} that failed. The forward "
            "model diverges everywhere: check its time step and the prior's scale, or "
            "pass on_failure='keep' to look at the output."
        )


def check_unmasked(on_failure: str | None, num_failed: int, length: int) -> None:
    """Refuses to train on what failed and was masked, wherever the data are.

    Raises:
        ValueError: Rows that are NaN throughout.
    """
    if on_failure == "mask" and num_failed:
        raise ValueError(
            f"Expected finite data to train on, got {num_failed} of {length} samples "
            "that failed and were masked with NaN. Pass on_failure='resample' to the "
            "SimulationDataset, or select the rows that are finite and train on these."
        )


def is_endless(source: Any) -> bool:
    """Whether a dataset has no last sample, so that it cannot be stored."""
    return bool(getattr(source, "on_the_fly", False))
