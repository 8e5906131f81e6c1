"""Rows and windows out of the pieces of a store, each piece read once."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from trainax_pk.data._cache_manifest import Leaf
from trainax_pk.data._cache_store import AbstractStore

# Most jobs of a task, and tasks that there should be at least.
_JOBS, _TASKS = 32, 16


class PieceCache:
    """The pieces that were used last, decoded, up to a number of bytes.

    Attributes:
        store: Where they come from.
        limit: Bytes that it may hold; 0 for none.
    """

    def __init__(self, store: AbstractStore, limit: int) -> None:
        self.store = store
        self.limit = limit
        self._pieces: collections.OrderedDict = collections.OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def fetch(self, leaf: Leaf, row: int, entry: int) -> np.ndarray:
        """As `AbstractStore.read_piece`."""
        key = leaf.name, row, entry
        with self._lock:
            piece = self._pieces.get(key)
            if piece is not None:
                self._pieces.move_to_end(key)
                return piece
        # Without the lock: two threads may read one piece, which is a loss, no fault.
        piece = self.store.read_piece(leaf, row, entry)
        with self._lock:
            if key not in self._pieces and piece.nbytes <= self.limit:
                self._pieces[key] = piece
                self._nbytes += piece.nbytes
            while self._nbytes > self.limit:
                self._nbytes -= self._pieces.popitem(last=False)[1].nbytes
        return piece


def gather(
    pieces: PieceCache,
    leaf: Leaf,
    rows: np.ndarray,
    times: np.ndarray | None,
    pool: Executor,
) -> np.ndarray:
    """Rows of a leaf by number, or some entries of each along its first axis.

    Args:
        pieces: Where they come from.
        leaf: Which leaf.
        rows: `(n,)`, any order.
        times: `(n, L)`, entries of each row, or None for whole rows.
        pool: Reads several pieces at a time.

    Returns:
        `(n, *leaf.shape)`, or `(n, L, *leaf.shape[1:])`.
    """
    if times is None:
        out = _empty(leaf, len(rows), leaf.length)
        jobs = _rows_by_piece(pieces.store, leaf, rows, out)
    else:
        out = _empty(leaf, *times.shape)
        jobs = _times_by_piece(pieces.store, leaf, rows, times, out)

    def copy(job: tuple[int, int, np.ndarray, np.ndarray, np.ndarray]) -> None:
        row, entry, target, source, to = job
        piece = pieces.fetch(leaf, row, entry)
        if times is None:
            target[to] = piece[source, : target.shape[1]]
        else:
            target[to] = piece.reshape(-1, *piece.shape[2:])[source]

    if out.size:
        _spread(copy, jobs, pool)
    return out.reshape(len(rows), *leaf.shape) if times is None else out


def _spread(act: Callable[[Any], None], jobs: list, pool: Executor) -> None:
    """Does all jobs, some to a task: handing over a task costs as much as a piece."""
    size = max(1, min(_JOBS, len(jobs) // _TASKS))
    shares = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    list(pool.map(lambda share: [act(job) for job in share], shares))


def _rows_by_piece(
    store: AbstractStore, leaf: Leaf, rows: np.ndarray, out: np.ndarray
) -> list:
    size, entries = store.piece_shape(leaf)
    groups = _group(rows // size)
    return [
        (
            piece,
            entry,
            out[:, entry * entries : (entry + 1) * entries],
            rows[to] - piece * size,
            to,
        )
        for piece, to in groups
        for entry in range(-(-leaf.length // entries))
    ]


def _times_by_piece(
    store: AbstractStore,
    leaf: Leaf,
    rows: np.ndarray,
    times: np.ndarray,
    out: np.ndarray,
) -> list:
    """Single times are what is copied: windows may reach over the border of pieces."""
    size, entries = store.piece_shape(leaf)
    along = -(-leaf.length // entries)
    piece = (rows // size)[:, None] * along + times // entries
    source = (rows % size)[:, None] * entries + times % entries
    source, target = source.reshape(-1), out.reshape(-1, *out.shape[2:])
    return [
        (*divmod(number, along), target, source[to], to)
        for number, to in _group(piece.reshape(-1))
    ]


def _group(numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each number that occurs, and where it does."""
    if not len(numbers):
        return []
    # Few numbers sort by radix.
    narrow = np.uint16 if numbers.max() < 2**16 else np.int64
    order = np.argsort(numbers.astype(narrow), kind="stable")
    ordered = numbers[order]
    bounds = np.flatnonzero(np.diff(ordered)) + 1
    found = ordered[np.concatenate([[0], bounds])]
    return list(zip(found.tolist(), np.split(order, bounds), strict=True))


def _empty(leaf: Leaf, count: int, length: int) -> np.ndarray:
    return np.empty((count, length, *leaf.shape[1:]), np.dtype(leaf.dtype))
