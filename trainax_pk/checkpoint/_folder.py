"""The folder of a run: where one may lie, who holds it, and what happened in it."""

import contextlib
import datetime
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainax_pk._files import make_folder
from trainax_pk._lock import Lock, hold_lock
from trainax_pk.checkpoint._writer import SaveFailed

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
LOCK = "lock"
CHECKPOINTS = "checkpoints"


def check_place(name: str, folder: Any) -> Path:
    """The path of a folder that is a run's, or that could be made.

    Args:
        name: Of the argument, for messages.
        folder: What was passed.

    Raises:
        ValueError: No path, or one at or above which something else lies.
    """
    path = check_path(name, folder)
    if set(str(path)) & set("[]*?"):
        raise ValueError(
            f"Expected `{name}` without the signs [ ] * ?, which the library that writes "
            f"arrays takes for patterns, got {str(path)!r}. Rename it."
        )
    for needed in (path, path / CHECKPOINTS):
        above = (p for p in (needed, *needed.parents) if os.path.lexists(p))
        taken = next(above, needed)
        if taken.exists() and not taken.is_dir():
            raise ValueError(
                f"Expected `{name}` to be a folder or a place for one, got {path}, where "
                f"{taken} is a file. Name another one, or move that file away."
            )
    for file in (EVENTS, METRICS, LOCK):
        if (path / file).is_dir():
            raise ValueError(
                f"Expected `{name}` to be a folder of a run, got {path}, where {file} is "
                "a folder. Name another one, or move that folder away."
            )
    return path


def check_path(name: str, folder: Any) -> Path:
    """An absolute path from what was passed, or a ValueError."""
    text = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    # Of nothing, pathlib makes the working directory.
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(
            f"Expected `{name}` to be the path of a folder, got {folder!r}. Pass a "
            "string or a Path such as 'runs/first'; '.' is the working directory."
        )
    return Path(os.path.expanduser(text)).absolute()


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[Lock]:
    """Makes the folder of a run and holds it, for this process alone.

    Raises:
        OSError: It cannot be written to.
        TimeoutError: Another process holds it.
    """
    _make(folder)
    what = f"the run directory {folder}"
    remedy = "Wait for that process or end it, or train in another run_dir."
    with hold_lock(folder / LOCK, 0.0, what, remedy) as lock:
        yield lock


def keep_hold(folder: Path, lock: Lock, done: int) -> None:
    """Takes the lock anew where somebody has removed the folder of a run under way.

    Args:
        folder: The run directory; made again.
        lock: Its lock.
        done: Number of updates done.

    Raises:
        SaveFailed: Another process has begun there meanwhile, to which it belongs now.
    """
    try:
        lock.renew(lambda: make_folder(folder))
    except OSError as error:
        if not isinstance(error, TimeoutError) or error.errno is not None:
            # The file system's: whatever writes there next tells of it.
            return
        raise SaveFailed(
            f"Expected the run in {folder} to keep its folder, got that it was removed "
            f"before {done} updates were done, and another process has begun there. "
            f"{error} The model is this exception's `model`.",
            done,
        ) from error


def note_event(folder: Path, event: str, step: int, **values: Any) -> None:
    """Appends a line to the events of a run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event, "step": step, **values})
    try:
        make_folder(folder)
        with (folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        warnings.warn(
            f"{folder / EVENTS} cannot be written to ({error}); it lacks {line}",
            RuntimeWarning,
            stacklevel=4,
        )


def _make(folder: Path) -> None:
    remedy = (
        "Name a run_dir that can be written to; tx.checkpoint.load_model reads the model "
        "of a run that cannot."
    )
    try:
        make_folder(folder)
    except OSError as error:
        raise type(error)(
            f"Expected a `run_dir` that can be made, got {folder} ({error}). {remedy}"
        ) from error
    kept = [folder / name for name in (CHECKPOINTS, LOCK, EVENTS, METRICS)]
    for path in (folder, *(p for p in kept if p.exists())):
        if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            raise PermissionError(
                f"Expected a `run_dir` that can be written to, got {folder}, where "
                f"{path} cannot. {remedy}"
            )
