"""Training data in files, by name."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from pydantic import Field

import trainax_pk.data as data
from trainax_pk._extras import load
from trainax_pk.experiment._data import (
    AbstractData,
    AbstractSource,
    Count,
    NonZero,
    Scale,
)
from trainax_pk.experiment._spec import register


@register("data")
class Arrays(AbstractData):
    """Trajectories in a `.npy` file, or under `name` in a `.npz`; never a pickle.

    A relative path counts from the run file's folder. `shape` is what the file has to
    hold, `[num_samples, num_times, ...]`: it is checked before anything is computed.
    """

    kind: Literal["arrays"] = "arrays"
    path: str
    shape: Annotated[tuple[Count, ...], Field(min_length=3)]
    name: str = "state"

    def state_shape(self) -> tuple[int, ...]:
        """As `shape` says."""
        return self.shape[2:]

    def trajectories(self, key: PRNGKeyArray) -> Any:
        """The array of the file."""
        del key
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"Expected trajectories in {path}, found no such file.")
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return self._checked(found)
        with found:
            return self._checked(self._member(found))

    def _member(self, found: Any) -> np.ndarray:
        if self.name not in found:
            raise ValueError(
                f"Expected an array {self.name!r} in {self.path}, found {found.files}. "
                "Give one of these as `name`."
            )
        return found[self.name]

    def _checked(self, array: np.ndarray) -> np.ndarray:
        if array.shape != self.shape:
            raise ValueError(
                f"Expected shape {self.shape} in {self.path}, got {array.shape}. Mend "
                "`shape`, or the file."
            )
        return array


@register("data")
class NetCDF(AbstractSource):
    """A field of a netCDF file over time, one trajectory, split by time.

    `shape` is what the file has to hold under `variable`, `[num_times, *space]`. Every
    `coarsen`-th point is kept along each axis of space. The mean and the standard
    deviation of the training times are taken out of all. `guard` times are left out
    between the parts.
    """

    gives: ClassVar[str] = "states"
    kind: Literal["netcdf"] = "netcdf"
    path: str
    variable: str
    shape: Annotated[tuple[Count, ...], Field(min_length=2)]
    coarsen: Count = 1
    guard: NonZero = 0

    def state_shape(self) -> tuple[int, ...]:
        """`(1, *space)`."""
        return (1, *(math.ceil(n / self.coarsen) for n in self.shape[1:]))

    def build(self) -> data.Split:
        """Early times to train on, the last ones to test."""
        states = self._states()
        scale = self._scale_of(states)
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        scaled = ((states - scale.mean) / scale.std).astype(dtype)
        return data.split_by_time(scaled, self.split, guard=self.guard)

    def standardisation(self) -> Scale:
        """Of the training times."""
        return self._scale_of(self._states())

    def _scale_of(self, states: np.ndarray) -> Scale:
        # Of the training times alone: the others must not touch it.
        train = data.split_by_time(states, self.split, guard=self.guard).train.state
        mean, std = float(np.mean(train)), float(np.std(train))
        return Scale(mean, std if std > 0 else 1.0)

    def _states(self) -> np.ndarray:
        every = slice(None, None, self.coarsen)
        field = self._field()[(slice(None), *(len(self.shape) - 1) * (every,))]
        return field[None, :, None]

    def _field(self) -> np.ndarray:
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(
                f"Expected a netCDF file at {path}, found none. Give `data.path`."
            )
        with load("h5netcdf", "catalog").File(path) as file:
            if self.variable not in file.variables:
                raise ValueError(
                    f"Expected a variable {self.variable!r} in {path}, found "
                    f"{list(file.variables)}. Give one of these as `variable`."
                )
            found = np.asarray(file.variables[self.variable][:], np.float64)
        if found.shape != self.shape:
            raise ValueError(
                f"Expected shape {self.shape} of {self.variable} in {path}, got "
                f"{found.shape}. Mend `shape`, or the file."
            )
        return found
