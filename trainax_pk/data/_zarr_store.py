"""Chunks as shards of zarr arrays (format 3)."""

from typing import Any

import numpy as np

from trainax_pk.data._cache_manifest import Layout, Leaf
from trainax_pk.data._cache_store import AbstractStore, Rows
from trainax_pk.data._extras import load

# An inner chunk is what one row costs to read; a shard is one file.
_INNER_BYTES = 2**20
_FOLDER = "data.zarr"


class ZarrStore(AbstractStore):
    """One zarr array for each leaf in one group; a chunk of the cache is one shard.

    Inner chunks are compressed and carry a CRC-32C each, as does the index of a shard:
    a reader of the array by any zarr library meets damage as an error.
    """

    def create(self) -> list[str]:
        """Group and arrays without data."""
        zarr = load("zarr")
        names = [f"{_FOLDER}/zarr.json"]
        zarr.create_group(self.files.url(_FOLDER), overwrite=True)
        for leaf in self.layout.leaves:
            self._create_array(zarr, leaf)
            names.append(f"{_FOLDER}/{leaf.name}/zarr.json")
        self.files.settle(names)
        return names

    def write(self, chunk: int, rows: Rows) -> list[str]:
        """One shard of every array."""
        start, stop = self.layout.rows(chunk)
        names = []
        for leaf in self.layout.leaves:
            parts = [str(chunk), *["0"] * len(leaf.shape)]
            name = f"{_FOLDER}/{leaf.name}/c/{'/'.join(parts)}"
            # zarr would merge the last, shorter chunk with a torn shard that lies there.
            self.files.remove(name)
            # A shard of zeros is data too: without a file it would be a hole.
            array = self._open(leaf, "r+").with_config({"write_empty_chunks": True})
            array[start:stop] = rows[leaf.name].view(leaf.stored_dtype)
            names.append(name)
        self.files.settle(names)
        return names

    def read(self, start: int, stop: int) -> Rows:
        """A slice of every array."""
        return {
            leaf.name: _as(leaf, self._open(leaf, "r")[start:stop])
            for leaf in self.layout.leaves
        }

    def take(self, rows: np.ndarray) -> Rows:
        """Each inner chunk that holds a row is read once."""
        unique, inverse = np.unique(rows, return_inverse=True)
        out = {}
        for leaf in self.layout.leaves:
            array = self._open(leaf, "r")
            # Along the other axes all: zarr takes the selection axis by axis.
            selection = (unique, *[slice(None)] * len(leaf.shape))
            out[leaf.name] = _as(leaf, array.oindex[selection])[inverse]
        return out

    def _open(self, leaf: Leaf, mode: str) -> Any:
        zarr = load("zarr")
        return zarr.open_array(self.files.url(f"{_FOLDER}/{leaf.name}"), mode=mode)

    def _create_array(self, zarr: Any, leaf: Leaf) -> None:
        inner, size = _chunk_rows(self.layout, leaf)
        # An axis of length 0 still needs chunks of length 1.
        rest = tuple(max(n, 1) for n in leaf.shape)
        zarr.create_array(
            self.files.url(f"{_FOLDER}/{leaf.name}"),
            shape=(self.layout.num_samples, *leaf.shape),
            dtype=leaf.stored_dtype,
            chunks=(inner, *rest),
            shards=(size, *rest),
            compressors=_codecs(zarr, self.layout.compression),
            fill_value=0,
            overwrite=True,
        )


def _chunk_rows(layout: Layout, leaf: Leaf) -> tuple[int, int]:
    """Rows of an inner chunk and of a shard, a multiple of it."""
    size = layout.chunk_size
    wanted = max(1, min(size, _INNER_BYTES // max(leaf.nbytes, 1)))
    if layout.num_chunks == 1:
        # The only shard may reach past the end.
        return wanted, -(-size // wanted) * wanted
    inner = max(d for d in range(1, wanted + 1) if size % d == 0)
    # A chunk size without a fitting divisor is not cut into crumbs.
    return (inner if 4 * inner >= wanted else size), size


def _codecs(zarr: Any, compression: str | None) -> list[Any]:
    codecs = [] if compression is None else [
        zarr.codecs.BloscCodec(cname=compression, clevel=1, shuffle="shuffle")
    ]  # fmt: skip
    return [*codecs, zarr.codecs.Crc32cCodec()]


def _as(leaf: Leaf, array: Any) -> np.ndarray:
    return np.asarray(array).view(np.dtype(leaf.dtype))
