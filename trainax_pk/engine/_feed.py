"""Where a program's batches come from."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from trainax_pk.data import Samples, StoredWindows, Windows
from trainax_pk.engine._feed_base import AbstractChunkFeed, AbstractFeed
from trainax_pk.engine._share import Share
from trainax_pk.engine._stream_feed import StreamFeed

# Updates whose order is computed at once.
_BLOCK = 512


class DeviceFeed(AbstractFeed):
    """Trajectories on the device; windows are gathered inside the program.

    Attributes:
        windows: Index arithmetic over the trajectories.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> feed = tx.engine.DeviceFeed(tx.data.Windows(jnp.ones((4, 5, 2)), 1))
        >>> arrays = feed.load(tx.data.SequentialOrder(16, 8), 0, 1, 1)
        >>> feed.single(arrays, 0, 0).state.shape
        (8, 2, 2)
    """

    windows: Windows | Samples

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """The trajectories and the order: the same for every chunk."""
        del start, count, size
        return (self.windows.arrays, order)

    def plan(
        self, arrays: PyTree[Array], start: Array, count: Array, size: int
    ) -> Int[Array, "n B"]:
        """Window indices of `count` updates, in rows for `size` or a few more."""
        order = arrays[1]
        if size <= _BLOCK:
            return order.indices(start, size)

        # Block by block: a short chunk of a long program pays for its own order only.
        def block(i: Array, plan: Int[Array, "n B"]) -> Int[Array, "n B"]:
            rows = order.indices(start + i * _BLOCK, _BLOCK)
            return jax.lax.dynamic_update_slice_in_dim(plan, rows, i * _BLOCK, 0)

        num_blocks = -(-size // _BLOCK)
        empty = jnp.zeros((num_blocks * _BLOCK, order.batch_size), jnp.int32)
        return jax.lax.fori_loop(0, -(-count // _BLOCK), block, empty)

    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        """Windows of one update."""
        indices = jax.lax.dynamic_index_in_dim(plan, i, keepdims=False)
        return self.windows.gather(arrays[0], indices)

    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        """Windows of one update, without those around it."""
        indices = arrays[1].indices(start + i, 1)[0]
        return self.windows.gather(arrays[0], indices)


class HostFeed(AbstractChunkFeed):
    """Trajectories in host memory; a chunk's batches are gathered there and moved.

    Attributes:
        windows: Windows with host residency.
        share: What of a batch this process gathers, or None for all of it.

    Example:
        >>> import numpy as np
        >>> import trainax_pk as tx
        >>> data = np.ones((4, 5, 2), np.float32)
        >>> feed = tx.engine.HostFeed(tx.data.Windows(data, 1, residency="host"))
        >>> order = tx.data.SequentialOrder(16, 8)
        >>> feed.load(order, 0, 3, 3).state.shape  # three updates ahead
        (3, 8, 2, 2)
    """

    windows: Windows | Samples
    share: Share | None = eqx.field(static=True, default=None)

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """Batches of the chunk, leaves `(size, B, ...)`."""
        indices = np.asarray(order.indices(start, count))
        # The program's shapes are those of a full chunk; the rest is never read.
        rows = indices[np.minimum(np.arange(size), count - 1)]
        if self.share is not None:
            rows = rows[:, self.share.columns(order.batch_size)]
        windows = self.windows.gather_host(rows.reshape(-1))
        batches = jax.tree.map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), windows)
        if self.share is not None:
            return self.share.put(batches, order.batch_size)
        return jax.tree.map(jnp.asarray, batches)


def make_feed(
    windows: Windows | Samples | StoredWindows,
    num_updates: int = 2**31 - 1,
    share: Share | None = None,
) -> AbstractFeed:
    """The feed that fits where the windows live.

    Args:
        windows: Windows or samples on the device, on the host or on disk.
        num_updates: Updates of a run, beyond which nothing is read ahead.
        share: What of a batch made on the host this process gathers; None for all.

    Returns:
        A `DeviceFeed`, a `HostFeed` or a `StreamFeed`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> windows = tx.data.Windows(jnp.ones((4, 5, 2)), 1, residency="device")
        >>> type(tx.engine.make_feed(windows)).__name__
        'DeviceFeed'
    """
    if windows.residency == "disk":
        return StreamFeed(windows, num_updates, share)
    if windows.residency == "host":
        return HostFeed(windows, share)
    return DeviceFeed(windows)
