"""Parts as shards of zarr arrays (format 3)."""

import functools
import os
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from trainax_pk._extras import load
from trainax_pk._files import AbstractFiles, write_counted
from trainax_pk.data._cache_gather import PieceCache, gather
from trainax_pk.data._cache_manifest import CacheDamaged, Layout, Leaf
from trainax_pk.data._cache_store import AbstractStore, Rows

# Bytes, or an array of them.
Buffer = bytes | np.ndarray
# An inner chunk is what one random row costs to read; a shard is one file.
_PIECE_BYTES = 2**16
# Neighbours that are read at once, where whole rows are.
_RUN_BYTES = 2**20
_FOLDER = "data.zarr"
# Indices of shards that are kept: 8 KiB each for one of 32 MiB.
_INDICES = 4096


class ZarrStore(AbstractStore):
    """One zarr array for each leaf in one group; a part of the cache is one shard.

    Inner chunks carry a CRC-32C each, compressed or not, as does the index of a shard: a
    reader of the array by any zarr library meets damage as an error.

    zarr writes the metadata. Shards are read and written here, in the layout that the
    format lays down (https://zarr-specs.readthedocs.io, "Sharding codec"): inner chunks
    one after another, then (offset, length) of each, then a checksum of that index.
    zarr's own way costs half a millisecond per inner chunk, this one 30 µs, so that
    inner chunks can be as small as random access wants them.
    """

    def __init__(self, layout: Layout, files: AbstractFiles) -> None:
        super().__init__(layout, files)
        self._crc32c = load("google_crc32c").value
        self._codecs = {leaf.name: _codec(layout, leaf) for leaf in layout.leaves}
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
                leaf.name: self._read_leaf(leaf, start, stop, pool)
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
        across, along = self._grid(leaf)
        part, row = divmod(row, across)
        offset, length = self._index(leaf.name, part)[row * along + entry]
        content = self.files.read_range(_shard(leaf, part), int(offset), int(length))
        return self._decoded(self._checked(content, leaf, part), leaf)

    def _decoded(self, body: bytes, leaf: Leaf) -> np.ndarray:
        codec = self._codecs[leaf.name]
        raw = body if codec is None else codec.decode(body)
        stored = np.frombuffer(raw, leaf.stored_dtype.newbyteorder("<"))
        native = stored.astype(leaf.stored_dtype, copy=False)
        shape = self.piece_shape(leaf)
        return native.view(np.dtype(leaf.dtype)).reshape(*shape, *leaf.shape[1:])

    def _read_leaf(
        self, leaf: Leaf, start: int, stop: int, pool: ThreadPoolExecutor
    ) -> np.ndarray:
        """Rows `start … stop - 1`; inner chunks that lie together are read together."""
        rows, entries = self.piece_shape(leaf)
        across, along = self._grid(leaf)
        shape = (stop - start, along * entries, *leaf.shape[1:])
        out = np.empty(shape, np.dtype(leaf.dtype))
        step = max(1, _RUN_BYTES // (_PIECE_BYTES * along))
        codec = self._codecs[leaf.name]
        in_place = along == 1 and sys.byteorder == "little"

        def read_run(run: range) -> None:
            part, first = divmod(run.start, across)
            index = self._index(leaf.name, part)
            index = index[first * along : (first + len(run)) * along].tolist()
            begin, end = index[0][0], sum(index[-1])
            low, high = run.start * rows - start, run.stop * rows - start
            if codec is None and in_place and low >= 0 and high <= len(out):
                self._read_raw(leaf, part, begin, out[low:high].reshape(len(run), -1))
                return
            name = _shard(leaf, part)
            content = self.files.read_range(name, begin, end - begin)
            for number, (offset, length) in enumerate(index):
                row, entry = divmod(number, along)
                at = offset - begin
                body = self._checked(content, leaf, part, at, at + length)
                low = (run.start + row) * rows
                a, b = max(low, start), min(low + rows, stop)
                target = out[a - start : b - start]
                if b - a == rows and in_place and codec is not None:
                    # Whole and in one piece: no copy in between.
                    codec.decode(body, target.view(leaf.stored_dtype))
                    continue
                piece = self._decoded(body, leaf)[a - low : b - low]
                target[:, entry * entries : (entry + 1) * entries] = piece

        if leaf.nbytes:
            numbers = range(start // rows, -(-stop // rows))
            list(pool.map(read_run, _runs(numbers, across, step)))
        whole = out[:, : leaf.length] if along * entries > leaf.length else out
        return np.ascontiguousarray(whole).reshape(stop - start, *leaf.shape)

    def _read_raw(self, leaf: Leaf, part: int, begin: int, out: np.ndarray) -> None:
        """Inner chunks that are not encoded, one in each row, to where they belong."""
        targets = list(out.view(np.uint8))
        sums = list(np.empty((len(targets), 4), np.uint8))
        buffers = list(chain.from_iterable(zip(targets, sums, strict=True)))
        count = self.files.read_into(_shard(leaf, part), begin, buffers)
        if count != sum(map(len, buffers)):
            # What memory held before may well agree with the checksum that it held.
            raise self._damaged(leaf, part)
        for target, found in zip(targets, sums, strict=True):
            self._compare(target, found.tobytes(), leaf, part)

    def _grid(self, leaf: Leaf) -> tuple[int, int]:
        """Inner chunks of a shard, across its rows and along their first axis."""
        rows, entries = self.piece_shape(leaf)
        return -(-self.layout.part_size // rows), -(-max(leaf.length, 1) // entries)

    def _encode(
        self, leaf: Leaf, rows: np.ndarray, pool: ThreadPoolExecutor
    ) -> Iterator[Buffer]:
        """A shard in pieces; the next ones are encoded while one is written."""
        across, along = self._grid(leaf)
        size, entries = self.piece_shape(leaf)
        stored = np.ascontiguousarray(rows).view(leaf.stored_dtype)
        stored = stored.reshape(len(rows), leaf.length, *leaf.shape[1:])
        little = leaf.stored_dtype.newbyteorder("<")
        codec = self._codecs[leaf.name]
        shape = size, entries, *map(_at_least_one, leaf.shape[1:])

        def encode(number: int) -> Buffer:
            row, entry = divmod(number, along)
            block = stored[
                row * size : (row + 1) * size, entry * entries : (entry + 1) * entries
            ]
            if block.shape != shape:
                whole = np.zeros(shape, leaf.stored_dtype)
                whole[tuple(map(slice, block.shape))] = block
                block = whole
            block = np.ascontiguousarray(block, little)
            # The array itself where it can be, since fresh memory is dear.
            return (
                block.view(np.uint8).ravel() if codec is None else codec.encode(block)
            )

        def encode_share(share: range) -> list[Buffer]:
            bodies = [encode(number) for number in share]
            sums = [struct.pack("<I", self._crc32c(body)) for body in bodies]
            return list(chain.from_iterable(zip(bodies, sums, strict=True)))

        count = across * along
        # Some pieces to a task, since handing one over costs as much as encoding it; few
        # enough that their bytes stay in a core's own cache.
        step = max(1, min(8, count // 16))
        shares = [range(i, min(i + step, count)) for i in range(0, count, step)]
        sizes: list[int] = []
        # Threads help where a codec lets others run.
        spread = map if codec is None else pool.map
        for content in spread(encode_share, shares):
            sizes += [len(body) + 4 for body in content[::2]]
            yield from content
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

    def _checked(
        self,
        content: bytes,
        leaf: Leaf,
        part: int,
        begin: int = 0,
        end: int | None = None,
    ) -> bytes:
        """What lies there without its checksum, which it is compared with."""
        end = len(content) if end is None else end
        body = content[begin : end - 4]
        self._compare(body, content[end - 4 : end], leaf, part)
        return body

    def _compare(self, body: Buffer, expected: bytes, leaf: Leaf, part: int) -> None:
        if expected != struct.pack("<I", self._crc32c(body)):
            raise self._damaged(leaf, part)

    def _damaged(self, leaf: Leaf, part: int) -> CacheDamaged:
        start, stop = self.layout.rows(part)
        return CacheDamaged(
            f"Expected part {part} (rows {start} to {stop - 1}) as it was written, got "
            f"another checksum or length in {_shard(leaf, part)}. Call repair() to make "
            "the damaged parts again.",
            parts=[part],
        )

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
            compressors=_codec_chain(zarr, _codec_name(self.layout, leaf)),
            fill_value=0,
            # All shards in one folder, which is made durable once.
            chunk_key_encoding={"name": "default", "separator": "."},
            overwrite=True,
        )


def _runs(numbers: range, across: int, step: int) -> list[range]:
    """Numbers cut into runs of one shard each, of some steps at most."""
    runs, begin = [], numbers.start
    while begin < numbers.stop:
        end = min(begin + step, numbers.stop, (begin // across + 1) * across)
        runs.append(range(begin, end))
        begin = end
    return runs


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


def _codec_name(layout: Layout, leaf: Leaf) -> str | None:
    """The blosc codec of a leaf.

    By itself none for floating-point numbers: lz4 makes simulations in single precision
    9 to 19 % smaller, and writing them takes eight times as long
    (`benchmarks/data_codecs.py`). Integers and flags, such as masks, shrink.
    """
    if layout.compression != "auto":
        return layout.compression
    return "lz4" if np.dtype(leaf.dtype).kind in "biu" else None


def _codec(layout: Layout, leaf: Leaf) -> Any:
    name = _codec_name(layout, leaf)
    if name is None:
        return None
    # Importing zarr's codec tells blosc to leave threads to us.
    load("zarr.codecs")
    return load("numcodecs.blosc").Blosc(name, clevel=1, shuffle=1)


def _codec_chain(zarr: Any, name: str | None) -> list[Any]:
    codecs = [] if name is None else [
        zarr.codecs.BloscCodec(cname=name, clevel=1, shuffle="shuffle")
    ]  # fmt: skip
    return [*codecs, zarr.codecs.Crc32cCodec()]


def _shard(leaf: Leaf, part: int) -> str:
    return f"{_FOLDER}/{leaf.name}/c.{'.'.join([str(part), *['0'] * len(leaf.shape)])}"


def _at_least_one(n: int) -> int:
    return max(n, 1)
