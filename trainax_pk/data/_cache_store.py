"""What a format has to offer to be cached in."""

import abc
from collections.abc import Callable

import numpy as np

from trainax_pk._files import AbstractFiles
from trainax_pk.data._cache_manifest import Layout, Leaf

Rows = dict[str, np.ndarray]


class AbstractStore(abc.ABC):
    """Rows in files of some format, written part by part and read piece by piece.

    A piece is what is read at once of one leaf: some rows, and some entries along the
    first axis of a row, which are the times of a trajectory. It lies in one part.

    To add one: implement the methods below, and name it in `trainax_pk/data/_cache.py`.
    No two parts may share a file, since a part is verified, and written again, by its
    files. Writing a part twice must give the same bytes. The contract tests of
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
        """Writes what belongs to no part; returns the files, to be settled."""

    @abc.abstractmethod
    def write(self, part: int, rows: Rows) -> dict[str, list[int]]:
        """Writes the files of one part by `write_counted`; returns what it tells."""

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


def take_by_part(
    layout: Layout, rows: np.ndarray, read_part: Callable[[int], Rows]
) -> Rows:
    """Rows by number, for formats that are read a part at a time."""
    out = {
        leaf.name: np.empty((len(rows), *leaf.shape), np.dtype(leaf.dtype))
        for leaf in layout.leaves
    }
    parts = rows // layout.part_size
    for part in np.unique(parts):
        at = np.flatnonzero(parts == part)
        content = read_part(int(part))
        for name, array in content.items():
            out[name][at] = array[rows[at] - part * layout.part_size]
    return out
