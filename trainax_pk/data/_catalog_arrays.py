"""Arrays in files, read slice by slice: zarr, netCDF, npz and npy."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainax_pk._extras import load

_PIECE = 2**22


def open_variable(path: str | Path, variable: str) -> "Variable":
    """One array of a file, by the file's ending.

    Raises:
        FileNotFoundError: There is no such file.
        KeyError: The file has no such variable.
        ValueError: An ending that is not known.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".npz":
        return _open_npz(path, variable)
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        return Variable(array.shape, array.dtype, array)
    if path.suffix == ".zarr" or path.is_dir():
        group = load("zarr").open(str(path), mode="r")
        array = group[variable] if hasattr(group, "keys") else group
        return Variable(tuple(array.shape), np.dtype(array.dtype), array)
    if path.suffix in (".nc", ".nc4", ".h5", ".hdf5"):
        return _open_netcdf(path, variable)
    raise ValueError(
        f"{path.name} has an ending that is not known; expected .zarr, .nc, .npz or .npy"
    )


class Variable:
    """Shape, dtype, and slices on demand.

    Attributes:
        shape: Of the array.
        dtype: Of what `read` returns.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, array: Any) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self._array = array

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """A block, in memory."""
        return np.asarray(self._array[slices]).astype(self.dtype, copy=False)


def fingerprint(path: str | Path) -> list[tuple[str, int, int]]:
    """Name, size and CRC-32 of a file, or of every file of a folder."""
    path = Path(path)
    folder = path.is_dir()
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if folder else [path]
    found = []
    for file in paths:
        value = 0
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                value = zlib.crc32(piece, value)
        name = file.relative_to(path).as_posix() if folder else ""
        found.append((name, file.stat().st_size, value))
    return found


def _open_npz(path: Path, variable: str) -> Variable:
    name = f"{variable}.npy"
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            raise KeyError(
                f"{path.name} holds {[n[:-4] for n in archive.namelist()]}, not "
                f"{variable!r}"
            )
        with archive.open(name) as stream:
            version = np.lib.format.read_magic(stream)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = header(stream)
    return Variable(shape, dtype, _Npz(path, variable))


class _Npz:
    """An array of an archive, which can only be read whole; the last one is kept."""

    def __init__(self, path: Path, variable: str) -> None:
        self._path, self._variable = path, variable
        self._whole: np.ndarray | None = None

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        if self._whole is None:
            with np.load(self._path) as archive:
                self._whole = archive[self._variable]
        return self._whole[slices]


def _open_netcdf(path: Path, variable: str) -> Variable:
    dataset = load("xarray", "catalog").open_dataset(path, engine="h5netcdf")
    if variable not in dataset.variables:
        raise KeyError(
            f"{path.name} holds {sorted(map(str, dataset.variables))}, not {variable!r}"
        )
    # Scale, offset and missing values are decoded by xarray.
    array = dataset[variable]
    return Variable(array.shape, array.dtype, array)
