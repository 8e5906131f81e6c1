"""A lock file that one process holds."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# How often a file is opened anew that is not the one at its path.
_TRIES = 10


class Lock:
    """A lock file that this process holds; `hold_lock` makes them."""

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        self._path = path
        self._what, self._remedy = what, remedy
        # A process may hold locks at a path in turn; in containers, all of them are 1.
        self._holder = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "token": uuid.uuid4().hex,
            }
        )
        self._compares = True
        self._descriptor: int | None = None
        self._renewing = threading.Lock()

    def take(self, timeout: float) -> None:
        """Takes it, or raises TimeoutError."""
        end = time.monotonic() + timeout
        tries = itertools.count(1)
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._acquire(descriptor, end)
                # Whoever waited may hold a file that was removed meanwhile; some file
                # systems, though, number an open file otherwise than one at a path.
                is_at = _is_at(descriptor, self._path)
                if is_at or next(tries) == _TRIES:
                    self._compares = is_at
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._holder.encode(), 0)
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def renew(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Takes it anew where its file was removed: that lock holds nobody up any more.

        Args:
            prepare: Called before, to make the folder again.

        Raises:
            TimeoutError: Another lock was faster, even if it has been let go of since.
        """
        with self._renewing:
            held = self._descriptor if self._compares else None
            if held is not None and not _is_at(held, self._path):
                prepare()
                self._take_again()

    def _take_again(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = self._path.read_text(encoding="utf-8", errors="replace")
            # Where the disk is full, a file is made that stays empty.
            if found not in ("", self._holder):
                raise TimeoutError(self._message(found))
        held, self._descriptor = self._descriptor, None
        try:
            self.take(0.0)
        finally:
            # Without another, the old one is let go of in the end.
            if self._descriptor is None:
                self._descriptor = held
            else:
                os.close(held)

    def release(self) -> None:
        """Lets go of it."""
        if self._descriptor is None:
            return
        # Closing alone would leave it to a child that was forked meanwhile.
        if fcntl is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    def _acquire(self, descriptor: int, end: float) -> None:
        if fcntl is None:
            raise OSError(
                "no lock of this system ends with its process; write where fcntl is "
                "available"
            )
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
                    raise TimeoutError(self._message(holder)) from None
                time.sleep(0.05)

    def _message(self, holder: str) -> str:
        return (
            f"Expected no other writer of {self._what}, got one that holds "
            f"{self._path}: {holder or 'unknown'}. {self._remedy}"
        )


@contextlib.contextmanager
def hold_lock(path: Path, timeout: float, what: str, remedy: str) -> Iterator[Lock]:
    """Holds a lock file that no second process can hold.

    The kernel lets go of it when the process ends, however it ends: a lock file that was
    left behind holds nobody up. Its content is for people, and tells whose it is where
    the file was removed and is there again.

    Args:
        path: The file; made where there is none, and left there.
        timeout: Seconds to wait for another holder.
        what: What is locked, for the message.
        remedy: What to do, for the message.

    Raises:
        TimeoutError: Another process holds it.
    """
    lock = Lock(path, what, remedy)
    lock.take(timeout)
    try:
        yield lock
    finally:
        lock.release()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
