"""Training data that exist: patches of the arrays that a catalog names."""

import collections
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._tree import check_count
from trainax_pk.data._catalog_arrays import Variable, fingerprint, open_variable
from trainax_pk.data._catalog_patches import AbstractPatches
from trainax_pk.data._catalog_table import Catalog, Row
from trainax_pk.data._hash import hash_content
from trainax_pk.data._simulation_keys import SPLITS
from trainax_pk.data._simulation_plan import as_rows

# Files that are kept open.
_OPEN_FILES = 16


class CatalogDataset:
    """Pairs (x, y) of patches of the arrays that a catalog's rows name.

    A patch is cut out of every variable at the same place; `preprocess(patch) -> x` is
    what inference runs too (`dataset.preprocess`), `target_op(patch, row) -> y` the
    label. Item i is patch i mod P of row i // P, with P patches per row. Only the
    blocks that a patch lies in are read.

    Whole rows belong to a split: by a column "split" of the catalog if it has one, else
    in shares of a shuffle by `seed`.

    Attributes:
        catalog: The table.
        preprocess: `{variable: patch} -> x`.
        target_op: `({variable: patch}, row) -> y`.
        sampler: Where patches lie, or None for whole arrays.
        split: "train", "val", "test", or None for all rows.
        num_patches: Patches of a row.

    Example:
        >>> import tempfile, pathlib
        >>> import numpy as np
        >>> import trainax_pk as tx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(pathlib.Path(folder, "a.npz"), t=np.ones((6, 8)))
        ...     dataset = tx.data.CatalogDataset(
        ...         tx.data.Catalog([{"path": "a.npz"}], root=folder), ["t"],
        ...         preprocess=lambda patch: patch["t"] - 1.0,
        ...         target_op=lambda patch, row: patch["t"].mean(),
        ...         sampler=tx.data.RegularPatches((3, 4)),
        ...     )
        ...     x, y = dataset[:]
        >>> x.shape, y.shape
        ((4, 3, 4), (4,))
    """

    def __init__(
        self,
        catalog: Catalog | Any,
        variables: Sequence[str],
        preprocess: Callable[[Mapping[str, np.ndarray]], PyTree[Any]],
        target_op: Callable[[Mapping[str, np.ndarray], Row], PyTree[Any]],
        sampler: AbstractPatches | None = None,
        *,
        split: str | None = None,
        shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> None:
        """Opens every file for its shape; reads no data.

        Args:
            catalog: A `Catalog`, or what it takes as table.
            variables: Arrays of a row's file.
            preprocess: `{variable: patch} -> x`.
            target_op: `({variable: patch}, row) -> y`.
            sampler: Patches over the trailing axes, or None for whole arrays.
            split: Rows of one split only.
            shares: Of train, val and test, where the catalog has no column "split".
            seed: Of the shuffle of rows.

        Raises:
            ValueError: A row whose file is missing, lacks a variable, or has another
                shape or dtype than the first row's (the row is named); patches that do
                not fit; a bad option.
        """
        self.catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
        self.variables = tuple(variables)
        for name, value in (("preprocess", preprocess), ("target_op", target_op)):
            if not callable(value):
                raise ValueError(
                    f"Expected `{name}` to be callable, got {value!r}. Pass a function."
                )
        self.preprocess, self.target_op, self.sampler = preprocess, target_op, sampler
        self._seed = check_count("seed", seed, minimum=0)
        self._shares = _check_shares(shares)
        self._files: collections.OrderedDict[int, dict[str, Variable]] = (
            collections.OrderedDict()
        )
        self._stamps: dict[int, tuple[int, int]] = {}
        if not self.variables:
            raise ValueError("Expected `variables` to name arrays, got none.")
        self._shapes = self._check_rows()
        axes = self._trailing()
        self.num_patches = 1 if sampler is None else sampler.num_patches(axes)
        self._set_split(split)

    def __len__(self) -> int:
        return len(self._rows) * self.num_patches

    def __getitem__(self, indices: Any) -> tuple[PyTree[Any], PyTree[Any]]:
        """Pairs of an index, a slice or an integer array."""
        rows = as_rows(indices, len(self))
        if isinstance(indices, (int, np.integer)):
            return self._item(int(rows[0]))
        items = [self._item(int(i)) for i in rows] or [self._item(0)]
        stacked = jax.tree.map(lambda *x: np.stack([np.asarray(a) for a in x]), *items)
        return jax.tree.map(lambda x: x[: len(rows)], stacked)

    def __iter__(self) -> Iterator[tuple[PyTree[Any], PyTree[Any]]]:
        return (self._item(i) for i in range(len(self)))

    def row(self, i: int) -> Row:
        """The catalog's row that item i is cut from."""
        return self.catalog[int(self._rows[i // self.num_patches])]

    def with_split(self, split: str | None) -> "CatalogDataset":
        """The rows of another split.

        Args:
            split: "train", "val", "test", or None for all.

        Returns:
            A dataset that shares no row with the others.
        """
        other = copy.copy(self)
        other._set_split(split)
        return other

    def content_hash(self) -> str:
        """SHA-256 of rows, query, files (sizes and checksums), patches and code.

        Reads every file once. From then on, a file that is changed is refused.
        """
        paths = {int(i): self.catalog.path(int(i)) for i in self._rows}
        self._stamps |= {i: _stamp(path) for i, path in paths.items()}
        files = [fingerprint(path) for path in paths.values()]
        rows = [self.catalog[int(i)] for i in self._rows]
        return hash_content(
            "CatalogDataset",
            rows,
            self.catalog.query,
            files,
            self.variables,
            self.preprocess,
            self.target_op,
            self.sampler,
            # Places of random patches depend on the numbers of the rows.
            self._rows,
        )

    def _check_rows(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        first: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for i, row in enumerate(self.catalog):
            for name, variable in self._open(i).items():
                found = variable.shape, variable.dtype
                if first.setdefault(name, found) != found:
                    raise ValueError(
                        f"Expected {name!r} of {_name(i, row)} like that of row 0, "
                        f"{_spell(first[name])}, got {_spell(found)}. Leave the row out "
                        "by a query, or bring it to one grid."
                    )
        return first

    def _open(self, i: int) -> dict[str, Variable]:
        if i in self._files:
            self._files.move_to_end(i)
            return self._files[i]
        try:
            path = self.catalog.path(i)
            opened = {name: open_variable(path, name) for name in self.variables}
        except (OSError, KeyError, ValueError) as error:
            text = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(
                f"Expected {_name(i, self.catalog[i])} to name a file with the variables "
                f"{list(self.variables)}, got: {text}. Correct the catalog, or leave the "
                "row out by a query."
            ) from error
        self._files[i] = opened
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return opened

    def _trailing(self) -> tuple[int, ...]:
        """Lengths of the axes that patches are cut along."""
        if self.sampler is None:
            return ()
        count = len(self.sampler.size)
        tails = {name: shape[-count:] for name, (shape, _) in self._shapes.items()}
        if len(set(tails.values())) != 1 or min(map(len, tails.values())) < count:
            raise ValueError(
                f"Expected variables with the same {count} trailing axes, which patches "
                f"are cut along, got {tails}. Pass variables of one grid."
            )
        return next(iter(tails.values()))

    def _item(self, i: int) -> tuple[PyTree[Any], PyTree[Any]]:
        number, patch = divmod(i, self.num_patches)
        row = int(self._rows[number])
        blocks = {n: self._cut(v, row, patch) for n, v in self._open(row).items()}
        if row in self._stamps and _stamp(self.catalog.path(row)) != self._stamps[row]:
            raise ValueError(
                f"Expected the file of {_name(row, self.catalog[row])} as it was when "
                "content_hash() read it, got a changed one. Build the dataset again."
            )
        return self.preprocess(blocks), self.target_op(blocks, self.catalog[row])

    def _cut(self, variable: Variable, row: int, patch: int) -> np.ndarray:
        if self.sampler is None:
            return variable.read((slice(None),) * len(variable.shape))
        count = len(self.sampler.size)
        axes = variable.shape[-count:]
        start = self.sampler.start(axes, row, patch)
        indices = self.sampler.indices(axes, start)
        # The hull is read; where a patch wraps around that is the whole axis.
        hull = tuple(slice(int(x.min()), int(x.max()) + 1) for x in indices)
        rest = (slice(None),) * (len(variable.shape) - count)
        block = variable.read((*rest, *hull))
        for axis, (entries, part) in enumerate(zip(indices, hull, strict=True)):
            block = np.take(block, entries - part.start, axis=len(rest) + axis)
        return block

    def _set_split(self, split: str | None) -> None:
        if split not in (None, *SPLITS):
            raise ValueError(
                f"Expected `split` to be None or one of {SPLITS}, got {split!r}."
            )
        self.split = split
        count = len(self.catalog)
        if split is None:
            self._rows = np.arange(count)
        elif "split" in self.catalog[0]:
            named = [row["split"] == split for row in self.catalog]
            self._rows = np.flatnonzero(named)
        else:
            shuffled = np.random.default_rng(self._seed).permutation(count)
            bounds = np.rint(np.cumsum(self._shares) * count).astype(int)
            parts = np.split(shuffled, bounds[:-1])
            self._rows = np.sort(parts[SPLITS.index(split)])
        if not len(self._rows):
            raise ValueError(
                f"Expected rows in the split {split!r}, got none of {count}. Pass other "
                "shares, or more rows."
            )


def _check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(
            f"Expected `shares` to be three fractions >= 0 with sum 1, got {shares!r}."
        )
    return tuple(float(s) for s in shares)


def _stamp(path: str | Path) -> tuple[int, int]:
    """What changes with a file; of a folder, with the files in it that are replaced."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _name(i: int, row: Row) -> str:
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in row.items()}
    return f"row {i} {shown}"


def _spell(found: tuple[tuple[int, ...], np.dtype]) -> str:
    shape, dtype = found
    return f"{dtype}{list(shape)}"
