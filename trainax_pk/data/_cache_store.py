"""What a format has to offer to be cached in."""

import abc
from collections.abc import Callable

import numpy as np

from trainax_pk._files import AbstractFiles
from trainax_pk.data._cache_manifest import Layout, Leaf

Rows = dict[str, np.ndarray]


class AbstractStore(abc.ABC):
    """Rows in files of some format, written chunk by chunk and read piece by piece.

    A piece is what is read at once of one leaf: some rows, and some entries along the
    first axis of a row, which are the times of a trajectory. It lies in one chunk.

    To add one: implement the methods below, and name it in `trainax_pk/data/_cache.py`.
    No two chunks may share a file, since a chunk is verified, and written again, by its
    files. Writing a chunk twice must give the same bytes. The contract tests of
    `tests/test_data_cache.py` and `tests/test_data_stream.py` run on every format.

    Attributes:
        layout: What is stored.
        files: Where.
    """

    def __init__(self, layout: Layout, files: AbstractFiles) -> None:
        self.layout = layout
        self.files = files

    @abc.abstractmethod
    def create(self) -> list[str]:
        """Writes what belongs to no chunk; returns the files."""

    @abc.abstractmethod
    def write(self, chunk: int, rows: Rows) -> list[str]:
        """Writes one chunk durably; returns its files."""

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> Rows:
        """Rows start, ..., stop - 1."""

    @abc.abstractmethod
    def take(self, rows: np.ndarray) -> Rows:
        """Rows by number, in any order."""

    @abc.abstractmethod
    def piece_shape(self, leaf: Leaf) -> tuple[int, int]:
        """Rows of a piece, and entries of a row's first axis."""

    @abc.abstractmethod
    def read_piece(self, leaf: Leaf, row: int, entry: int) -> np.ndarray:
        """Piece `row` along the rows and `entry` along their first axis, as an array
        `(rows, entries, ...)`; what lies beyond the end may be missing or padded. Any
        thread may call it."""


def take_by_chunk(
    layout: Layout, rows: np.ndarray, read_chunk: Callable[[int], Rows]
) -> Rows:
    """Rows by number, for formats that are read a chunk at a time."""
    out = {
        leaf.name: np.empty((len(rows), *leaf.shape), np.dtype(leaf.dtype))
        for leaf in layout.leaves
    }
    chunks = rows // layout.chunk_size
    for chunk in np.unique(chunks):
        at = np.flatnonzero(chunks == chunk)
        content = read_chunk(int(chunk))
        for name, array in content.items():
            out[name][at] = array[rows[at] - chunk * layout.chunk_size]
    return out
