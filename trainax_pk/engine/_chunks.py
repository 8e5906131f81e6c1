"""How long the chunks are in which updates are dispatched."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# Longest chunk that is dispatched at once: how late a signal or a callback may come.
_CHUNK_SECONDS = 2.0


def chunk_size(limit: int, batch_bytes: int) -> int:
    """Longest chunk: as long as nothing on the host has to be done in between, but not
    longer than what a chunk's plan and its waiting time allow.

    Args:
        limit: Updates between two tasks of the host.
        batch_bytes: What the chunk holds for each update.

    Returns:
        Number of updates, at least 1.

    Example:
        >>> from trainax_pk.engine import chunk_size
        >>> chunk_size(100, 128), chunk_size(10**6, 128), chunk_size(100, 2**29)
        (100, 8192, 2)
    """
    return max(1, min(limit, 8192, int(2**30 // max(batch_bytes, 1))))


def join_chunks(chunks: Sequence[PyTree[Any]]) -> PyTree[Any]:
    """Records of chunks one after another.

    The lengths of chunks are a matter of the clock. A concatenation on the device would
    be compiled for each set of them, so it is done on the host wherever arrays are known.

    Args:
        chunks: Of the same structure, leaves `(count, ...)`, one at least.

    Returns:
        Leaves `(sum of the counts, ...)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.engine import join_chunks
        >>> join_chunks([{"loss": jnp.ones(2)}, {"loss": jnp.ones(3)}])["loss"].shape
        (5,)
    """

    def join(*parts: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in parts):
            return jnp.concatenate(parts)
        return jax.device_put(np.concatenate([np.asarray(x) for x in parts]))

    return jax.tree.map(join, *chunks)


class ChunkClock:
    """Limits chunks to a time: how late a signal or the progress bar may come.

    The first chunk is short, for nothing is known of an update yet. Each says how long
    the next may be: the first, which compiles, too little, and the others what they took.
    Lengths are powers of two or what is asked for: a clock never gives the same number
    twice, and what is compiled for a length is to be found again.

    Example:
        >>> from trainax_pk.engine import ChunkClock
        >>> ChunkClock().limit(1000)  # nothing is known before the first chunk
        1
        >>> ChunkClock(64).limit(1000)
        64
    """

    def __init__(self, first: int = 1) -> None:
        """Starts.

        Args:
            first: Updates of the first chunk.
        """
        self._first = first
        self._per_update: float | None = None
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Marks the start of a chunk."""
        self._began = time.perf_counter()

    def end(self, count: int) -> None:
        """Marks the end of a chunk of so many updates."""
        self._per_update = (time.perf_counter() - self._began) / count

    def limit(self, size: int) -> int:
        """Number of updates that the next chunk may hold."""
        if self._per_update is None:
            return min(size, self._first)
        fitting = int(_CHUNK_SECONDS / max(self._per_update, 1e-9))
        return size if fitting >= size else 1 << max(fitting, 1).bit_length() - 1
