"""Where the files of a cache lie: on this machine, or in an object store."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainax_pk._extras import load
from trainax_pk._files import AbstractFiles, Checksum, LocalFiles, scatter


class RemoteFiles(AbstractFiles):
    """A folder of an object store by fsspec URL (s3://, gs://, memory://, ...).

    Objects appear whole or not at all, which makes writes atomic; there is no lock, so
    one writer at a time is the caller's duty.
    """

    def __init__(self, url: str, crc: Checksum) -> None:
        self.crc = crc
        self._url = url.rstrip("/")
        self._fs, self._root = load("fsspec", "remote").core.url_to_fs(self._url)

    def url(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        end = start + length or None
        return self._fs.cat_file(self._path(name), start=start, end=end)

    def read_into(self, name: str, start: int, buffers: list[Any]) -> int:
        length = sum(map(len, buffers))
        return scatter(self.read_range(name, start, length), buffers)

    def write(
        self, name: str, content: bytes | Iterable[bytes], *, durable: bool = True
    ) -> None:
        del durable
        whole = content if isinstance(content, bytes) else b"".join(content)
        self._fs.pipe_file(self._path(name), whole)

    def hasten(self, names: list[str]) -> None:
        del names

    def settle(self, names: list[str]) -> None:
        del names

    def size(self, name: str) -> int | None:
        try:
            self._fs.invalidate_cache()
            return self._fs.size(self._path(name))
        except FileNotFoundError:
            return None

    def checksum(self, name: str) -> int:
        return self.crc(self.read(name), 0)

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

    def remove(self, name: str = "", *, last: str = "") -> None:
        if last:
            tops = {found.split("/")[0] for found in self.names()}
            for top in sorted(tops - {last}):
                self.remove(top)
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
    """The folder of one entry below a path or URL; files are compared by CRC-32C."""
    # Processors have an instruction for it, which they lack for zlib's CRC-32.
    extend = load("google_crc32c").extend

    def crc(content: bytes, value: int) -> int:
        return extend(value, content)

    text = os.fspath(cache_dir) if not isinstance(cache_dir, str) else cache_dir
    if "://" in text:
        return RemoteFiles(f"{text.rstrip('/')}/{entry}", crc)
    return LocalFiles(Path(text).expanduser() / entry, crc)
