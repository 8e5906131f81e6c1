"""Tables of records: rows of metadata that name arrays."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainax_pk._extras import load

Row = dict[str, Any]


class Catalog:
    """A table whose rows name files and say what is in them.

    Attributes:
        rows: The rows that pass the query, as dictionaries.
        query: What they passed, or None.

    Example:
        >>> from trainax_pk.data import Catalog
        >>> table = {"path": ["a.npz", "b.npz", "c.npz"], "year": [2001, 2002, 2003]}
        >>> catalog = Catalog(table, query={"year": (2002, 2010)})
        >>> [row["path"] for row in catalog]
        ['b.npz', 'c.npz']
    """

    def __init__(
        self,
        table: Any,
        *,
        query: Callable[[Row], bool] | Mapping[str, Any] | None = None,
        path_column: str = "path",
        root: Any = None,
    ) -> None:
        """Reads and filters the table.

        Args:
            table: Path of a parquet file (`trainax_pk[parquet]`) or CSV file; columns as
                a mapping; or a sequence of rows. Numbers of a CSV file are read as such,
                those of the column of paths excepted.
            query: `row -> bool`; or for some columns a value, a set of values, or a
                pair (least, greatest), all of which must hold.
            path_column: Column that names the file of a row.
            root: Folder that relative paths start from; None for that of the table's
                file, or the working directory.

        Raises:
            ValueError: Columns of different lengths, a column that is missing, no row
                that passes.
            FileNotFoundError: There is no such table.
        """
        rows = _read(table, path_column)
        columns = set(rows[0]) if rows else set()
        for name in (path_column, *(query if isinstance(query, Mapping) else ())):
            if name not in columns:
                raise ValueError(
                    f"Expected a column {name!r} in the catalog, got {sorted(columns)}. "
                    "Pass path_column=, or correct the query."
                )
        self.rows = tuple(row for row in rows if _passes(row, query))
        if not self.rows:
            raise ValueError(
                f"Expected rows that pass the query {query!r}, got none of {len(rows)}. "
                "Widen the query."
            )
        self.query = query
        self.path_column = path_column
        is_file = isinstance(table, str | Path)
        self.root = Path(root or (Path(table).parent if is_file else "."))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def path(self, i: int) -> Path:
        """File of a row."""
        return self.root / str(self.rows[i][self.path_column])


def _read(table: Any, path_column: str) -> list[Row]:
    if isinstance(table, str | Path):
        path = Path(table)
        if not path.exists():
            raise FileNotFoundError(
                f"Expected a catalog at {path}, got no such file. Pass an existing "
                "parquet or CSV file."
            )
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return [
                    {k: v if k == path_column else _number(v) for k, v in row.items()}
                    for row in csv.DictReader(file)
                ]
        return load("pyarrow.parquet", "parquet").read_table(path).to_pylist()
    if isinstance(table, Mapping):
        lengths = {len(column) for column in table.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"Expected columns of one length, got {sorted(lengths)}. Pass one value "
                "per row in every column."
            )
        return [{k: _plain(v[i]) for k, v in table.items()} for i in range(*lengths)]
    if isinstance(table, Sequence):
        return [{k: _plain(v) for k, v in row.items()} for row in table]
    raise ValueError(
        f"Expected a catalog, got {type(table).__name__}. Pass a path, a mapping of "
        "columns, or a list of rows."
    )


def _passes(row: Row, query: Any) -> bool:
    if query is None:
        return True
    if callable(query):
        return bool(query(row))
    return all(_matches(row[name], wanted) for name, wanted in query.items())


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        low, high = wanted
        return low <= value <= high
    if isinstance(wanted, set | frozenset | list):
        return value in wanted
    return value == wanted


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
