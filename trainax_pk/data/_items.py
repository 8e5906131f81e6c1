"""Data of any kind as what a trainer takes its batches from."""

import os
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from trainax_pk._batch import is_batch
from trainax_pk.data._cache import CachedDataset
from trainax_pk.data._samples import Samples
from trainax_pk.data._simulation import SimulationDataset
from trainax_pk.data._simulation_windows import SimulatedWindows
from trainax_pk.data._stored_windows import StoredWindows
from trainax_pk.data._trajectories import Trajectories, as_trajectories
from trainax_pk.data._windows import Windows


def as_items(
    data: Samples | Trajectories | SimulationDataset | CachedDataset | PyTree[Any],
    num_rollout_steps: Any,
    *,
    stride: int = 1,
    only_initial: bool = False,
    residency: str = "auto",
) -> Samples | Windows | SimulatedWindows | StoredWindows:
    """What a trainer takes its batches from: samples as they are, else windows.

    Args:
        data: `Samples`, a `Batch1D` or `Batch2D` of all data, `Trajectories`, leaves
            `(num_samples, num_times, ...)`, or a dataset of simulations, stored or on
            the fly.
        num_rollout_steps: `trajectories -> steps of a window`, for trajectories.
        stride: Distance between the first times of windows.
        only_initial: As for `Windows`.
        residency: As for `Windows`; "disk" streams a `CachedDataset`, and so does "auto"
            where it exceeds its `memory_budget`, or without one half of the machine's
            memory.

    Returns:
        Samples or windows.

    Raises:
        ValueError: As `Samples` and `Windows`; `Pairs` or `Fields` without `Samples`; a
            stride for samples, which have no windows; "disk" for data in memory.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import as_items
        >>> len(as_items(jnp.ones((4, 11, 3)), lambda trajectories: 2))
        36
    """
    if isinstance(data, SimulationDataset) and data.on_the_fly:
        return data.windows(num_rollout_steps, stride=stride)
    if isinstance(data, CachedDataset) and _is_streamed(data, residency):
        return StoredWindows(
            data, num_rollout_steps, stride=stride, only_initial=only_initial
        )
    if residency == "disk":
        raise ValueError(
            f"Expected a CachedDataset to stream from disk, got {type(data).__name__}. "
            "Store it with tx.data.CachedDataset, or pass another residency."
        )
    if isinstance(data, SimulationDataset | CachedDataset):
        pairs = data.num_times is None
        data = (
            Samples(data.finite_rows(), residency=residency)
            if pairs
            else data.trajectories()
        )
    if getattr(type(data), "rows_are_samples", False):
        raise ValueError(
            f"Expected Samples for rows that are trained on whole, got "
            f"{type(data).__name__}. Pass tx.data.Samples(data)."
        )
    if not (isinstance(data, Samples) or is_batch(data)):
        trajectories = as_trajectories(data)
        return Windows(
            trajectories,
            num_rollout_steps(trajectories),
            stride=stride,
            only_initial=only_initial,
            residency=residency,
        )
    if stride != 1:
        raise ValueError(
            f"Expected window_stride=1 for samples, which are trained on whole, got "
            f"{stride}. Cut windows out of trajectories instead."
        )
    return data if isinstance(data, Samples) else Samples(data, residency=residency)


def _is_streamed(cached: CachedDataset, residency: str) -> bool:
    if residency != "auto":
        return residency == "disk"
    limit = cached.memory_budget or _memory() // 2
    # Read from disk and moved to a device: twice for a moment.
    return 2 * cached.nbytes > limit


def _memory() -> int:
    """Bytes of this machine's memory, or of what a container may take of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole
