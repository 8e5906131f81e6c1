"""Which trials a sweep has: values of fields, and how they are combined."""

import abc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from trainax_pk._extras import load
from trainax_pk.experiment._data import Count, NonZero
from trainax_pk.experiment._schedule import Positive
from trainax_pk.experiment._spec import AbstractSpec, register

Fields = dict[str, Any]
Told = Sequence[tuple[Fields, float]]


class ParameterGrid:
    """Every combination of values, the last name's fastest.

    Example:
        >>> from trainax_pk.experiment import ParameterGrid
        >>> grid = ParameterGrid({"optimizer.learning_rate": [1e-3, 1e-2], "seed": [0, 1]})
        >>> len(grid), grid[2]
        (4, {'optimizer.learning_rate': 0.01, 'seed': 0})
    """

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Keeps the values.

        Args:
            values: By name.

        Raises:
            ValueError: A name without values.
        """
        self.values = {name: list(options) for name, options in values.items()}
        for name, options in self.values.items():
            if not options:
                raise ValueError(
                    f"Expected values of {name}, got none. Give one at least."
                )

    def __len__(self) -> int:
        return math.prod(len(options) for options in self.values.values())

    def __iter__(self) -> Iterator[Fields]:
        for combination in itertools.product(*self.values.values()):
            yield dict(zip(self.values, combination, strict=True))

    def __getitem__(self, i: int) -> Fields:
        return list(self)[i]


class AbstractValues(AbstractSpec):
    """Values of one field: `build()` lists them for a grid.

    To add a kind: implement `build`, `draw` and `distribution`.
    """

    @abc.abstractmethod
    def build(self) -> list[Any]:
        """All of them."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """One at random."""

    @abc.abstractmethod
    def distribution(self, optuna: Any) -> Any:
        """As Optuna describes them."""

    def code(self, value: Any) -> Any:
        """What stands for a value in Optuna."""
        return value

    def decode(self, code: Any) -> Any:
        """The value that something in Optuna stands for."""
        return code


@register("values")
class Choice(AbstractValues):
    """One of `options`; in a file, a list stands for it."""

    kind: Literal["choice"] = "choice"
    options: Annotated[tuple[Any, ...], Field(min_length=1)]

    def build(self) -> list[Any]:
        """The options."""
        return list(self.options)

    def draw(self, rng: np.random.Generator) -> Any:
        """One at random."""
        return self.options[rng.integers(len(self.options))]

    def distribution(self, optuna: Any) -> Any:
        """Over numbers of options, which may be whole specs."""
        return optuna.distributions.CategoricalDistribution(range(len(self.options)))

    def code(self, value: Any) -> int:
        """Its number."""
        return self.options.index(value)

    def decode(self, code: int) -> Any:
        """The option of a number."""
        return self.options[code]


class AbstractRange(AbstractValues):
    """Numbers from `low` to `high`; a grid has `num` of them, ends included."""

    num: Annotated[int, Field(ge=2)] | None = None

    @pydantic.model_validator(mode="after")
    def _ascend(self) -> "AbstractRange":
        if not self.low < self.high:
            raise ValueError(
                f"expected low < high, got {self.low} and {self.high}. Swap them."
            )
        return self

    def build(self) -> list[Any]:
        """The grid's."""
        if self.num is None:
            raise ValueError(
                "Expected `num` values of a range in a grid, got none. Say how many, or "
                "choose `sampler: {kind: random, num_trials: ...}`."
            )
        return [self.at(float(x)) for x in np.linspace(0.0, 1.0, self.num)]

    def draw(self, rng: np.random.Generator) -> Any:
        """One at random."""
        return self.at(rng.uniform())

    @abc.abstractmethod
    def at(self, share: float) -> Any:
        """The value at a share of the way."""


@register("values")
class Uniform(AbstractRange):
    """Numbers at equal distances."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share of the way."""
        return self.low + share * (self.high - self.low)

    def distribution(self, optuna: Any) -> Any:
        """Uniform."""
        return optuna.distributions.FloatDistribution(self.low, self.high)


@register("values")
class LogUniform(AbstractRange):
    """Numbers of equal ratios, such as learning rates."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: Positive
    high: Positive

    def at(self, share: float) -> float:
        """The value at a share of the way."""
        if share in (0.0, 1.0):
            return self.high if share else self.low
        return self.low * (self.high / self.low) ** share

    def distribution(self, optuna: Any) -> Any:
        """Uniform in the logarithm."""
        return optuna.distributions.FloatDistribution(self.low, self.high, log=True)


@register("values")
class Integers(AbstractValues):
    """All whole numbers from `low` to `high`."""

    kind: Literal["integers"] = "integers"
    low: int
    high: int

    @pydantic.model_validator(mode="after")
    def _ascend(self) -> "Integers":
        if not self.low < self.high:
            raise ValueError(
                f"expected low < high, got {self.low} and {self.high}. Swap them."
            )
        return self

    def build(self) -> list[Any]:
        """All of them."""
        return list(range(self.low, self.high + 1))

    def draw(self, rng: np.random.Generator) -> int:
        """One at random."""
        return int(rng.integers(self.low, self.high + 1))

    def distribution(self, optuna: Any) -> Any:
        """Uniform."""
        return optuna.distributions.IntDistribution(self.low, self.high)


class AbstractSampler(AbstractSpec):
    """Which trials come next: `build(values, told)`.

    To add a kind: implement `build`. It must be a function of its arguments alone, so
    that a sweep that was killed goes on with the trials that it would have had.
    """

    @abc.abstractmethod
    def build(self, values: Mapping[str, AbstractValues], told: Told) -> list[Fields]:
        """Trials to train next, given fields and values of those that ended; none at the
        end. Lower values are better, NaN is a failure."""


@register("sampler")
class Grid(AbstractSampler):
    """Every combination."""

    kind: Literal["grid"] = "grid"

    def build(self, values: Mapping[str, AbstractValues], told: Told) -> list[Fields]:
        """All at once."""
        if told:
            return []
        return list(ParameterGrid({name: v.build() for name, v in values.items()}))


@register("sampler")
class Random(AbstractSampler):
    """Independent draws."""

    kind: Literal["random"] = "random"
    num_trials: Count
    seed: NonZero = 0

    def build(self, values: Mapping[str, AbstractValues], told: Told) -> list[Fields]:
        """All at once."""
        if told:
            return []
        rng = np.random.default_rng(self.seed)
        return [
            {name: v.draw(rng) for name, v in values.items()}
            for _ in range(self.num_trials)
        ]


@register("sampler")
class Optuna(AbstractSampler):
    """Optuna's tree-structured Parzen estimator (`pip install 'trainax_pk[sweep]'`).

    It asks for `batch` trials at a time, which train together where they can.
    """

    kind: Literal["optuna"] = "optuna"
    num_trials: Count
    batch: Count = 8
    seed: NonZero = 0

    def build(self, values: Mapping[str, AbstractValues], told: Told) -> list[Fields]:
        """The next batch."""
        count = min(self.batch, self.num_trials - len(told))
        if count <= 0:
            return []
        optuna = load("optuna", "sweep")
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            return self._ask(optuna, values, told, count)
        finally:
            optuna.logging.set_verbosity(level)

    def _ask(
        self,
        optuna: Any,
        values: Mapping[str, AbstractValues],
        told: Told,
        count: int,
    ) -> list[Fields]:
        # Made anew for every batch: what it suggests depends on `told` alone.
        sampler = optuna.samplers.TPESampler(
            seed=self.seed + len(told), n_startup_trials=self.batch
        )
        study = optuna.create_study(sampler=sampler)
        for fields, value in told:
            params = {name: v.code(fields[name]) for name, v in values.items()}
            kinds = {name: v.distribution(optuna) for name, v in values.items()}
            if math.isfinite(value):
                outcome = {"value": value}
            else:
                outcome = {"state": optuna.trial.TrialState.FAIL}
            done = {"params": params, "distributions": kinds, **outcome}
            study.add_trial(optuna.trial.create_trial(**done))
        kinds = {name: v.distribution(optuna) for name, v in values.items()}
        trials = [study.ask(kinds) for _ in range(count)]
        return [
            {n: v.decode(trial.params[n]) for n, v in values.items()}
            for trial in trials
        ]
