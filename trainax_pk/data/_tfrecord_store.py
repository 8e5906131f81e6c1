"""Parts as TFRecord files of `tf.train.Example`, readable by TensorFlow."""

import dataclasses
import functools
import struct

import numpy as np

from trainax_pk._extras import load
from trainax_pk._files import write_counted
from trainax_pk.data._cache_manifest import Leaf
from trainax_pk.data._cache_store import AbstractStore, Rows, take_by_part

_MASK_DELTA = 0xA282EAD8


class TFRecordStore(AbstractStore):
    """`part-<part>.tfrecord`: one `tf.train.Example` for each row.

    float32 leaves are a FloatList of the flattened entries; all others a BytesList with
    the row's little-endian bytes (`tf.io.decode_raw`). Records are framed as TensorFlow
    frames them, with masked CRC-32C of length and payload, which reading checks.

    Every row has the same length, so that record i of a file is found by arithmetic.
    """

    def create(self) -> list[str]:
        """Nothing beside the parts."""
        return []

    def write(self, part: int, rows: Rows) -> dict[str, list[int]]:
        """One file."""
        start, stop = self.layout.rows(part)
        content = encode(self.layout.leaves, rows, stop - start)
        return write_counted(self.files, _name(part), [content])

    def read(self, start: int, stop: int) -> Rows:
        """Rows of the parts that hold them."""
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> Rows:
        """Every part that holds a row is read once."""
        return take_by_part(self.layout, rows, self._read_part)

    def piece_shape(self, leaf: Leaf) -> tuple[int, int]:
        """A row."""
        return 1, max(leaf.length, 1)

    def read_piece(self, leaf: Leaf, row: int, entry: int) -> np.ndarray:
        """One record."""
        del entry
        part, i = divmod(row, self.layout.part_size)
        size = record_bytes(self.layout.leaves)
        content = self.files.read_range(_name(part), i * size, size)
        where = f"record {i} of {_name(part)}"
        values = decode(self.layout.leaves, content, 1, where)[leaf.name]
        return values.reshape(*self.piece_shape(leaf), *leaf.shape[1:])

    def _read_part(self, part: int) -> Rows:
        start, stop = self.layout.rows(part)
        content = self.files.read(_name(part))
        return decode(self.layout.leaves, content, stop - start, _name(part))


@dataclasses.dataclass(frozen=True)
class _Template:
    """One record's payload with zeros for values, and where the values go."""

    payload: bytes
    offsets: dict[str, int]


def encode(leaves: tuple[Leaf, ...], rows: Rows, count: int) -> bytes:
    """Framed records of `count` rows.

    Layout of a record: length (uint64), masked CRC-32C of it, payload, masked CRC-32C of
    the payload, all little-endian (tensorflow/core/lib/io/record_writer.h).
    """
    template = _template(leaves)
    size = len(template.payload)
    records = np.zeros((count, size + 16), np.uint8)
    length = struct.pack("<Q", size)
    head = length + struct.pack("<I", masked_crc32c(length))
    records[:, :12] = np.frombuffer(head, np.uint8)
    records[:, 12:-4] = np.frombuffer(template.payload, np.uint8)
    for leaf in leaves:
        at = 12 + template.offsets[leaf.name]
        values = _little(rows[leaf.name], leaf).reshape(count, leaf.nbytes)
        records[:, at : at + leaf.nbytes] = values
    checks = [masked_crc32c(row[12:-4].tobytes()) for row in records]
    records[:, -4:] = np.array(checks, "<u4").view(np.uint8).reshape(count, 4)
    return records.tobytes()


def record_bytes(leaves: tuple[Leaf, ...]) -> int:
    """Bytes of a framed record."""
    return len(_template(leaves).payload) + 16


def decode(leaves: tuple[Leaf, ...], content: bytes, count: int, where: str) -> Rows:
    """Rows of framed records.

    Raises:
        ValueError: A record that is not as `encode` makes it; it is named.
    """
    template = _template(leaves)
    size = record_bytes(leaves)
    if len(content) != count * size:
        raise ValueError(
            f"Expected {where} to hold {count} records of {size} bytes, got "
            f"{len(content)} bytes. Call verify(full=True), then repair()."
        )
    records = np.frombuffer(content, np.uint8).reshape(count, size)
    for i, row in enumerate(records):
        if struct.unpack("<I", row[-4:].tobytes())[0] != masked_crc32c(
            row[12:-4].tobytes()
        ):
            raise ValueError(
                f"Expected record {i} of {where} to match its CRC-32C, got another "
                "one. Call verify(full=True), then repair()."
            )
    out = {}
    for leaf in leaves:
        at = 12 + template.offsets[leaf.name]
        raw = np.ascontiguousarray(records[:, at : at + leaf.nbytes]).reshape(-1)
        stored = raw.view(leaf.stored_dtype.newbyteorder("<"))
        native = stored.astype(leaf.stored_dtype).view(np.dtype(leaf.dtype))
        out[leaf.name] = native.reshape(count, *leaf.shape)
    return out


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated by 15 bits and shifted, so that checksums of data that hold
    checksums are no trouble."""
    value = load("google_crc32c").value(data)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF


@functools.lru_cache(64)
def _template(leaves: tuple[Leaf, ...]) -> _Template:
    """`Example{features{feature{key, value}}}` in protobuf's wire format.

    A map is a repeated message of (key = 1, value = 2); a packed FloatList and a
    one-element BytesList are both "field 1, so many bytes".
    """
    entries, offsets = b"", {}
    for leaf in leaves:
        zeros = bytes(leaf.nbytes)
        kind = 2 if leaf.dtype == "float32" else 1
        feature = _field(kind, _field(1, zeros))
        entry = _field(1, leaf.name.encode()) + _field(2, feature)
        entries += _field(1, entry)
        # Values come last in every one of the nested messages.
        offsets[leaf.name] = len(entries) - leaf.nbytes
    payload = _field(1, entries)
    shift = len(payload) - len(entries)
    return _Template(payload, {name: at + shift for name, at in offsets.items()})


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field: tag, length as varint, content."""
    length, varint = len(content), b""
    while True:
        low, length = length & 0x7F, length >> 7
        varint += bytes([low | (0x80 if length else 0)])
        if not length:
            break
    return bytes([number << 3 | 2]) + varint + content


def _little(rows: np.ndarray, leaf: Leaf) -> np.ndarray:
    stored = np.ascontiguousarray(rows).view(leaf.stored_dtype)
    little = stored.astype(leaf.stored_dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8)


def _name(part: int) -> str:
    return f"part-{part:06d}.tfrecord"
