"""Training data by name: simulated systems, or trajectories in a file."""

import abc
import inspect
import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import pydantic
from jaxtyping import PRNGKeyArray
from pydantic import Field

import trainax_pk.data as data
import trainax_pk.sample_data as sample_data
from trainax_pk.experiment._schedule import NonNegative, Positive
from trainax_pk.experiment._spec import AbstractSpec, register

Count = Annotated[int, Field(ge=1)]
NonZero = Annotated[int, Field(ge=0)]


class Scale(NamedTuple):
    """States are standardised by these: (u - mean) / std.

    Attributes:
        mean: Of the training data.
        std: Likewise.
    """

    mean: float
    std: float


class AbstractSource(AbstractSpec):
    """Data in three parts: `build()` gives a `tx.data.Split`.

    To add a kind: say what it `gives`, which models and configurations have to need:
    "states" (trajectories of states), "observations" (`tx.Batch1D`), "pairs"
    (`tx.amortized.Pairs`); and implement `build` and `state_shape`. Everything random
    depends on `data_seed` alone: other seeds of a run train on the same data.
    """

    gives: ClassVar[str] = "states"
    data_seed: NonZero = 0
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)

    @abc.abstractmethod
    def build(self) -> data.Split:
        """Training, validation and test data."""

    @abc.abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of one state, or of one observation; known without making any data."""

    def stepper(self) -> Any:
        """The system's own stepper `u -> u_next`; None where none is known."""
        return None

    def prior(self) -> Any:
        """Of the parameters; None where there are none."""
        return None

    def standardisation(self) -> Scale | None:
        """What `build` takes out of the states; None for nothing."""
        return None

    @pydantic.field_validator("split")
    @classmethod
    def _sum_to_one(cls, split: tuple[float, ...]) -> tuple[float, ...]:
        if min(split) <= 0 or not math.isclose(sum(split), 1.0):
            raise ValueError(
                "expected positive shares of training, validation and test that sum to "
                f"1, got {split}."
            )
        return split


class AbstractData(AbstractSource):
    """Trajectories, split by trajectory.

    To add a kind: implement `trajectories` and `state_shape`.
    """

    def build(self) -> data.Split:
        """Training, validation and test trajectories."""
        make, cut = jax.random.split(jax.random.key(self.data_seed))
        return data.split_by_trajectory(self.trajectories(make), self.split, key=cut)

    @abc.abstractmethod
    def trajectories(self, key: PRNGKeyArray) -> Any:
        """All trajectories, `(num_samples, num_times, ...)`."""


class AbstractSystem(AbstractData):
    """A system of `tx.sample_data`: the fields are its arguments."""

    num_samples: Count = 20
    temporal_horizon: Annotated[int, Field(ge=2)] = 100

    @staticmethod
    @abc.abstractmethod
    def make(*, key: PRNGKeyArray) -> Any:
        """Trajectories: the function of `tx.sample_data`."""

    @staticmethod
    @abc.abstractmethod
    def make_stepper() -> Any:
        """The stepper: likewise."""

    def trajectories(self, key: PRNGKeyArray) -> Any:
        """Simulated on the device."""
        return type(self).make(**self._arguments(type(self).make), key=key)

    def stepper(self) -> Any:
        """Of the same constants."""
        return type(self).make_stepper(**self._arguments(type(self).make_stepper))

    def _arguments(self, function: Any) -> dict[str, Any]:
        names = inspect.signature(function).parameters
        return {n: getattr(self, n) for n in names if n in type(self).model_fields}


class AbstractGrid(AbstractSystem):
    """A system of one channel on a periodic grid of `num_points` along each axis."""

    num_axes: ClassVar[int] = 1
    num_points: Count
    highest_init_mode: Count = 5

    def state_shape(self) -> tuple[int, ...]:
        """`(1, num_points, ...)`."""
        return (1, *(self.num_axes * (self.num_points,)))


class AbstractExtended(AbstractGrid):
    """A system on a domain of a length, whose initial states have a standard deviation."""

    domain_extent: Positive = 2 * math.pi
    dt: Positive
    init_std: Positive = 1.0


class AbstractVector(AbstractSystem):
    """A system of ordinary differential equations."""

    temporal_horizon: Annotated[int, Field(ge=2)] = 1000
    dt: Positive
    num_warmup_steps: NonZero = 500
    init_std: Positive = 1.0


@register("data")
class Advection1D(AbstractGrid):
    """`tx.sample_data.advection_1d_periodic`."""

    make = staticmethod(sample_data.advection_1d_periodic)
    make_stepper = staticmethod(sample_data.make_advection_1d_stepper)
    kind: Literal["advection_1d"] = "advection_1d"
    num_points: Count = 30
    cfl: float = 0.75


@register("data")
class Burgers1D(AbstractExtended):
    """`tx.sample_data.burgers_1d`."""

    make = staticmethod(sample_data.burgers_1d)
    make_stepper = staticmethod(sample_data.make_burgers_1d_stepper)
    kind: Literal["burgers_1d"] = "burgers_1d"
    num_points: Count = 128
    dt: Positive = 0.05
    diffusivity: Positive = 0.05
    num_substeps: Count = 1
    init_std: Positive = 0.5
    num_warmup_steps: NonZero = 0


@register("data")
class KuramotoSivashinsky1D(AbstractExtended):
    """`tx.sample_data.kuramoto_sivashinsky_1d`."""

    make = staticmethod(sample_data.kuramoto_sivashinsky_1d)
    make_stepper = staticmethod(sample_data.make_kuramoto_sivashinsky_1d_stepper)
    kind: Literal["kuramoto_sivashinsky_1d"] = "kuramoto_sivashinsky_1d"
    num_points: Count = 160
    domain_extent: Positive = 60.0
    dt: Positive = 0.25
    num_substeps: Count = 1
    num_warmup_steps: NonZero = 400


@register("data")
class AdvectionDiffusion2D(AbstractExtended):
    """`tx.sample_data.advection_diffusion_2d`."""

    make = staticmethod(sample_data.advection_diffusion_2d)
    make_stepper = staticmethod(sample_data.make_advection_diffusion_2d_stepper)
    num_axes = 2
    kind: Literal["advection_diffusion_2d"] = "advection_diffusion_2d"
    num_points: Count = 48
    dt: Positive = 0.05
    velocity: tuple[float, float] = (1.0, 0.5)
    diffusivity: NonNegative = 0.01


@register("data")
class KolmogorovFlow2D(AbstractExtended):
    """`tx.sample_data.kolmogorov_flow_2d`."""

    make = staticmethod(sample_data.kolmogorov_flow_2d)
    make_stepper = staticmethod(sample_data.make_kolmogorov_flow_2d_stepper)
    num_axes = 2
    kind: Literal["kolmogorov_flow_2d"] = "kolmogorov_flow_2d"
    num_samples: Count = 10
    temporal_horizon: Annotated[int, Field(ge=2)] = 50
    num_points: Count = 64
    dt: Positive = 0.1
    diffusivity: Positive = 0.01
    drag: float = -0.1
    injection_mode: Count = 4
    injection_scale: float = 1.0
    num_substeps: Count = 5
    num_warmup_steps: NonZero = 100


@register("data")
class Lorenz63(AbstractVector):
    """`tx.sample_data.lorenz_63`."""

    make = staticmethod(sample_data.lorenz_63)
    make_stepper = staticmethod(sample_data.make_lorenz_63_stepper)
    kind: Literal["lorenz_63"] = "lorenz_63"
    dt: Positive = 0.01
    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3

    def state_shape(self) -> tuple[int, ...]:
        """`(3,)`."""
        return (3,)


@register("data")
class Lorenz96(AbstractVector):
    """`tx.sample_data.lorenz_96`."""

    make = staticmethod(sample_data.lorenz_96)
    make_stepper = staticmethod(sample_data.make_lorenz_96_stepper)
    kind: Literal["lorenz_96"] = "lorenz_96"
    num_dofs: Annotated[int, Field(ge=4)] = 40
    dt: Positive = 0.05
    forcing: float = 8.0

    def state_shape(self) -> tuple[int, ...]:
        """`(num_dofs,)`."""
        return (self.num_dofs,)
