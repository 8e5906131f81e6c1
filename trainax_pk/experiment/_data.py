"""Training data by name: simulated systems, or trajectories in a file."""

import abc
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
import pydantic
from jaxtyping import PRNGKeyArray
from pydantic import Field

import trainax_pk.data as data
import trainax_pk.sample_data as sample_data
from trainax_pk.experiment._schedule import NonNegative, Positive
from trainax_pk.experiment._spec import AbstractSpec, register

Count = Annotated[int, Field(ge=1)]
NonZero = Annotated[int, Field(ge=0)]


class AbstractData(AbstractSpec):
    """Trajectories, split by trajectory: `build(key)` gives a `tx.data.Split`.

    The key depends on `data_seed` alone: other seeds of a run train on the same data.
    """

    data_seed: NonZero = 0
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)

    @pydantic.field_validator("split")
    @classmethod
    def _sum_to_one(cls, split: tuple[float, ...]) -> tuple[float, ...]:
        if min(split) <= 0 or not math.isclose(sum(split), 1.0):
            raise ValueError(
                "expected positive shares of training, validation and test that sum to "
                f"1, got {split}."
            )
        return split

    def build(self) -> data.Split:
        """Training, validation and test trajectories."""
        make, cut = jax.random.split(jax.random.key(self.data_seed))
        return data.split_by_trajectory(self.trajectories(make), self.split, key=cut)

    @abc.abstractmethod
    def trajectories(self, key: PRNGKeyArray) -> Any:
        """All trajectories, `(num_samples, num_times, ...)`."""

    def stepper(self) -> Any:
        """The system's own stepper `u -> u_next`; None where none is known."""
        return None


class AbstractSystem(AbstractData):
    """A system of `tx.sample_data`: the fields are its arguments."""

    make: ClassVar[Callable[..., Any]]
    make_stepper: ClassVar[Callable[..., Any]]

    num_samples: Count = 20
    temporal_horizon: Annotated[int, Field(ge=2)] = 100

    def trajectories(self, key: PRNGKeyArray) -> Any:
        """Simulated on the device."""
        return type(self).make(**self._arguments(type(self).make), key=key)

    def stepper(self) -> Any:
        """Of the same constants."""
        return type(self).make_stepper(**self._arguments(type(self).make_stepper))

    @abc.abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of one state."""

    def _arguments(self, function: Any) -> dict[str, Any]:
        names = inspect.signature(function).parameters
        return {n: getattr(self, n) for n in names if n in type(self).model_fields}


@register("data")
class Advection1D(AbstractSystem):
    """`tx.sample_data.advection_1d_periodic`."""

    make = staticmethod(sample_data.advection_1d_periodic)
    make_stepper = staticmethod(sample_data.make_advection_1d_stepper)
    kind: Literal["advection_1d"] = "advection_1d"
    num_points: Count = 30
    cfl: float = 0.75
    highest_init_mode: Count = 5

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points)`."""
        return (1, self.num_points)


@register("data")
class Burgers1D(AbstractSystem):
    """`tx.sample_data.burgers_1d`."""

    make = staticmethod(sample_data.burgers_1d)
    make_stepper = staticmethod(sample_data.make_burgers_1d_stepper)
    kind: Literal["burgers_1d"] = "burgers_1d"
    num_points: Count = 128
    domain_extent: Positive = 2 * math.pi
    dt: Positive = 0.05
    diffusivity: Positive = 0.05
    num_substeps: Count = 1
    highest_init_mode: Count = 5
    init_std: Positive = 0.5
    num_warmup_steps: NonZero = 0

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points)`."""
        return (1, self.num_points)


@register("data")
class KuramotoSivashinsky1D(AbstractSystem):
    """`tx.sample_data.kuramoto_sivashinsky_1d`."""

    make = staticmethod(sample_data.kuramoto_sivashinsky_1d)
    make_stepper = staticmethod(sample_data.make_kuramoto_sivashinsky_1d_stepper)
    kind: Literal["kuramoto_sivashinsky_1d"] = "kuramoto_sivashinsky_1d"
    num_points: Count = 160
    domain_extent: Positive = 60.0
    dt: Positive = 0.25
    num_substeps: Count = 1
    highest_init_mode: Count = 5
    init_std: Positive = 1.0
    num_warmup_steps: NonZero = 400

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points)`."""
        return (1, self.num_points)


@register("data")
class AdvectionDiffusion2D(AbstractSystem):
    """`tx.sample_data.advection_diffusion_2d`."""

    make = staticmethod(sample_data.advection_diffusion_2d)
    make_stepper = staticmethod(sample_data.make_advection_diffusion_2d_stepper)
    kind: Literal["advection_diffusion_2d"] = "advection_diffusion_2d"
    num_points: Count = 48
    domain_extent: Positive = 2 * math.pi
    dt: Positive = 0.05
    velocity: tuple[float, float] = (1.0, 0.5)
    diffusivity: NonNegative = 0.01
    highest_init_mode: Count = 5
    init_std: Positive = 1.0

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points, num_points)`."""
        return (1, self.num_points, self.num_points)


@register("data")
class KolmogorovFlow2D(AbstractSystem):
    """`tx.sample_data.kolmogorov_flow_2d`."""

    make = staticmethod(sample_data.kolmogorov_flow_2d)
    make_stepper = staticmethod(sample_data.make_kolmogorov_flow_2d_stepper)
    kind: Literal["kolmogorov_flow_2d"] = "kolmogorov_flow_2d"
    num_samples: Count = 10
    temporal_horizon: Annotated[int, Field(ge=2)] = 50
    num_points: Count = 64
    domain_extent: Positive = 2 * math.pi
    dt: Positive = 0.1
    diffusivity: Positive = 0.01
    drag: float = -0.1
    injection_mode: Count = 4
    injection_scale: float = 1.0
    num_substeps: Count = 5
    highest_init_mode: Count = 5
    init_std: Positive = 1.0
    num_warmup_steps: NonZero = 100

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points, num_points)`."""
        return (1, self.num_points, self.num_points)


@register("data")
class Lorenz63(AbstractSystem):
    """`tx.sample_data.lorenz_63`."""

    make = staticmethod(sample_data.lorenz_63)
    make_stepper = staticmethod(sample_data.make_lorenz_63_stepper)
    kind: Literal["lorenz_63"] = "lorenz_63"
    temporal_horizon: Annotated[int, Field(ge=2)] = 1000
    dt: Positive = 0.01
    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3
    num_warmup_steps: NonZero = 500
    init_std: Positive = 1.0

    def state_shape(self) -> tuple[int, ...]:
        """`(3,)`."""
        return (3,)


@register("data")
class Lorenz96(AbstractSystem):
    """`tx.sample_data.lorenz_96`."""

    make = staticmethod(sample_data.lorenz_96)
    make_stepper = staticmethod(sample_data.make_lorenz_96_stepper)
    kind: Literal["lorenz_96"] = "lorenz_96"
    temporal_horizon: Annotated[int, Field(ge=2)] = 1000
    num_dofs: Annotated[int, Field(ge=4)] = 40
    dt: Positive = 0.05
    forcing: float = 8.0
    num_warmup_steps: NonZero = 500
    init_std: Positive = 1.0

    def state_shape(self) -> tuple[int, ...]:
        """`(num_dofs,)`."""
        return (self.num_dofs,)


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
