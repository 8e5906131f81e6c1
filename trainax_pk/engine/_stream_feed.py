"""Batches from disk, read ahead while those before them are trained on."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int32, PyTree

from trainax_pk.data import StoredWindows
from trainax_pk.engine._feed_base import AbstractChunkFeed
from trainax_pk.engine._share import Share

# Updates whose order is computed at once: every call has one shape.
_BLOCK = 512


class StreamFeed(AbstractChunkFeed):
    """Windows on disk: one thread reads groups of batches, another moves chunks.

    The batch of an update depends on the order and its number alone. So a checkpoint
    holds nothing of this: a run that goes on at update n asks for the batches from n.

    Attributes:
        windows: What is gathered from.
        ahead: What is ready, and what reads on.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> source = tx.data.SimulationDataset(
        ...     jnp.sin, tx.data.Normal(jnp.zeros(2), 1.0), 16
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cached = tx.data.CachedDataset(source, folder)
        ...     windows = tx.data.StoredWindows(cached, lambda trajectories: 0)
        ...     feed = tx.engine.StreamFeed(windows, num_updates=10)
        ...     order = tx.data.ShuffledOrder(16, 4, 0)
        ...     theta, x = feed.load(order, 0, 3, 3)  # three updates ahead
        >>> x.shape
        (3, 4, 2)
    """

    windows: StoredWindows
    ahead: "_Ahead"

    def __init__(
        self, windows: StoredWindows, num_updates: int, share: Share | None = None
    ) -> None:
        """Reads nothing.

        Args:
            windows: What is gathered from.
            num_updates: Updates of a run; nothing is read beyond them.
            share: What of a batch this process reads; None for all of it.
        """
        self.windows = windows
        self.ahead = _Ahead(windows, num_updates, share)

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """Batches of the chunk, leaves `(size, B, ...)`."""
        return self.ahead.load(order, _Chunk(start, count, size))


class _Chunk(NamedTuple):
    """Updates `start … start + count - 1`, in arrays for `size`."""

    start: int
    count: int
    size: int


class _Group(NamedTuple):
    """Updates `start … stop - 1`, whose batches are read together."""

    start: int
    stop: int
    batches: Future


class _Ahead:
    """The chunk that is asked for, the next one on its way, and groups beyond it.

    All pieces of the store that a group's batches touch are read once. The first group
    is one chunk, which the first update waits for; each is twice as long as the one
    before, up to what the memory budget allows.
    """

    def __init__(
        self, windows: StoredWindows, num_updates: int, share: Share | None
    ) -> None:
        self._windows = windows
        self._num_updates = num_updates
        self._share = share
        # Threads start with the first task, and end with this object.
        self._reader = ThreadPoolExecutor(1)
        self._mover = ThreadPoolExecutor(1)
        self._begin(None)

    def load(self, order: Any, chunk: _Chunk) -> PyTree[Array]:
        """Batches of a chunk; begins to make those of the one that will follow."""
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(order)):
            raise ValueError(
                "Expected one run at a time on data that are streamed, got an ensemble "
                "or a transformation. Train the members one after another, or pass a "
                "memory_budget that the data fit into."
            )
        if order is not self._order or chunk.start < self._chunk.start:
            self._begin(order)
        if chunk == self._chunk:
            return self._arrays
        if chunk.size == 1 < self._chunk.size:
            # A callback looks at one batch: what has been read ahead stays.
            batch = self._windows.gather_host(self._indices(chunk.start, 1)[0])
            return self._put(jax.tree.map(lambda x: x[None], batch))
        if self._next is not None and self._next[0] == chunk:
            self._arrays = self._next[1].result()
        else:
            self._arrays = _move(chunk, self._cover(chunk), _Settings.now(), self._put)
        self._chunk, self._next = chunk, None
        self._look_ahead(chunk.start + chunk.count)
        return self._arrays

    def _begin(self, order: Any) -> None:
        for group in getattr(self, "_groups", []):
            group.batches.cancel()
        self._order = order
        self._groups: list[_Group] = []
        self._blocks: dict[int, np.ndarray] = {}
        self._chunk, self._arrays = _Chunk(-1, 0, 0), None
        self._next: tuple[_Chunk, Future] | None = None

    def _look_ahead(self, start: int) -> None:
        count = min(self._chunk.count, self._num_updates - start)
        if count <= 0:
            self._groups = []
            return
        chunk = _Chunk(start, count, self._chunk.size)
        task = self._mover.submit(
            _move, chunk, self._cover(chunk), _Settings.now(), self._put
        )
        self._next = chunk, task

    def _put(self, batches: PyTree[np.ndarray]) -> PyTree[Array]:
        if self._share is None:
            return jax.device_put(batches)
        return self._share.put(batches, self._order.batch_size)

    def _cover(self, chunk: _Chunk) -> list[_Group]:
        """Groups that hold a chunk; sees to it that one beyond them is under way."""
        stop = chunk.start + chunk.count
        groups = [g for g in self._groups if g.stop > chunk.start]
        if groups and groups[0].start > chunk.start:
            groups = []
        end = max(stop, self._num_updates)
        longest = self._windows.group_size(self._order.batch_size)
        while not groups or (groups[-1].start < stop and groups[-1].stop < end):
            first, length = chunk.start, chunk.count
            if groups:
                first, length = (
                    groups[-1].stop,
                    2 * (groups[-1].stop - groups[-1].start),
                )
            last = min(first + min(length, longest), end)
            indices = self._indices(first, last - first)
            settings = _Settings.now()
            task = self._reader.submit(_gather, self._windows, indices, settings)
            groups.append(_Group(first, last, task))
        self._groups = groups
        return [g for g in groups if g.start < stop]

    def _indices(self, start: int, length: int) -> Int32[np.ndarray, "n B"]:
        numbers = range(start // _BLOCK, (start + length - 1) // _BLOCK + 1)
        blocks = {
            n: self._blocks[n] if n in self._blocks else _order_block(self._order, n)
            for n in numbers
        }
        # The last one is begun, and will be asked for again.
        self._blocks = {numbers[-1]: blocks[numbers[-1]]}
        skip = start - numbers[0] * _BLOCK
        rows = np.concatenate(list(blocks.values()))[skip : skip + length]
        if self._share is None:
            return rows
        return rows[:, self._share.columns(self._order.batch_size)]


class _Settings(NamedTuple):
    """What JAX keeps for each thread, and the threads here have to share."""

    x64: bool
    device: Any

    @staticmethod
    def now() -> "_Settings":
        return _Settings(jax.config.jax_enable_x64, jax.config.jax_default_device)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with jax.enable_x64(self.x64), jax.default_device(self.device):
            yield


def _order_block(order: Any, number: int) -> np.ndarray:
    return np.asarray(_block(order, np.uint32(number * _BLOCK)))


@eqx.filter_jit
def _block(order: Any, start: Array) -> Int32[Array, "n B"]:
    return order.indices(start, _BLOCK)


def _gather(
    windows: StoredWindows, indices: Int32[np.ndarray, "n B"], settings: _Settings
) -> PyTree[np.ndarray]:
    with settings.used():
        batches = windows.gather_host(indices.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(*indices.shape, *x.shape[1:]), batches)


def _move(
    chunk: _Chunk,
    groups: list[_Group],
    settings: _Settings,
    put: Callable[[PyTree[np.ndarray]], PyTree[Array]],
) -> PyTree[Array]:
    stop = chunk.start + chunk.count

    def join(*parts: np.ndarray) -> np.ndarray:
        if len(parts) == 1 and chunk.count == chunk.size:
            return parts[0]
        # The program's shapes are those of a full chunk; the rest is never read.
        whole = np.zeros((chunk.size, *parts[0].shape[1:]), parts[0].dtype)
        np.concatenate(parts, out=whole[: chunk.count])
        return whole

    with settings.used():
        cut = [
            jax.tree.map(
                lambda x, g=g: x[max(chunk.start - g.start, 0) : stop - g.start],
                g.batches.result(),
            )
            for g in groups
        ]
        return put(jax.tree.map(join, *cut))
