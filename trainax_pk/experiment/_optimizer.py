"""Optimizers: optax's, by name, with clipping and masked weight decay."""

import abc
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import optax
from pydantic import Field

from trainax_pk.experiment._schedule import Clock, NonNegative, Positive, Rate
from trainax_pk.experiment._spec import AbstractSpec, register

Beta = Annotated[float, Field(ge=0, lt=1)]
Decayed = Literal["all", "matrices"]


class AbstractOptimizer(AbstractSpec):
    """An optimizer: `build(clock)` gives an optax transformation.

    Gradients are clipped by value first, then by their global norm.
    """

    learning_rate: Rate
    clip_value: Positive | None = None
    clip_norm: Positive | None = None

    def build(self, clock: Clock) -> optax.GradientTransformation:
        """The transformation."""
        parts = []
        if self.clip_value is not None:
            parts.append(optax.clip(self.clip_value))
        if self.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(self.clip_norm))
        rate = self.learning_rate
        if isinstance(rate, AbstractSpec):
            rate = rate.build(clock)
        inner = self.transform(rate)
        return optax.chain(*parts, inner) if parts else inner

    @abc.abstractmethod
    def transform(self, rate: Any) -> optax.GradientTransformation:
        """optax's, at a learning rate or schedule."""


def _mask(decayed: str) -> Any:
    if decayed == "all":
        return None
    # Not of biases and scales of norms.
    return lambda params: jax.tree.map(
        lambda x: eqx.is_inexact_array(x) and x.ndim >= 2, params
    )


class AbstractAdam(AbstractOptimizer):
    """Moments of the gradient: their rates and the denominator's floor."""

    b1: Beta = 0.9
    b2: Beta = 0.999
    eps: Positive = 1e-8

    def moments(self) -> dict[str, float]:
        """As optax names them."""
        return {"b1": self.b1, "b2": self.b2, "eps": self.eps}


class AbstractDecayed(AbstractOptimizer):
    """Decoupled weight decay, of all parameters or of matrices alone."""

    weight_decay: NonNegative = 1e-4
    decayed: Decayed = "all"

    def decay(self) -> dict[str, Any]:
        """As optax names it."""
        return {"weight_decay": self.weight_decay, "mask": _mask(self.decayed)}


@register("optimizer")
class Adam(AbstractAdam):
    """`optax.adam` (arXiv:1412.6980)."""

    kind: Literal["adam"] = "adam"

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.adam`."""
        return optax.adam(rate, **self.moments())


@register("optimizer")
class AdamW(AbstractAdam, AbstractDecayed):
    """`optax.adamw` (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.adamw`."""
        return optax.adamw(rate, **self.moments(), **self.decay())


@register("optimizer")
class NAdam(AbstractAdam):
    """`optax.nadam`: Adam with Nesterov's momentum."""

    kind: Literal["nadam"] = "nadam"

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.nadam`."""
        return optax.nadam(rate, **self.moments())


@register("optimizer")
class RAdam(AbstractAdam):
    """`optax.radam` (arXiv:1908.03265)."""

    kind: Literal["radam"] = "radam"
    threshold: Positive = 5.0

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.radam`."""
        return optax.radam(rate, **self.moments(), threshold=self.threshold)


@register("optimizer")
class Lamb(AbstractAdam, AbstractDecayed):
    """`optax.lamb` (arXiv:1904.00962)."""

    kind: Literal["lamb"] = "lamb"
    eps: Positive = 1e-6
    weight_decay: NonNegative = 0.0

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.lamb`."""
        return optax.lamb(rate, **self.moments(), **self.decay())


@register("optimizer")
class Lion(AbstractDecayed):
    """`optax.lion` (arXiv:2302.06675)."""

    kind: Literal["lion"] = "lion"
    b1: Beta = 0.9
    b2: Beta = 0.99
    weight_decay: NonNegative = 1e-3

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.lion`."""
        return optax.lion(rate, b1=self.b1, b2=self.b2, **self.decay())


@register("optimizer")
class SGD(AbstractOptimizer):
    """`optax.sgd`."""

    kind: Literal["sgd"] = "sgd"
    momentum: Beta | None = None
    nesterov: bool = False

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.sgd`."""
        return optax.sgd(rate, self.momentum, self.nesterov)


@register("optimizer")
class RMSProp(AbstractOptimizer):
    """`optax.rmsprop`."""

    kind: Literal["rmsprop"] = "rmsprop"
    decay: Beta = 0.9
    eps: Positive = 1e-8
    centered: bool = False
    momentum: Beta | None = None

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.rmsprop`."""
        return optax.rmsprop(
            rate,
            self.decay,
            self.eps,
            centered=self.centered,
            momentum=self.momentum,
        )


@register("optimizer")
class AdaGrad(AbstractOptimizer):
    """`optax.adagrad`."""

    kind: Literal["adagrad"] = "adagrad"
    initial_accumulator: NonNegative = 0.1
    eps: Positive = 1e-7

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.adagrad`."""
        return optax.adagrad(rate, self.initial_accumulator, self.eps)


@register("optimizer")
class Muon(AbstractOptimizer):
    """`optax.contrib.muon` for matrices, Adam for the rest."""

    kind: Literal["muon"] = "muon"
    beta: Beta = 0.95
    weight_decay: NonNegative = 0.0
    nesterov: bool = True

    def transform(self, rate: Any) -> optax.GradientTransformation:
        """`optax.contrib.muon`."""
        return optax.contrib.muon(
            rate,
            beta=self.beta,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@register("optimizer")
class LBFGS(AbstractSpec):
    """`optax.lbfgs`, with its line search where no learning rate is given."""

    kind: Literal["lbfgs"] = "lbfgs"
    learning_rate: Rate | None = None
    memory_size: Annotated[int, Field(ge=1)] = 10

    def build(self, clock: Clock) -> optax.GradientTransformation:
        """`optax.lbfgs`."""
        rate = self.learning_rate
        if rate is None:
            return optax.lbfgs(memory_size=self.memory_size)
        if isinstance(rate, AbstractSpec):
            rate = rate.build(clock)
        return optax.lbfgs(rate, self.memory_size, linesearch=None)
