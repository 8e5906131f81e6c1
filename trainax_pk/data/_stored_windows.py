"""Windows and samples of a dataset that stays on disk."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from trainax_pk._types import Window
from trainax_pk.data._cache_gather import PieceCache, gather
from trainax_pk.data._cache_manifest import Leaf
from trainax_pk.data._hash import hash_content
from trainax_pk.data._samples import Samples
from trainax_pk.data._trajectories import Trajectories
from trainax_pk.data._windows import Windows

_DEFAULT_BUDGET = 2**29
# Shares of the memory budget: decoded pieces that are kept; the batches of a group, of
# which three are alive at a time; the batches of a chunk, of which there are four,
# those on a device that shares the host's memory included.
_PIECES, _GROUP, _CHUNK = 8, 12, 32


class StoredWindows:
    """Windows of a cache's trajectories, or its samples, read when they are gathered.

    It stands where `Windows` of host residency do, and gathers the same batches bit by
    bit. An engine reads many batches ahead by a thread of its own: each piece of the
    store (64 KiB, some times of some trajectories) that they touch is read and decoded
    once for all of them. So a full shuffle costs little more than reading in order
    where many windows lie in a piece, and where few do, little is read in vain.

    Memory is bounded by the `memory_budget` of the cache (512 MiB if it has none),
    whatever the data's size. Nothing is searched for NaN, but a simulation whose
    failures were masked is refused, as it is in memory: the cache has counted them.

    Attributes:
        residency: "disk".
        memory_budget: Bytes that reading ahead may hold.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> decay = tx.data.StepperModel(lambda u: 0.9 * u, dt=1.0)
        >>> source = tx.data.SimulationDataset(
        ...     decay, tx.data.Normal(jnp.zeros(2), 1.0), 10, num_steps=6
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     windows = tx.data.StoredWindows(
        ...         tx.data.CachedDataset(source, folder), lambda trajectories: 2
        ...     )
        ...     batch = windows.gather_host([49, 0])
        >>> len(windows), batch.state.shape
        (50, (2, 3, 2))
    """

    residency = "disk"

    def __init__(
        self,
        cached: Any,
        num_rollout_steps: Callable[[Trajectories], int],
        *,
        stride: int = 1,
        only_initial: bool = False,
    ) -> None:
        """Checks shapes; opens no file, unless the source masks failures.

        Args:
            cached: A `CachedDataset`.
            num_rollout_steps: `trajectories -> steps of a window`; not asked where the
                source holds no trajectories.
            stride: As for `Windows`.
            only_initial: As for `Windows`.

        Raises:
            ValueError: As `Windows` and `Samples`; a stride for samples; masked
                failures.
        """
        self.memory_budget = cached.memory_budget or _DEFAULT_BUDGET
        self._cached = cached
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._pieces: PieceCache | None = None
        # Arrays of the right shapes that take no memory: checks and index arithmetic
        # are those of data in memory.
        like = jax.tree.map(lambda x: _virtual(len(cached), x), cached.element_spec)
        leaves = cached.leaves
        if cached.num_times is None:
            if stride != 1:
                raise ValueError(
                    "Expected window_stride=1 for samples, which are trained on whole, "
                    f"got {stride}. Cut windows out of trajectories instead."
                )
            self._items: Windows | Samples = Samples(like, residency="host")
            self._leaves: PyTree[Leaf] = leaves
        else:
            params, output = like
            sample = params if cached.is_parametric else None
            trajectories = Trajectories(output, sample=sample, check_finite=False)
            self._items = Windows(
                trajectories,
                num_rollout_steps(trajectories),
                stride=stride,
                only_initial=only_initial,
                residency="host",
            )
            self._leaves = (leaves[1], leaves[0] if cached.is_parametric else None)
        cached.check_finite()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, indices: Any) -> PyTree[Any]:
        """Windows or samples of a slice or an integer array, with a batch axis."""
        return self.gather_host(np.atleast_1d(np.arange(len(self))[indices]))

    @property
    def item_bytes(self) -> int:
        """Bytes of one window's states, or of one sample."""
        return self._items.item_bytes

    def content_hash(self) -> str:
        """That of the source, and of how windows are laid over it."""
        layout = self._items.layout
        return hash_content(self._cached.content_hash(), layout, versions=False)

    def chunk_size(self, batch_size: int) -> int:
        """Updates whose batches one program may hold.

        Raises:
            ValueError: A budget that is too small for one batch.
        """
        batch_bytes = batch_size * self.item_bytes
        if _CHUNK * batch_bytes > self.memory_budget:
            raise ValueError(
                f"Expected a memory budget of at least {_CHUNK} batches of "
                f"{batch_bytes} bytes, got {self.memory_budget}. Pass a larger "
                "memory_budget to the CachedDataset, or a smaller batch_size."
            )
        return self.memory_budget // (_CHUNK * batch_bytes)

    def group_size(self, batch_size: int) -> int:
        """Updates whose batches are read together."""
        # A few numbers say where each time of a window lies.
        item_bytes = self.item_bytes + 48 * getattr(self._items.layout, "length", 1)
        return max(1, self.memory_budget // (_GROUP * batch_size * item_bytes))

    def gather_host(self, indices: Int[np.ndarray, " B"]) -> PyTree[np.ndarray]:
        """A batch of NumPy arrays, bitwise the one that data in memory would give.

        Args:
            indices: `(B,)`, within [0, len(self)); concrete, any order.

        Returns:
            Leaves `(B, ...)`. The first call makes the cache if it is not there.

        Raises:
            CacheDamaged: A piece that is not what was written.
        """
        store = self._cached.open()
        if self._pieces is None or self._pieces.store is not store:
            self._pieces = PieceCache(store, self.memory_budget // _PIECES)
        rows, layout = np.asarray(indices), self._items.layout
        if isinstance(self._items, Samples):
            return self._read(self._leaves, rows, None)
        rows, first = layout.locate(rows)
        length = 1 if layout.only_initial else layout.length
        times = first[:, None] + np.arange(length)
        states, params = self._leaves
        return Window(self._read(states, rows, times), self._read(params, rows, None))

    def _read(
        self, leaves: PyTree[Leaf], rows: np.ndarray, times: np.ndarray | None
    ) -> PyTree[np.ndarray]:
        def read(leaf: Leaf) -> np.ndarray:
            found = gather(self._pieces, leaf, rows, times, self._pool)
            dtype = jax.dtypes.canonicalize_dtype(found.dtype)
            return found.astype(dtype, copy=False)

        return jax.tree.map(read, leaves, is_leaf=lambda x: isinstance(x, Leaf))


def _virtual(count: int, spec: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), spec.dtype), (count, *spec.shape))
