"""Metrics of a run, one line of JSON each, none twice."""

import bisect
import contextlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainax_pk._files import LocalFiles, make_folder, sync_folder
from trainax_pk.checkpoint._arrays import is_key

Line = tuple[int, dict[str, Any]]
# Larger results of callbacks are in the history and the checkpoints alone.
_LARGEST = 64


class MetricLog:
    """Appends to a file of JSON lines, in the order of steps.

    A line holds `step` and, every so many updates, the mean loss and gradient norm of
    the updates since the line before; or what a callback returned. Nothing in it depends
    on clocks or on how the run was cut into chunks: the file of a run that was killed
    and resumed is that of the run alone, byte for byte.

    Attributes:
        path: The file.
        every: Updates per line.
        done: Updates that were taken.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        listener: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            path: The file.
            every: Updates per line.
            listener: Told every line that is written, `(step, values)`.
        """
        self.path = path
        self.every = every
        self._listener = listener
        self._pending: list[tuple[int, str, Any]] = []
        self._unwritten: list[str] = []
        self._error: OSError | None = None
        self._tail: dict[str, np.ndarray] = {}
        self.done = 0

    def resume(self, done: int, series: dict[str, np.ndarray]) -> None:
        """Takes the file up at a step, and forgets what was written beyond it.

        Args:
            done: Number of updates done.
            series: What was recorded of all updates so far, by name, `(done,)`.
        """
        self.done, self._pending = done, []
        self._tail = {k: x[done - done % self.every :] for k, x in series.items()}
        make_folder(self.path.parent)
        self.path.touch()
        content = self.path.read_bytes()
        kept, damaged = _lines_up_to(content, done)
        if damaged:
            _tell(self.path, damaged)
        if content.startswith(kept):
            with self.path.open("r+b") as file:
                file.truncate(len(kept))
            sync_folder(self.path.parent)
        else:
            LocalFiles(self.path.parent).write(self.path.name, kept)

    def add_record(self, step: int, name: str, value: Any) -> None:
        """What a callback returned; written with the next chunk, when it is computed."""
        self._pending.append((step, name, value))

    def add_updates(self, series: dict[str, np.ndarray]) -> None:
        """What was recorded of the next updates, by name, `(count,)`."""
        lines = self._take_records()
        start = self.done - self.done % self.every
        if self._tail:
            series = {k: np.concatenate([self._tail[k], x]) for k, x in series.items()}
        length = len(next(iter(series.values())))
        whole = length - length % self.every
        means = {
            k: np.mean(x[:whole].reshape(-1, self.every), axis=1, dtype=np.float64)
            for k, x in series.items()
        }
        rows = zip(*(map(_number, x.tolist()) for x in means.values()), strict=True)
        for i, row in enumerate(rows):
            values = dict(zip(means, row, strict=True))
            lines.append((start + (i + 1) * self.every, values))
        self._tail = {k: x[whole:] for k, x in series.items()}
        self.done = start + length
        self._append(lines)

    def flush(self) -> None:
        """Writes what is pending."""
        self._append(self._take_records())

    def close(
        self, *, whole: bool, guard: Callable[[int], None] = lambda done: None
    ) -> None:
        """Writes what waits, and says what is lost.

        Args:
            whole: Whether what is pending belongs to it, too.
            guard: Called with the number of updates before that; an OSError it raises
                is why nothing is written.
        """
        self._append(self._take_records() if whole else [], ends=True, guard=guard)
        if self._unwritten:
            warnings.warn(
                f"{self.path} lacks its last {len(self._unwritten)} lines, which could "
                f"not be written until the end ({self._error}), and a run that goes on "
                "does not add them. Losses and results of callbacks are all in the "
                "history and in the checkpoints.",
                RuntimeWarning,
                stacklevel=5,
            )

    def settle(self) -> None:
        """Makes what was written durable."""
        # Somebody may have removed it.
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _take_records(self) -> list[Line]:
        pending, self._pending = self._pending, []
        lines = []
        for step, name, value in pending:
            values = _small_values(name, value)
            if values:
                lines.append((step, {"callback": name, **values}))
        return lines

    def _append(
        self,
        lines: list[Line],
        *,
        ends: bool = False,
        guard: Callable[[int], None] = lambda done: None,
    ) -> None:
        waited = bool(self._unwritten)
        self._unwritten += [json.dumps({"step": n, **values}) for n, values in lines]
        if self._unwritten:
            try:
                guard(self.done)
                self._write("\n".join(self._unwritten).encode() + b"\n")
                self._unwritten = []
            except OSError as error:
                self._error = error
                if not (waited or ends):
                    warnings.warn(
                        f"{self.path} cannot be written to ({error}). Training goes on; "
                        "the lines are kept, and written when that is possible.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
        if self._listener is not None:
            for step, values in lines:
                rest = {k: x for k, x in values.items() if k != "callback"}
                self._listener(step, rest)

    def _write(self, content: bytes) -> None:
        """Appends all of it or, where the disk is full, nothing."""
        make_folder(self.path.parent)
        with self.path.open("ab", buffering=0) as file:
            length = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(length)
                raise


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metric log; one that was torn at the end is left out.

    So is any other that is damaged, with a warning that names it.

    Args:
        path: The file, `metrics.jsonl` of a run directory.

    Returns:
        A dict for each line. Numbers that are not finite are None.

    Raises:
        FileNotFoundError: No such file.

    Example:
        >>> import pathlib, tempfile
        >>> from trainax_pk.checkpoint import read_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "metrics.jsonl")
        ...     _ = path.write_text('{"step": 100, "loss": 0.5}\\n{"step": 200, "lo')
        ...     read_metrics(path)
        [{'step': 100, 'loss': 0.5}]
    """
    # What follows the last line end is empty, or torn.
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    values = [_read_line(line) for line in lines]
    damaged = [i for i, value in enumerate(values, 1) if value is None]
    if damaged:
        _tell(Path(path), damaged)
    return [value for value in values if value is not None]


def _read_line(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None for one that is not what was written."""
    try:
        value = json.loads(line)
        name = value.get("callback", "")
        return value if isinstance(value["step"], int) and type(name) is str else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _lines_up_to(content: bytes, done: int) -> tuple[bytes, list[int]]:
    """The lines that a run at this step has behind it, and numbers of damaged ones."""
    kept, damaged, seen = [], [], set()
    lines = content.split(b"\n")[:-1]
    values = [_read_line(line) for line in lines]
    ascending = _longest_ascent(_without_copies(values))
    for i, (line, value) in enumerate(zip(lines, values, strict=True)):
        step = None if value is None else value["step"]
        if i not in ascending or (what := (step, value.get("callback"))) in seen:
            damaged.append(i + 1)
        # A callback at this very step runs again.
        elif step < done or (step == done and "callback" not in value):
            kept.append(line + b"\n")
            seen.add(what)
    return b"".join(kept), damaged


def _without_copies(values: list[dict[str, Any] | None]) -> list[int | None]:
    """Steps of lines; None for what is no line, or is there twice and out of place."""
    steps = [None if v is None else v["step"] for v in values]
    names = [None if v is None else (v["step"], v.get("callback")) for v in values]
    counts = Counter(names)

    def fits(i: int) -> bool:
        around = [steps[i - 1] if i else None, steps[i], *steps[i + 1 : i + 2]]
        known = [s for s in around if s is not None]
        return counts[names[i]] == 1 or known == sorted(known)

    return [s if s is not None and fits(i) else None for i, s in enumerate(steps)]


def _longest_ascent(steps: list[int | None]) -> set[int]:
    """Places of the longest part that does not descend: what lies off it is damaged."""
    ends: list[int] = []
    places: list[int] = []
    before: dict[int, int | None] = {}
    for i, step in enumerate(steps):
        if step is None:
            continue
        at = bisect.bisect_right(ends, step)
        before[i] = places[at - 1] if at else None
        ends[at : at + 1] = [step]
        places[at : at + 1] = [i]
    found, i = set(), places[-1] if places else None
    while i is not None:
        found.add(i)
        i = before[i]
    return found


def _tell(path: Path, damaged: list[int]) -> None:
    shown = ", ".join(map(str, damaged[:8])) + (", ..." if len(damaged) > 8 else "")
    which = f"lines {shown} are" if len(damaged) > 1 else f"line {shown} is"
    warnings.warn(
        f"{path}: {which} damaged, and left out; the others are kept, and checkpoints "
        "hold all losses and results.",
        RuntimeWarning,
        stacklevel=3,
    )


def _small_values(name: str, value: Any) -> dict[str, Any]:
    leaves = {
        name + jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(value)
        if isinstance(x, int | float | jax.Array | np.ndarray | np.generic)
    }
    if sum(np.size(x) for x in leaves.values()) > _LARGEST:
        return {}
    hosts = {path: np.asarray(x) for path, x in leaves.items() if not is_key(x)}
    return {
        path: jax.tree.map(_number, x.tolist())
        for path, x in hosts.items()
        if x.dtype.kind in "biuf"
    }


def _number(x: Any) -> Any:
    return x if not isinstance(x, float) or math.isfinite(x) else None
