"""What a cache says about itself, and how that is checked."""

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

# 3: files are compared by CRC-32C.
SCHEMA = 3
HEADER = "header.json"
METADATA = "metadata.json"
MANIFEST = "manifest.json"
LEDGER = "ledger"
# Lies there from before the manifest until the ledger is gone.
FINISHING = "finishing"


class CacheDamaged(RuntimeError):
    """Stored data are not what was written.

    Attributes:
        parts: Numbers of the damaged parts; empty if the manifest itself is.

    Example:
        >>> from trainax_pk.data import CacheDamaged
        >>> CacheDamaged("part 3 is damaged", parts=[3]).parts
        [3]
    """

    def __init__(self, message: str, *, parts: list[int]) -> None:
        super().__init__(message)
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        # Left to itself, pickle would call the class with the message alone.
        make = functools.partial(type(self), parts=self.parts)
        return make, self.args, self.__dict__


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a row.

    Attributes:
        name: Name in the store, of letters, digits, "_" and ".".
        shape: Shape of a row.
        dtype: Name of its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def length(self) -> int:
        """Entries along the first axis of a row: the times of a trajectory."""
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        """Entries of a row."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def stored_dtype(self) -> np.dtype:
        """A dtype that every format knows: bfloat16 and its like travel as integers."""
        dtype = np.dtype(self.dtype)
        return dtype if dtype.kind in "biufc" else np.dtype(f"uint{8 * dtype.itemsize}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is stored and how, fixed when a cache is begun.

    Attributes:
        content_hash: Of the source.
        format: "zarr", "parquet" or "tfrecord".
        num_samples: Rows.
        part_size: Rows of a part; the last one may be shorter.
        compression: Name of the codec, or None.
        leaves: Arrays of a row.
    """

    content_hash: str
    format: str
    num_samples: int
    part_size: int
    compression: str | None
    leaves: tuple[Leaf, ...]

    @property
    def num_parts(self) -> int:
        """Parts, the last one included."""
        return -(-self.num_samples // self.part_size)

    def rows(self, part: int) -> tuple[int, int]:
        """First row of a part, and the one after its last."""
        start = part * self.part_size
        return start, min(start + self.part_size, self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": SCHEMA, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Layout":
        """From what `to_json` gave."""
        fields = {k: v for k, v in value.items() if k != "schema"}
        leaves = [
            Leaf(x["name"], tuple(x["shape"]), x["dtype"]) for x in value["leaves"]
        ]
        return Layout(**{**fields, "leaves": tuple(leaves)})


def make_leaves(spec: PyTree[Any]) -> tuple[Leaf, ...]:
    """Names, shapes and dtypes of the arrays of a row, in the order of the PyTree."""
    leaves, names = [], set()
    for path, x in jax.tree_util.tree_leaves_with_path(spec):
        text = jax.tree_util.keystr(path)
        # A pair is stored under the names of its halves.
        text = re.sub(r"^\[0\]", "params", text)
        text = re.sub(r"^\[1\]", "output", text)
        base = re.sub(r"[^A-Za-z0-9_]+", ".", text).strip(".") or "data"
        name = base
        for i in range(2, len(names) + 3):
            if name not in names:
                break
            name = f"{base}.{i}"
        names.add(name)
        leaves.append(Leaf(name, tuple(x.shape), np.dtype(x.dtype).name))
    return tuple(leaves)


def ledger_name(part: int) -> str:
    """File that says that a part is whole."""
    return f"{LEDGER}/{part:08d}.json"
