"""Files that survive: durable writes, checksums and sealed notes."""

import abc
import contextlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainax_pk._lock import hold_lock

_PIECE = 2**22
# Pieces of a file that are written by one call.
_GATHERED = 32
Checksum = Callable[[bytes, int], int]


class AbstractFiles(abc.ABC):
    """A folder of named files, local or remote. Names are relative, with slashes.

    To add one: implement the abstract methods. `write` must be atomic: a reader sees
    the old content or the new one.

    Attributes:
        crc: `(bytes, checksum so far) -> checksum`, what files are compared by.
    """

    crc: Checksum

    @abc.abstractmethod
    def url(self, name: str) -> str:
        """Where a file is, in a form that the formats' libraries take."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""

    @abc.abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Bytes of a file from `start` on, counted from its end if negative."""

    @abc.abstractmethod
    def read_into(self, name: str, start: int, buffers: list[Any]) -> int:
        """Fills arrays of bytes, one after another, with a file's bytes from `start` on.

        Returns how many there were: fewer than there is room for where the file ends.
        """

    @abc.abstractmethod
    def write(
        self, name: str, content: bytes | Iterable[bytes], *, durable: bool = True
    ) -> None:
        """Writes a file whole, from its content or from the pieces of it.

        Unless it is `durable`, a loss of power may take it until it is settled; the end
        of a process never does.
        """

    @abc.abstractmethod
    def hasten(self, names: list[str]) -> None:
        """Begins to make files durable, and waits for nothing."""

    @abc.abstractmethod
    def settle(self, names: list[str]) -> None:
        """Makes files durable that another library has written."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""

    @abc.abstractmethod
    def checksum(self, name: str) -> int:
        """`crc` of a file's bytes."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """All files, sorted."""

    @abc.abstractmethod
    def make(self) -> None:
        """Makes the folder."""

    @abc.abstractmethod
    def remove(self, name: str = "", *, last: str = "") -> None:
        """Removes a file or folder, or all of it: at once, or the file `last` last."""

    @abc.abstractmethod
    def locked(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Holds the folder against other writers. Raises TimeoutError."""


class LocalFiles(AbstractFiles):
    """A folder of this machine, or of a file system that is mounted here."""

    def __init__(self, root: Path, crc: Checksum = zlib.crc32) -> None:
        self.root = root
        self.crc = crc
        self._prefix = f"{root}{os.sep}"

    def url(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        # Thousands of these a second: no file object, no Path.
        descriptor = os.open(f"{self._prefix}{name}", os.O_RDONLY)
        try:
            if start < 0:
                start += os.fstat(descriptor).st_size
            return os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)

    def read_into(self, name: str, start: int, buffers: list[Any]) -> int:
        if not hasattr(os, "preadv"):  # Windows
            length = sum(map(len, buffers))
            return scatter(self.read_range(name, start, length), buffers)
        descriptor = os.open(f"{self._prefix}{name}", os.O_RDONLY)
        try:
            return os.preadv(descriptor, buffers, start)
        finally:
            os.close(descriptor)

    def write(
        self, name: str, content: bytes | Iterable[bytes], *, durable: bool = True
    ) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb", buffering=0) as file:
                if isinstance(content, bytes):
                    _write_all(file.fileno(), [content])
                else:
                    _write_pieces(file.fileno(), iter(content))
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)

    def hasten(self, names: list[str]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            descriptor = os.open(self.root / name, os.O_RDONLY)
            try:
                # Pages that are to be dropped are written first.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

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
            sync_folder(folder)

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def checksum(self, name: str) -> int:
        value = 0
        with (self.root / name).open("rb") as file:
            while piece := file.read(_PIECE):
                value = self.crc(piece, value)
        return value

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        paths = (p for p in self.root.rglob("*") if p.is_file())
        return sorted(p.relative_to(self.root).as_posix() for p in paths)

    def make(self) -> None:
        make_folder(self.root)

    def remove(self, name: str = "", *, last: str = "") -> None:
        del last
        if not name:
            self._remove_all()
            return
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        else:
            return
        sync_folder(path.parent)

    def _remove_all(self) -> None:
        # Away in one step: what is half removed could be told from nothing else.
        gone = self._gone()
        if gone.exists():
            shutil.rmtree(gone)
        if self.root.exists():
            os.replace(self.root, gone)
            sync_folder(gone.parent)
            shutil.rmtree(gone)

    def _gone(self) -> Path:
        return self.root.with_name(f".{self.root.name}.removed")

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        # Beside the folder, so that removing the folder does not remove a held lock.
        path = self.root.with_name(f"{self.root.name}.lock")
        make_folder(path.parent)
        with hold_lock(
            path, timeout, self.root.name, "Wait for it (lock_timeout=), or end it."
        ):
            if self._gone().exists():  # left by a process that was killed
                shutil.rmtree(self._gone())
            yield


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably."""
    if folder.is_dir():
        return
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder durable: those that came, and those that went."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(value: dict[str, Any]) -> bytes:
    """JSON in one canonical form, with a checksum of the rest."""
    body = _canonical(value)
    return _canonical({**value, "checksum": f"{zlib.crc32(body):08x}"})


def unseal(content: bytes) -> dict[str, Any] | None:
    """What `seal` was given, or None if a single byte differs."""
    try:
        value = json.loads(content)
        value.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    # Bytes, not values: JSON has several spellings of one value.
    return value if seal(value) == content else None


def scatter(content: bytes, buffers: list[Any]) -> int:
    """Fills arrays of bytes, one after another; returns how many bytes there were."""
    at = 0
    for buffer in buffers:
        piece = content[at : at + len(buffer)]
        memoryview(buffer)[: len(piece)] = piece
        at += len(piece)
    return at


def _write_joined(descriptor: int, group: list[bytes]) -> int:
    return os.write(descriptor, b"".join(group))


_writev = getattr(os, "writev", _write_joined)  # not on Windows


def _write_pieces(descriptor: int, pieces: Iterator[bytes]) -> None:
    """Writes pieces one after another, many by one call and without joining them.

    While the kernel writes some, the next are made by another thread.
    """

    def take() -> list[bytes]:
        return list(itertools.islice(pieces, _GATHERED))

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(take)
        while group := coming.result():
            coming = ahead.submit(take)
            _write_all(descriptor, group)


def _write_all(descriptor: int, group: list[bytes]) -> None:
    written = _writev(descriptor, group)
    if written < sum(map(len, group)):
        # A disk that fills up takes a part, and tells why at the next call.
        rest = memoryview(b"".join(group))[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def read_sealed(files: AbstractFiles, name: str) -> dict[str, Any] | None:
    """Content of a sealed file, None if there is none or it is damaged."""
    try:
        return unseal(files.read(name))
    except FileNotFoundError:
        return None


def fingerprints(files: AbstractFiles, names: list[str]) -> dict[str, list[int]]:
    """Size and checksum of files, as they lie there."""
    return {name: [files.size(name), files.checksum(name)] for name in names}


def write_counted(
    files: AbstractFiles, name: str, pieces: Iterable[bytes]
) -> dict[str, list[int]]:
    """Writes a file that is settled later; its fingerprint, without reading it again."""
    size = value = 0

    def counted() -> Iterator[bytes]:
        nonlocal size, value
        for piece in pieces:
            size, value = size + len(piece), files.crc(piece, value)
            yield piece

    files.write(name, counted(), durable=False)
    return {name: [size, value]}


def find_damage(
    files: AbstractFiles, expected: dict[str, list[int]], *, full: bool
) -> str | None:
    """The first file that is not as it was written, and how; None if all are.

    Without `full` sizes alone are compared.
    """
    return next(find_damages(files, expected, full=full), None)


def find_damages(
    files: AbstractFiles, expected: dict[str, list[int]], *, full: bool
) -> Iterator[str]:
    """Every file that is not as it was written, and how."""
    for name, (size, checksum) in expected.items():
        found = files.size(name)
        if found is None:
            yield f"{name} is missing"
        elif found != size:
            yield f"{name} has {found} bytes, {size} were written"
        elif full and files.checksum(name) != checksum:
            yield f"{name} has another checksum than what was written"


def _canonical(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
