"""Parts as shards of zarr arrays (format 3)."""

import functools
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from trainax_pk._extras import load
from trainax_pk._files import AbstractFiles, write_counted
from trainax_pk.data._cache_gather import PieceCache, gather, read_whole
from trainax_pk.data._cache_manifest import CacheDamaged, Layout, Leaf
from trainax_pk.data._cache_store import AbstractStore, Rows

# An inner chunk is what one random row costs to read; a shard is one file.
_PIECE_BYTES = 2**16
_FOLDER = "data.zarr"
# Indices of shards that are kept: 8 KiB each for one of 32 MiB.
_INDICES = 4096


class ZarrStore(AbstractStore):
    """One zarr array for each leaf in one group; a part of the cache is one shard.

    Inner chunks are compressed and carry a CRC-32C each, as does the index of a shard:
    a reader of the array by any zarr library meets damage as an error.

    zarr writes the metadata. Shards are read and written here, in the layout that the
    format lays down (https://zarr-specs.readthedocs.io, "Sharding codec"): inner chunks
    one after another, then (offset, length) of each, then a checksum of that index.
    zarr's own way costs half a millisecond per inner chunk, this one 30 µs, so that
    inner chunks can be as small as random access wants them.
    """

    def __init__(self, layout: Layout, files: AbstractFiles) -> None:
        super().__init__(layout, files)
        self._crc32c = load("google_crc32c").value
        self._codec = None
        if layout.compression is not None:
            # Importing zarr's codec tells blosc to leave threads to us.
            load("zarr.codecs")
            self._codec = load("numcodecs.blosc").Blosc(
                layout.compression, clevel=1, shuffle=1
            )
        # By name: hashing a layout for every piece would cost as much as decoding it.
        self._shapes = {leaf.name: _piece_shape(layout, leaf) for leaf in layout.leaves}
        self._names = {leaf.name: leaf for leaf in layout.leaves}
        self._index = functools.lru_cache(_INDICES)(self._read_index)

    def create(self) -> list[str]:
        """Group and arrays without data."""
        zarr = load("zarr")
        names = [f"{_FOLDER}/zarr.json"]
        zarr.create_group(self.files.url(_FOLDER), overwrite=True)
        for leaf in self.layout.leaves:
            self._create_array(zarr, leaf)
            names.append(f"{_FOLDER}/{leaf.name}/zarr.json")
        return names

    def write(self, part: int, rows: Rows) -> dict[str, list[int]]:
        """One shard of every array."""
        found = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for leaf in self.layout.leaves:
                pieces = self._encode(leaf, rows[leaf.name], pool)
                found |= write_counted(self.files, _shard(leaf, part), pieces)
        return found

    def read(self, start: int, stop: int) -> Rows:
        """A slice of every array."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {
                leaf.name: read_whole(self, leaf, start, stop, pool)
                for leaf in self.layout.leaves
            }

    def take(self, rows: np.ndarray) -> Rows:
        """Each inner chunk that holds a row is read once."""
        pieces = PieceCache(self, 0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {
                leaf.name: gather(pieces, leaf, rows, None, pool)
                for leaf in self.layout.leaves
            }

    def piece_shape(self, leaf: Leaf) -> tuple[int, int]:
        """An inner chunk."""
        return self._shapes[leaf.name]

    def read_piece(self, leaf: Leaf, row: int, entry: int) -> np.ndarray:
        """An inner chunk, padded with zeros."""
        shape = self.piece_shape(leaf)
        across, along = self._grid(leaf)
        part, row = divmod(row, across)
        offset, length = self._index(leaf.name, part)[row * along + entry]
        content = self.files.read_range(_shard(leaf, part), int(offset), int(length))
        body = self._checked(content, leaf, part)
        raw = body if self._codec is None else self._codec.decode(body)
        stored = np.frombuffer(raw, leaf.stored_dtype.newbyteorder("<"))
        native = stored.astype(leaf.stored_dtype, copy=False)
        return native.view(np.dtype(leaf.dtype)).reshape(*shape, *leaf.shape[1:])

    def _grid(self, leaf: Leaf) -> tuple[int, int]:
        """Inner chunks of a shard, across its rows and along their first axis."""
        rows, entries = self.piece_shape(leaf)
        return -(-self.layout.part_size // rows), -(-max(leaf.length, 1) // entries)

    def _encode(
        self, leaf: Leaf, rows: np.ndarray, pool: ThreadPoolExecutor
    ) -> Iterator[bytes]:
        """A shard in pieces; the next ones are encoded while one is written."""
        across, along = self._grid(leaf)
        size, entries = self.piece_shape(leaf)
        stored = np.ascontiguousarray(rows).view(leaf.stored_dtype)
        stored = stored.reshape(len(rows), leaf.length, *leaf.shape[1:])
        little = leaf.stored_dtype.newbyteorder("<")

        shape = size, entries, *map(_at_least_one, leaf.shape[1:])

        def encode(number: int) -> bytes:
            row, entry = divmod(number, along)
            block = stored[
                row * size : (row + 1) * size, entry * entries : (entry + 1) * entries
            ]
            if block.shape != shape:
                whole = np.zeros(shape, leaf.stored_dtype)
                whole[tuple(map(slice, block.shape))] = block
                block = whole
            block = np.ascontiguousarray(block, little)
            return block.tobytes() if self._codec is None else self._codec.encode(block)

        def encode_share(share: range) -> tuple[list[int], bytes]:
            bodies = [encode(number) for number in share]
            sums = [struct.pack("<I", self._crc32c(body)) for body in bodies]
            pairs = zip(bodies, sums, strict=True)
            return [len(x) + 4 for x in bodies], b"".join(chain.from_iterable(pairs))

        count = across * along
        # Some pieces to a task, since handing one over, or writing one, costs as much as
        # encoding it; few enough that their bytes stay in a core's own cache.
        step = max(1, min(8, count // 16))
        shares = [range(i, min(i + step, count)) for i in range(0, count, step)]
        sizes: list[int] = []
        for lengths, content in pool.map(encode_share, shares):
            sizes += lengths
            yield content
        ends = np.cumsum(sizes)
        raw = np.stack([ends - sizes, sizes], axis=1).astype("<u8").tobytes()
        yield raw + struct.pack("<I", self._crc32c(raw))

    def _read_index(self, name: str, part: int) -> np.ndarray:
        leaf = self._names[name]
        across, along = self._grid(leaf)
        length = 16 * across * along + 4
        content = self.files.read_range(_shard(leaf, part), -length, length)
        raw = self._checked(content, leaf, part)
        return np.frombuffer(raw, "<u8").reshape(-1, 2)

    def _checked(self, content: bytes, leaf: Leaf, part: int) -> bytes:
        body = content[:-4]
        if content[-4:] != struct.pack("<I", self._crc32c(body)):
            start, stop = self.layout.rows(part)
            raise CacheDamaged(
                f"Expected part {part} (rows {start} to {stop - 1}) as it was written, "
                f"got another checksum in {_shard(leaf, part)}. Call repair() to make "
                "the damaged parts again.",
                parts=[part],
            )
        return body

    def _create_array(self, zarr: Any, leaf: Leaf) -> None:
        rows, entries = self.piece_shape(leaf)
        across, along = self._grid(leaf)
        # An axis of length 0 still needs chunks of length 1.
        rest = tuple(map(_at_least_one, leaf.shape[1:]))
        inner, shard = (rows, entries, *rest), (across * rows, along * entries, *rest)
        count = 1 + len(leaf.shape)
        zarr.create_array(
            self.files.url(f"{_FOLDER}/{leaf.name}"),
            shape=(self.layout.num_samples, *leaf.shape),
            dtype=leaf.stored_dtype,
            chunks=inner[:count],
            shards=shard[:count],
            compressors=_codecs(zarr, self.layout.compression),
            fill_value=0,
            # All shards in one folder, which is made durable once.
            chunk_key_encoding={"name": "default", "separator": "."},
            overwrite=True,
        )


def _piece_shape(layout: Layout, leaf: Leaf) -> tuple[int, int]:
    """Rows and entries of a piece of about `_PIECE_BYTES`, as even as they divide."""
    size = layout.part_size
    entry_bytes = max(1, leaf.nbytes // max(leaf.length, 1))
    cuts = -(-leaf.length // max(1, _PIECE_BYTES // entry_bytes))
    entries = max(1, -(-leaf.length // max(1, cuts)))
    wanted = max(1, min(size, _PIECE_BYTES // max(leaf.nbytes, 1)))
    if layout.num_parts == 1:
        # The only shard may reach past the end.
        return wanted, entries
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d)), entries


def _codecs(zarr: Any, compression: str | None) -> list[Any]:
    codecs = [] if compression is None else [
        zarr.codecs.BloscCodec(cname=compression, clevel=1, shuffle="shuffle")
    ]  # fmt: skip
    return [*codecs, zarr.codecs.Crc32cCodec()]


def _shard(leaf: Leaf, part: int) -> str:
    return f"{_FOLDER}/{leaf.name}/c.{'.'.join([str(part), *['0'] * len(leaf.shape)])}"


def _at_least_one(n: int) -> int:
    return max(n, 1)
