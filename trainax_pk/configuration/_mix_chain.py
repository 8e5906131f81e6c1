"""Model steps, then physics steps, in one chain."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._stepper import check_step, state_of, step_batch
from trainax_pk._tree import check_count, check_weights
from trainax_pk._types import Window
from trainax_pk.adjoint import AbstractAdjoint, DirectAdjoint, to_rollout_adjoint
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import (
    as_window,
    chain,
    check_callable,
    check_cuts,
    cut,
    initial,
    is_cut,
    not_bundled,
    targets,
    weighted_sum,
)
from trainax_pk.loss import mse, reduce_batch


class MixChainPostPhysics(AbstractConfiguration):
    """T model steps followed by M steps of the physics, compared at all T + M times.

        L = Σ_{t=1}^{T+M} w_t · l(u_t, r_t),  u_{t+1} = f(u_t) for t < T, else P(u_t)

    The model is judged by what the physics makes of its output. Compute is T model and
    M physics steps, forward and backward. The physics steps are never cut. The adjoint
    acts on both loops; the program's size depends on neither T nor M.

    Attributes:
        num_rollout_steps: T.
        num_post_physics_steps: M.
        ref_stepper: P, a callable `u -> u_next`, or a `Stepper`.
        time_level_loss: `(prediction, target) -> scalar` of one sample, averaged over
            the batch; or a `BatchLoss`.
        cut_bptt: Stop the gradient after model steps.
        cut_bptt_every: ... after every so many only.
        time_level_weights: `(T + M,)`; ones by default.
        adjoint: How the loops are differentiated.

    Raises:
        ValueError: When built: a count below 1, a wrong number of weights. When called:
            windows of fewer than T + M + 1 times, a stepper that changes shape or
            dtype, a missing key.

    Source: trainax (github.com/Ceyron/trainax), `MixChainPostPhysics`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> mix = tx.configuration.MixChainPostPhysics(ref_stepper=lambda u: 2 * u)
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])
        >>> mix(lambda u: 3 * u, window)[0]  # (3 - 2)² + (2·3 - 4)²
        Array(5., dtype=float32)
    """

    num_rollout_steps: int = eqx.field(static=True)
    num_post_physics_steps: int = eqx.field(static=True)
    ref_stepper: Callable[..., Any]
    time_level_loss: Callable[..., Array]
    cut_bptt: bool = eqx.field(static=True)
    cut_bptt_every: int = eqx.field(static=True)
    time_level_weights: Float[Array, " T+M"]
    adjoint: AbstractAdjoint

    def __init__(
        self,
        num_rollout_steps: int = 1,
        num_post_physics_steps: int = 1,
        *,
        ref_stepper: Callable[..., Any],
        time_level_loss: Callable[..., Array] = mse,
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        time_level_weights: Float[Array, " T+M"] | None = None,
        adjoint: AbstractAdjoint | Any = None,
    ) -> None:
        self.num_rollout_steps = check_count("num_rollout_steps", num_rollout_steps)
        self.num_post_physics_steps = check_count(
            "num_post_physics_steps", num_post_physics_steps
        )
        self.ref_stepper = check_callable("ref_stepper", ref_stepper)
        self.time_level_loss = check_callable("time_level_loss", time_level_loss)
        cuts = check_cuts(cut_bptt, cut_bptt_every)
        self.cut_bptt, self.cut_bptt_every = cuts
        self.time_level_weights = check_weights(
            "time_level_weights",
            time_level_weights,
            num_rollout_steps + num_post_physics_steps,
            "time levels of model and physics",
        )
        self.adjoint = to_rollout_adjoint(
            DirectAdjoint() if adjoint is None else adjoint
        )

    @property
    def num_times(self) -> int:
        """T + M + 1."""
        return self.num_rollout_steps + self.num_post_physics_steps + 1

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss on windows of T + M + 1 times; `Aux.time_losses` is `(T + M,)`."""
        window = as_window(batch, self.num_times, "MixChainPostPhysics")
        u = initial(window)
        for name, stepper in (("model", model), ("ref_stepper", self.ref_stepper)):
            not_bundled(stepper, f"MixChainPostPhysics ({name})")
            check_step(stepper, window, u, key, name, num_steps=self.num_times - 1)
        model_steps = self.num_rollout_steps
        u, nn_state, first = self._run(
            model, u, 0, model_steps, window, key, cut_bptt=self.cut_bptt
        )
        _, _, last = self._run(
            self.ref_stepper,
            u,
            model_steps,
            self.num_post_physics_steps,
            window,
            key,
            cut_bptt=False,
        )
        losses = jnp.concatenate([first, last])
        loss = weighted_sum(self.time_level_weights, losses)
        return loss, Aux(time_losses=losses, model_state=nn_state)

    def _run(
        self,
        stepper: Any,
        u: PyTree[Array],
        start: int,
        count: int,
        window: Window,
        key: PRNGKeyArray | None,
        *,
        cut_bptt: bool,
    ) -> tuple[PyTree[Array], Any, Array]:
        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, Array]:
            (u, nn_state), (i, target) = carry, x
            u, nn_state = step_batch(
                stepper, (u,), nn_state, t=start + i, window=window, key=key
            )
            loss = reduce_batch(self.time_level_loss, u, target)
            here = is_cut(i + 1, cut_bptt=cut_bptt, every=self.cut_bptt_every)
            return (cut(u, when=here), nn_state), loss

        (u, nn_state), losses = chain(
            body,
            (u, state_of(stepper)),
            targets(window, start + 1, count),
            count,
            adjoint=self.adjoint,
        )
        return u, nn_state, losses
