"""Files of a cache: durable writes, checksums, and the lock against a second writer."""

import abc
import contextlib
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainax_pk.data._extras import load

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PIECE = 2**22


class AbstractFiles(abc.ABC):
    """A folder of named files, local or remote. Names are relative, with slashes.

    To add one: implement the abstract methods. `write` must be atomic: a reader sees
    the old content or the new one.
    """

    @abc.abstractmethod
    def url(self, name: str) -> str:
        """Where a file is, in a form that the formats' libraries take."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""

    @abc.abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole, durably."""

    @abc.abstractmethod
    def settle(self, names: list[str]) -> None:
        """Makes files durable that another library has written."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""

    @abc.abstractmethod
    def checksum(self, name: str) -> int:
        """CRC-32 of a file's bytes."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """All files, sorted."""

    @abc.abstractmethod
    def make(self) -> None:
        """Makes the folder."""

    @abc.abstractmethod
    def remove(self, name: str = "") -> None:
        """Removes a file or folder, or all of it."""

    @abc.abstractmethod
    def locked(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Holds the folder against other writers. Raises TimeoutError."""


class LocalFiles(AbstractFiles):
    """A folder of this machine, or of a file system that is mounted here."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def settle(self, names: list[str]) -> None:
        folders = set()
        for name in names:
            path = self.root / name
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folders.update(p for p in path.parents if p.is_relative_to(self.root))
        for folder in sorted(folders):
            _sync_folder(folder)

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def checksum(self, name: str) -> int:
        value = 0
        with (self.root / name).open("rb") as file:
            while piece := file.read(_PIECE):
                value = zlib.crc32(piece, value)
        return value

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        paths = (p for p in self.root.rglob("*") if p.is_file())
        return sorted(p.relative_to(self.root).as_posix() for p in paths)

    def make(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def remove(self, name: str = "") -> None:
        path = self.root / name if name else self.root
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            _sync_folder(path.parent)

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        # Beside the folder, so that removing the folder does not remove a held lock.
        path = self.root.with_name(f"{self.root.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        # The kernel lets go of it when the process ends, however it ends: a lock file
        # that was left behind holds nobody up. Its content is for people.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _acquire(descriptor, path, timeout)
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)


class RemoteFiles(AbstractFiles):
    """A folder of an object store by fsspec URL (s3://, gs://, memory://, ...).

    Objects appear whole or not at all, which makes writes atomic; there is no lock, so
    one writer at a time is the caller's duty.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._fs, self._root = load("fsspec", "remote").core.url_to_fs(self._url)

    def url(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(self._path(name), content)

    def settle(self, names: list[str]) -> None:
        del names

    def size(self, name: str) -> int | None:
        try:
            self._fs.invalidate_cache()
            return self._fs.size(self._path(name))
        except FileNotFoundError:
            return None

    def checksum(self, name: str) -> int:
        return zlib.crc32(self.read(name))

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root)
        except FileNotFoundError:
            return []
        root = self._root.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in found)

    def make(self) -> None:
        self._fs.makedirs(self._root, exist_ok=True)

    def remove(self, name: str = "") -> None:
        path = self._path(name) if name else self._root
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        del timeout
        yield

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def open_files(cache_dir: Any, entry: str) -> AbstractFiles:
    """The folder of one entry below a path or URL."""
    text = os.fspath(cache_dir) if not isinstance(cache_dir, str) else cache_dir
    if "://" in text:
        return RemoteFiles(f"{text.rstrip('/')}/{entry}")
    return LocalFiles(Path(text).expanduser() / entry)


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    if fcntl is None:
        raise OSError(
            "no lock of this system ends with its process; write the cache where "
            "fcntl is available"
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
                    f"Expected no other writer of {path.stem}, got one that holds "
                    f"{path}: {holder or 'unknown'}. Wait for it (lock_timeout=), or "
                    "end that process."
                ) from None
            time.sleep(0.05)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
