"""Learning rates over time: optax's schedules, with warm-up and a least value.

Every kind counts updates n (or epochs, as `unit` says) from the end of the warm-up,
which climbs linearly from 0 over `warmup`. `peak` is the rate there, `minimum_ratio`
times it the least one. A schedule stays at its last value.
"""

import abc
import math
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
import pydantic
from pydantic import Field

from trainax_pk.experiment._spec import AbstractSpec, Family, Unit, register

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Clock(NamedTuple):
    """How long a run is.

    Attributes:
        total: Updates of the run.
        per_epoch: Updates of an epoch; a fraction where batches run across its end.
    """

    total: int
    per_epoch: float

    def updates(self, amount: float, unit: str) -> int:
        """An amount of steps or epochs as updates."""
        return round(amount * (1 if unit == "steps" else self.per_epoch))


class AbstractSchedule(AbstractSpec):
    """A schedule of the learning rate: `build(clock)` gives an `optax.Schedule`."""

    peak: Positive
    unit: Unit = "steps"
    warmup: NonNegative = 0.0

    def build(self, clock: Clock) -> Any:
        """`update -> learning rate`."""
        begin = clock.updates(self.warmup, self.unit)
        after = self.after_warmup(clock, clock.total - begin)
        if not begin:
            return after
        return optax.join_schedules(
            [optax.linear_schedule(0.0, self.peak, begin), after], [begin]
        )

    @abc.abstractmethod
    def after_warmup(self, clock: Clock, left: int) -> Any:
        """The schedule of `left` updates that follow the warm-up."""

    def length(self, clock: Clock, left: int, amount: float | None) -> int:
        """An amount of time in updates; None: what is left of the run."""
        return max(1, left if amount is None else clock.updates(amount, self.unit))


@register("schedule")
class Constant(AbstractSchedule):
    """The peak, after the warm-up."""

    kind: Literal["constant"] = "constant"

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """The same always."""
        del clock, left
        return optax.constant_schedule(self.peak)


@register("schedule")
class Linear(AbstractSchedule):
    """From the peak to `minimum_ratio` of it, in a straight line."""

    kind: Literal["linear"] = "linear"
    duration: Positive | None = None
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.linear_schedule`."""
        steps = self.length(clock, left, self.duration)
        return optax.linear_schedule(self.peak, self.minimum_ratio * self.peak, steps)


@register("schedule")
class Cosine(AbstractSchedule):
    """Half a cosine from the peak to `minimum_ratio` of it (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    duration: Positive | None = None
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.cosine_decay_schedule`."""
        steps = self.length(clock, left, self.duration)
        return optax.cosine_decay_schedule(self.peak, steps, self.minimum_ratio)


@register("schedule")
class Exponential(AbstractSchedule):
    """Times `rate` every `period`, smoothly or in steps (`staircase`)."""

    kind: Literal["exponential"] = "exponential"
    rate: Positive
    period: Positive
    staircase: bool = False
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.exponential_decay`, from below where the rate is above 1."""
        del left
        return optax.exponential_decay(
            self.peak,
            max(1, clock.updates(self.period, self.unit)),
            self.rate,
            staircase=self.staircase,
            end_value=self.minimum_ratio * self.peak if self.rate < 1 else None,
        )


@register("schedule")
class Polynomial(AbstractSchedule):
    """(peak - least) (1 - n / duration)^power + least."""

    kind: Literal["polynomial"] = "polynomial"
    power: Positive = 1.0
    duration: Positive | None = None
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.polynomial_schedule`."""
        steps = self.length(clock, left, self.duration)
        least = self.minimum_ratio * self.peak
        return optax.polynomial_schedule(self.peak, least, self.power, steps)


@register("schedule")
class Step(AbstractSchedule):
    """Times `factor` at every multiple of `period`."""

    kind: Literal["step"] = "step"
    factor: Annotated[float, Field(gt=0, lt=1)]
    period: Positive
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.exponential_decay` in steps."""
        del left
        return optax.exponential_decay(
            self.peak,
            max(1, clock.updates(self.period, self.unit)),
            self.factor,
            staircase=True,
            end_value=self.minimum_ratio * self.peak,
        )


@register("schedule")
class MultiStep(AbstractSchedule):
    """Times `factor` at each of the `milestones`."""

    kind: Literal["multistep"] = "multistep"
    factor: Annotated[float, Field(gt=0, lt=1)]
    milestones: Annotated[tuple[Positive, ...], Field(min_length=1)]
    minimum_ratio: Share = 0.0

    @pydantic.field_validator("milestones")
    @classmethod
    def _ascend(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
            raise ValueError(f"expected milestones to ascend, got {milestones}. Sort.")
        return milestones

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.piecewise_constant_schedule`, not below the least."""
        del left
        at = [clock.updates(m, self.unit) for m in self.milestones]
        falls = optax.piecewise_constant_schedule(
            self.peak, dict.fromkeys(at, self.factor)
        )
        least = self.minimum_ratio * self.peak
        return lambda n: jnp.maximum(falls(n), least)


@register("schedule")
class Cyclic(AbstractSchedule):
    """A triangle between the least and the peak, up and down in every `period`
    (arXiv:1506.01186); its height times `decay` after each."""

    kind: Literal["cyclic"] = "cyclic"
    period: Positive
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """Begins at the peak where a warm-up led there, else at the least."""
        del left
        period = max(2, clock.updates(self.period, self.unit))
        least = self.minimum_ratio * self.peak
        shift = period / 2 if self.warmup else 0.0

        def rate(n: Any) -> Any:
            phase = (n + shift) / period
            cycle = jnp.floor(phase)
            height = 1.0 - jnp.abs(2.0 * (phase - cycle) - 1.0)
            return least + (self.peak - least) * height * self.decay**cycle

        return rate


@register("schedule")
class OneCycle(AbstractSchedule):
    """Up to the peak and far down again, by cosines (arXiv:1708.07120).

    It climbs from peak / `div_factor` in the first `rise` of the duration, and ends at
    that over `final_div_factor`. It is its own warm-up.
    """

    kind: Literal["one_cycle"] = "one_cycle"
    duration: Positive | None = None
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    div_factor: Annotated[float, Field(gt=1)] = 25.0
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    warmup: Literal[0] = 0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """`optax.cosine_onecycle_schedule`."""
        return optax.cosine_onecycle_schedule(
            self.length(clock, left, self.duration),
            self.peak,
            self.rise,
            self.div_factor,
            self.final_div_factor,
        )


@register("schedule")
class WarmupStableDecay(AbstractSchedule):
    """The peak, and at the end of the run a decay over `decay` (arXiv:2404.06395)."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay: Positive
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    minimum_ratio: Share = 0.0

    def after_warmup(self, clock: Clock, left: int) -> Any:
        """Peak times 1 - s, (1 + cos π s) / 2 or 1 - √s, s the decay's elapsed share."""
        length = min(left, max(1, clock.updates(self.decay, self.unit)))
        least = self.minimum_ratio

        def rate(n: Any) -> Any:
            share = jnp.clip((n - (left - length)) / length, 0.0, 1.0)
            fall = {
                "linear": 1.0 - share,
                "cosine": 0.5 * (1.0 + jnp.cos(math.pi * share)),
                "sqrt": 1.0 - jnp.sqrt(share),
            }[self.shape]
            return self.peak * (least + (1.0 - least) * fall)

        return rate


Rate = Annotated[float | AbstractSpec, Family("schedule", or_positive=True)]
