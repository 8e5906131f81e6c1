"""Parts as parquet files, one column for each leaf."""

import io
import json

import numpy as np

from trainax_pk._extras import load
from trainax_pk._files import write_counted
from trainax_pk.data._cache_manifest import Leaf
from trainax_pk.data._cache_store import AbstractStore, Rows, take_by_part


class ParquetStore(AbstractStore):
    """`part-<part>.parquet`: leaves as fixed-size lists of their flattened entries.

    Shapes and dtypes stand in the schema's metadata under "trainax_pk", so that a file
    can be read without this package. Pages carry checksums.
    """

    def create(self) -> list[str]:
        """Nothing beside the parts."""
        load("pyarrow.parquet", "parquet")
        return []

    def write(self, part: int, rows: Rows) -> dict[str, list[int]]:
        """One file."""
        pyarrow, parquet = (
            load("pyarrow", "parquet"),
            load("pyarrow.parquet", "parquet"),
        )
        columns, about = {}, {}
        for leaf in self.layout.leaves:
            flat = rows[leaf.name].reshape(len(rows[leaf.name]), leaf.size)
            values = pyarrow.array(_real(flat).reshape(-1))
            width = len(values) // max(len(flat), 1)
            columns[leaf.name] = pyarrow.FixedSizeListArray.from_arrays(values, width)
            about[leaf.name] = {"shape": list(leaf.shape), "dtype": leaf.dtype}
        table = pyarrow.table(columns)
        table = table.replace_schema_metadata({"trainax_pk": json.dumps(about)})
        sink = io.BytesIO()
        parquet.write_table(
            table,
            sink,
            compression=self.layout.compression or "none",
            # Simulations repeat no values: a dictionary would only be built to be
            # thrown away.
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        return write_counted(self.files, _name(part), [sink.getvalue()])

    def read(self, start: int, stop: int) -> Rows:
        """Rows of the parts that hold them."""
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> Rows:
        """Every part that holds a row is read once."""
        return take_by_part(self.layout, rows, self._read_part)

    def piece_shape(self, leaf: Leaf) -> tuple[int, int]:
        """A column of a part: pages hold no whole number of rows."""
        return self.layout.part_size, max(leaf.length, 1)

    def read_piece(self, leaf: Leaf, row: int, entry: int) -> np.ndarray:
        """A column of part `row`."""
        del entry
        column = self._read_part(row, (leaf,))[leaf.name]
        return column.reshape(len(column), *self.piece_shape(leaf)[1:], *leaf.shape[1:])

    def _read_part(self, part: int, leaves: tuple[Leaf, ...] = ()) -> Rows:
        parquet = load("pyarrow.parquet", "parquet")
        content = io.BytesIO(self.files.read(_name(part)))
        leaves = leaves or self.layout.leaves
        file = parquet.ParquetFile(content, page_checksum_verification=True)
        table = file.read([leaf.name for leaf in leaves])
        start, stop = self.layout.rows(part)
        out = {}
        for leaf in leaves:
            column = table.column(leaf.name).combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            array = np.ascontiguousarray(values).view(np.dtype(leaf.dtype))
            out[leaf.name] = array.reshape(stop - start, *leaf.shape)
        return out


def _real(flat: np.ndarray) -> np.ndarray:
    """Entries as numbers that parquet has: complex as pairs, bool and others as bits."""
    kind, size = flat.dtype.kind, flat.dtype.itemsize
    if kind == "c":
        return np.ascontiguousarray(flat).view(f"f{size // 2}")
    if kind in "iuf" and size >= 4:
        return flat
    # Small types are widened by parquet, halves and bfloat16 unknown to some readers.
    return np.ascontiguousarray(flat).view(f"u{size}")


def _name(part: int) -> str:
    return f"part-{part:06d}.parquet"
