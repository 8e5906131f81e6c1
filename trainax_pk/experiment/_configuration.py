"""Compute graphs of training and their adjoints, by name."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pydantic
from pydantic import Field

import trainax_pk.adjoint as adjoints
import trainax_pk.configuration as configurations
import trainax_pk.loss as losses
from trainax_pk.experiment._data import Count
from trainax_pk.experiment._schedule import Clock, NonNegative, Positive
from trainax_pk.experiment._spec import AbstractSpec, Family, register

Clocks = Callable[[int], Clock]
Loss = Literal["mse", "mae", "rmse", "nmse", "nmae", "nrmse"]


class AbstractAdjointSpec(AbstractSpec):
    """How a rollout is differentiated: `build()` gives an adjoint."""


@register("adjoint")
class Direct(AbstractAdjointSpec):
    """`tx.DirectAdjoint`."""

    kind: Literal["direct"] = "direct"

    def build(self) -> Any:
        """The adjoint."""
        return adjoints.DirectAdjoint()


@register("adjoint")
class Checkpointed(AbstractAdjointSpec):
    """`tx.RecursiveCheckpointAdjoint`."""

    kind: Literal["checkpointed"] = "checkpointed"
    checkpoints: Count | None = None

    def build(self) -> Any:
        """The adjoint."""
        return adjoints.RecursiveCheckpointAdjoint(self.checkpoints)


@register("adjoint")
class KStep(AbstractAdjointSpec):
    """`tx.KStepAdjoint`."""

    kind: Literal["k_step"] = "k_step"
    k: Count

    def build(self) -> Any:
        """The adjoint."""
        return adjoints.KStepAdjoint(self.k)


class AbstractConfiguration(AbstractSpec):
    """The compute graph of the loss: `build(stepper, clock)`.

    To add a kind: implement `build`. The stepper is that of the data, or None. `clock` is
    a function: times that a sample needs to a `Clock`, which tells how long the run is.
    What the configuration `needs` is what data have to give.
    """

    needs: ClassVar[str] = "states"


class AbstractRollout(AbstractConfiguration):
    """A configuration over time."""

    num_rollout_steps: Count = 1
    loss: Loss = "mse"
    cut_bptt: bool = False
    cut_bptt_every: Count = 1
    adjoint: Annotated[AbstractSpec, Family("adjoint")] = Direct()
    time_level_weights: tuple[NonNegative, ...] | None = None

    def options(self) -> dict[str, Any]:
        """As the configurations name them."""
        weights = self.time_level_weights
        return {
            "time_level_loss": getattr(losses, self.loss),
            "cut_bptt": self.cut_bptt,
            "cut_bptt_every": self.cut_bptt_every,
            "adjoint": self.adjoint.build(),
            "time_level_weights": None if weights is None else jnp.asarray(weights),
        }


def _needed(stepper: Any, kind: str) -> Callable[..., Any]:
    if stepper is None:
        raise ValueError(
            f"Expected data of a system whose stepper is known for `{kind}`, got arrays. "
            "Choose the configuration `supervised`, or simulated data."
        )
    return stepper


@register("configuration")
class Supervised(AbstractRollout):
    """`tx.configuration.Supervised`."""

    kind: Literal["supervised"] = "supervised"

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.Supervised(self.num_rollout_steps, **self.options())


@register("configuration")
class DivertedChain(AbstractRollout):
    """`tx.configuration.DivertedChain`."""

    kind: Literal["diverted_chain"] = "diverted_chain"
    num_branch_steps: Count = 1
    cut_div_chain: bool = False
    branch_level_weights: tuple[NonNegative, ...] | None = None

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del clock
        weights = self.branch_level_weights
        return configurations.DivertedChain(
            self.num_rollout_steps,
            self.num_branch_steps,
            ref_stepper=_needed(stepper, self.kind),
            cut_div_chain=self.cut_div_chain,
            branch_level_weights=None if weights is None else jnp.asarray(weights),
            **self.options(),
        )


@register("configuration")
class MixChain(AbstractRollout):
    """`tx.configuration.MixChainPostPhysics`."""

    kind: Literal["mix_chain"] = "mix_chain"
    num_post_physics_steps: Count = 1

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del clock
        return configurations.MixChainPostPhysics(
            self.num_rollout_steps,
            self.num_post_physics_steps,
            ref_stepper=_needed(stepper, self.kind),
            **self.options(),
        )


@register("configuration")
class Residuum(AbstractRollout):
    """`tx.configuration.Residuum` of R(u_next, u) = u_next - Φ(u), Φ the data's stepper."""

    kind: Literal["residuum"] = "residuum"
    loss: Literal["mse", "mae", "rmse"] = "mse"
    cut_prev: bool = False
    cut_next: bool = False

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del clock
        return configurations.Residuum(
            self.num_rollout_steps,
            residuum_fn=OneStep(_needed(stepper, self.kind)),
            cut_prev=self.cut_prev,
            cut_next=self.cut_next,
            **self.options(),
        )


class OneStep(eqx.Module):
    """R(u_next, u) = u_next - Φ(u).

    Attributes:
        stepper: Φ.
    """

    stepper: Any

    def __call__(self, u_next: Any, u: Any) -> Any:
        """The residuum."""
        return jax.tree.map(jnp.subtract, u_next, self.stepper(u))


@register("configuration")
class Reconstruction(AbstractConfiguration):
    """`tx.configuration.Reconstruction`."""

    needs: ClassVar[str] = "observations"
    kind: Literal["reconstruction"] = "reconstruction"
    gradient_weight: NonNegative = 0.0
    prior_weight: NonNegative = 0.0
    target_prior_weight: NonNegative = 0.0

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.Reconstruction(
            gradient_weight=self.gradient_weight,
            prior_weight=self.prior_weight,
            target_prior_weight=self.target_prior_weight,
        )


@register("configuration")
class AmortizedNLL(AbstractConfiguration):
    """`tx.configuration.AmortizedNLL`."""

    needs: ClassVar[str] = "pairs"
    kind: Literal["amortized_nll"] = "amortized_nll"

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.AmortizedNLL()


_Inner = Annotated[AbstractSpec, Family("configuration")]


@register("configuration")
class InputNoise(AbstractConfiguration):
    """`tx.configuration.InputNoise` around another."""

    kind: Literal["input_noise"] = "input_noise"
    configuration: _Inner
    std: Positive

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        inner = self.configuration.build(stepper, clock)
        return configurations.InputNoise(inner, self.std)


@register("configuration")
class Pushforward(AbstractConfiguration):
    """`tx.configuration.Pushforward` around another."""

    kind: Literal["pushforward"] = "pushforward"
    configuration: _Inner
    num_steps: Count

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        inner = self.configuration.build(stepper, clock)
        return configurations.Pushforward(inner, self.num_steps)


@register("configuration")
class Curriculum(AbstractConfiguration):
    """`tx.configuration.Curriculum` around another: from `lengths[i]` on after
    `milestones[i - 1]`."""

    kind: Literal["curriculum"] = "curriculum"
    configuration: _Inner
    lengths: Annotated[tuple[Count, ...], Field(min_length=2)]
    milestones: Annotated[tuple[Positive, ...], Field(min_length=1)]
    unit: Literal["steps", "epochs"] = "steps"

    @pydantic.model_validator(mode="after")
    def _fit(self) -> "Curriculum":
        if len(self.lengths) != len(self.milestones) + 1:
            raise ValueError(
                "expected one milestone between two lengths, got "
                f"{len(self.lengths)} lengths and {len(self.milestones)} milestones."
            )
        return self

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        inner = self.configuration.build(stepper, clock)
        length = clock(inner.num_times)
        at = [length.updates(m, self.unit) for m in self.milestones]
        pieces = [optax.constant_schedule(n) for n in self.lengths]
        return configurations.Curriculum(inner, optax.join_schedules(pieces, at))
