"""A lock file that one process holds."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def hold_lock(path: Path, timeout: float, what: str, remedy: str) -> Iterator[None]:
    """Holds a lock file that no second process can hold.

    The kernel lets go of it when the process ends, however it ends: a lock file that was
    left behind holds nobody up. Its content is for people.

    Args:
        path: The file; made where there is none, and left there.
        timeout: Seconds to wait for another holder.
        what: What is locked, for the message.
        remedy: What to do, for the message.

    Raises:
        TimeoutError: Another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path, timeout, what, remedy)
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        # Closing alone would leave it to a child that was forked meanwhile.
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _acquire(
    descriptor: int, path: Path, timeout: float, what: str, remedy: str
) -> None:
    if fcntl is None:
        raise OSError(
            "no lock of this system ends with its process; write where fcntl is "
            "available"
        )
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
                raise TimeoutError(
                    f"Expected no other writer of {what}, got one that holds "
                    f"{path}: {holder or 'unknown'}. {remedy}"
                ) from None
            time.sleep(0.05)
