"""trainax's configurations: reference and residuum are passed at the call."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from trainax_pk import configuration as core
from trainax_pk._tree import check_weights
from trainax_pk.adjoint import DirectAdjoint
from trainax_pk.compat._precision import as_answered
from trainax_pk.compat.loss import BaseLoss, MSELoss
from trainax_pk.configuration._chain import cut, is_cut, weighted_sum
from trainax_pk.loss import BatchLoss


class BaseConfiguration(eqx.Module):
    """A compute graph of training, `(stepper, data, *, ref_stepper, residuum_fn)`.

    To add one: subclass and implement `__call__`.
    """

    @abc.abstractmethod
    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Loss on windows, leaves `(B, L, ...)`."""


class Supervised(BaseConfiguration):
    """Supervised rollout; see `trainax_pk.configuration.Supervised`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> tx.configuration.Supervised(2)(lambda u: 3 * u, window)  # (3 - 2)² + (9 - 4)²
        Array(26., dtype=float32)
    """

    num_rollout_steps: int
    time_level_loss: BaseLoss
    cut_bptt: bool
    cut_bptt_every: int
    time_level_weights: Float[Array, " T"]

    def __init__(
        self,
        num_rollout_steps: int = 1,
        *,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        time_level_weights: Float[Array, " T"] | None = None,
    ) -> None:
        self.num_rollout_steps = num_rollout_steps
        self.time_level_loss = time_level_loss
        self.cut_bptt = cut_bptt
        self.cut_bptt_every = cut_bptt_every
        self.time_level_weights = _weights(time_level_weights, num_rollout_steps)

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Loss on windows of at least T + 1 times."""
        del ref_stepper, residuum_fn
        return core.Supervised(
            self.num_rollout_steps,
            time_level_loss=BatchLoss(self.time_level_loss),
            cut_bptt=bool(self.cut_bptt),
            cut_bptt_every=self.cut_bptt_every,
            time_level_weights=self.time_level_weights,
        )(stepper, as_answered(data, stepper))[0]


class DivertedChain(BaseConfiguration):
    """Diverted chain; see `trainax_pk.configuration.DivertedChain`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> chain = tx.configuration.DivertedChain(2, 2)
        >>> chain(lambda u: 3 * u, jnp.ones((1, 1, 1)), ref_stepper=lambda u: 2 * u)
        Array(26., dtype=float32)
    """

    num_rollout_steps: int
    num_branch_steps: int
    time_level_loss: BaseLoss
    cut_bptt: bool
    cut_bptt_every: int
    cut_div_chain: bool
    time_level_weights: Float[Array, " T"]
    branch_level_weights: Float[Array, " N"]

    def __init__(
        self,
        num_rollout_steps: int = 1,
        num_branch_steps: int = 1,
        *,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_div_chain: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
        branch_level_weights: Float[Array, " N"] | None = None,
    ) -> None:
        if num_branch_steps > num_rollout_steps:
            raise ValueError(
                "Expected num_branch_steps to be less than or equal to "
                f"num_rollout_steps ({num_rollout_steps}), got {num_branch_steps}."
            )
        self.num_rollout_steps = num_rollout_steps
        self.num_branch_steps = num_branch_steps
        self.time_level_loss = time_level_loss
        self.cut_bptt = cut_bptt
        self.cut_bptt_every = cut_bptt_every
        self.cut_div_chain = cut_div_chain
        self.time_level_weights = _weights(time_level_weights, num_rollout_steps)
        self.branch_level_weights = _weights(branch_level_weights, num_branch_steps)

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Loss from the windows' initial conditions."""
        del residuum_fn
        return core.DivertedChain(
            self.num_rollout_steps,
            self.num_branch_steps,
            ref_stepper=ref_stepper,
            time_level_loss=BatchLoss(self.time_level_loss),
            cut_bptt=bool(self.cut_bptt),
            cut_bptt_every=self.cut_bptt_every,
            cut_div_chain=bool(self.cut_div_chain),
            time_level_weights=self.time_level_weights,
            branch_level_weights=self.branch_level_weights,
        )(stepper, as_answered(data, stepper, ref_stepper))[0]


class DivertedChainBranchOne(BaseConfiguration):
    """Diverted chain with branches of one step.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> one = tx.configuration.DivertedChainBranchOne(2)
        >>> one(lambda u: 3 * u, jnp.ones((1, 1, 1)), ref_stepper=lambda u: 2 * u)
        Array(10., dtype=float32)
    """

    num_rollout_steps: int
    time_level_loss: BaseLoss
    cut_bptt: bool
    cut_bptt_every: int
    cut_div_chain: bool
    time_level_weights: Float[Array, " T"]

    def __init__(
        self,
        num_rollout_steps: int = 1,
        *,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_div_chain: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
    ) -> None:
        self.num_rollout_steps = num_rollout_steps
        self.time_level_loss = time_level_loss
        self.cut_bptt = cut_bptt
        self.cut_bptt_every = cut_bptt_every
        self.cut_div_chain = cut_div_chain
        self.time_level_weights = _weights(time_level_weights, num_rollout_steps)

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Loss from the windows' initial conditions."""
        del residuum_fn
        return core.DivertedChainBranchOne(
            self.num_rollout_steps,
            ref_stepper=ref_stepper,
            time_level_loss=BatchLoss(self.time_level_loss),
            cut_bptt=bool(self.cut_bptt),
            cut_bptt_every=self.cut_bptt_every,
            cut_div_chain=bool(self.cut_div_chain),
            time_level_weights=self.time_level_weights,
        )(stepper, as_answered(data, stepper, ref_stepper))[0]


class MixChainPostPhysics(BaseConfiguration):
    """Model steps, then physics; see `trainax_pk.configuration.MixChainPostPhysics`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> mix = tx.configuration.MixChainPostPhysics()
        >>> mix(lambda u: 3 * u, window, ref_stepper=lambda u: 2 * u)
        Array(5., dtype=float32)
    """

    num_rollout_steps: int
    time_level_loss: BaseLoss
    num_post_physics_steps: int
    cut_bptt: bool
    cut_bptt_every: int
    time_level_weights: Float[Array, " T+M"]

    def __init__(
        self,
        num_rollout_steps: int = 1,
        num_post_physics_steps: int = 1,
        *,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        time_level_weights: Float[Array, " T+M"] | None = None,
    ) -> None:
        self.num_rollout_steps = num_rollout_steps
        self.time_level_loss = time_level_loss
        self.num_post_physics_steps = num_post_physics_steps
        self.cut_bptt = cut_bptt
        self.cut_bptt_every = cut_bptt_every
        self.time_level_weights = _weights(
            time_level_weights, num_rollout_steps + num_post_physics_steps
        )

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Loss on windows of at least T + M + 1 times."""
        del residuum_fn
        return core.MixChainPostPhysics(
            self.num_rollout_steps,
            self.num_post_physics_steps,
            ref_stepper=ref_stepper,
            time_level_loss=BatchLoss(self.time_level_loss),
            cut_bptt=bool(self.cut_bptt),
            cut_bptt_every=self.cut_bptt_every,
            time_level_weights=self.time_level_weights,
        )(stepper, as_answered(data, stepper, ref_stepper))[0]


class Residuum(BaseConfiguration):
    """Residuum rollout; the residuum function sees batches, as in trainax.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> doubled = lambda u_next, u_prev: u_next - 2 * u_prev
        >>> residuum = tx.configuration.Residuum(2)
        >>> residuum(lambda u: 3 * u, jnp.ones((1, 1, 1)), residuum_fn=doubled)
        Array(10., dtype=float32)
    """

    num_rollout_steps: int
    time_level_loss: BaseLoss
    cut_bptt: bool
    cut_bptt_every: int
    cut_prev: bool
    cut_next: bool
    time_level_weights: Float[Array, " T"]

    def __init__(
        self,
        num_rollout_steps: int = 1,
        *,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_prev: bool = False,
        cut_next: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
    ) -> None:
        self.num_rollout_steps = num_rollout_steps
        self.time_level_loss = time_level_loss
        self.cut_bptt = cut_bptt
        self.cut_bptt_every = cut_bptt_every
        self.cut_prev = cut_prev
        self.cut_next = cut_next
        self.time_level_weights = _weights(time_level_weights, num_rollout_steps)

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any,
    ) -> Float[Array, ""]:
        """Loss from the windows' initial conditions."""
        del ref_stepper
        data = as_answered(data, stepper)

        def body(u_prev: PyTree, t: Array) -> tuple[PyTree, Array]:
            u_next = jax.vmap(stepper)(u_prev)
            residuum = residuum_fn(
                cut(u_next, when=bool(self.cut_next)),
                cut(u_prev, when=bool(self.cut_prev)),
            )
            here = is_cut(
                t + 1, cut_bptt=bool(self.cut_bptt), every=self.cut_bptt_every
            )
            return cut(u_next, when=here), self.time_level_loss(residuum)

        # The core's residuum sees one sample; trainax's sees the batch, and may mix it.
        steps = jnp.arange(self.num_rollout_steps)
        initial = jax.tree.map(lambda x: x[:, 0], data)
        _, losses = DirectAdjoint().scan(body, initial, steps, self.num_rollout_steps)
        return weighted_sum(self.time_level_weights, losses)


class Composite(BaseConfiguration):
    """Weighted sum of configurations on the same batch.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> one = tx.configuration.Supervised(1)
        >>> both = tx.configuration.Composite([one, one], [1.0, 2.0])
        >>> both(lambda u: 3 * u, jnp.array([[[1.0], [2.0]]]))
        Array(3., dtype=float32)
    """

    configurations: list[BaseConfiguration]
    weights: list[float]

    def __init__(
        self, configurations: list[BaseConfiguration], weights: list[float]
    ) -> None:
        self.configurations = configurations
        self.weights = weights

    def __call__(
        self,
        stepper: Any,
        data: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
    ) -> Float[Array, ""]:
        """Σ w · L; as many weights as configurations."""
        if len(self.weights) != len(self.configurations):
            raise ValueError(
                f"Expected {len(self.configurations)} weights, one for each "
                f"configuration, got {len(self.weights)}. Pass as many weights."
            )
        losses = [
            member(stepper, data, ref_stepper=ref_stepper, residuum_fn=residuum_fn)
            for member in self.configurations
        ]
        return sum(w * loss for w, loss in zip(self.weights, losses, strict=True))


def _weights(weights: Any, length: int) -> Array:
    return check_weights("weights", weights, length, "levels")


__all__ = [
    "BaseConfiguration",
    "Composite",
    "DivertedChain",
    "DivertedChainBranchOne",
    "MixChainPostPhysics",
    "Residuum",
    "Supervised",
]
