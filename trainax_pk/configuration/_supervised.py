"""Rollout against reference states."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from trainax_pk._stepper import (
    bundle_of,
    check_step,
    state_of,
    step_batch,
)
from trainax_pk._tree import check_count, check_weights
from trainax_pk._types import Window
from trainax_pk.adjoint import AbstractAdjoint, DirectAdjoint, to_rollout_adjoint
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import (
    as_window,
    chain,
    check_callable,
    check_cuts,
    check_horizon,
    cut,
    initial,
    is_cut,
    targets,
    weighted_sum,
)
from trainax_pk.loss import mse, reduce_batch


class Supervised(AbstractConfiguration):
    """Supervised rollout: Σ_t w_t · l(u_t, r_t) with u_0 = r_0, u_{t+1} = f(u_t).

    One rollout step is classical one-step supervised learning. Compute is T forward
    and backward passes of the model; memory is set by the adjoint (`DirectAdjoint`:
    grows with T). The program's size does not depend on T.

    A stepper with `bundle=m` is called T / m times and compared at all T times.

    Attributes:
        num_rollout_steps: Number T of times, a multiple of the model's bundle.
        time_level_loss: `(prediction, target) -> scalar` of one sample, averaged over
            the batch; or a `BatchLoss`.
        cut_bptt: Stop the gradient between calls of the model.
        cut_bptt_every: ... after every so many calls only.
        time_level_weights: `(T,)`; ones by default.
        adjoint: How the loop over time is differentiated.
        horizon: Number of times that count, traced; None for all T. `Curriculum` sets
            it. The others are skipped, not computed.

    Raises:
        ValueError: When built: a count below 1, a wrong number of weights. When called:
            windows of fewer than T + 1 times, a model that changes shape or dtype.

    Source: trainax (github.com/Ceyron/trainax), `Supervised`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> configuration = tx.configuration.Supervised(2)
        >>> window = jnp.array([[[1.0], [2.0], [4.0]]])  # (B=1, L=3, dof=1)
        >>> configuration(lambda u: 3 * u, window)[0]  # (3 - 2)² + (9 - 4)²
        Array(26., dtype=float32)
    """

    num_rollout_steps: int = eqx.field(static=True)
    time_level_loss: Callable[..., Array]
    cut_bptt: bool = eqx.field(static=True)
    cut_bptt_every: int = eqx.field(static=True)
    time_level_weights: Float[Array, " T"]
    adjoint: AbstractAdjoint
    horizon: Int[Array, ""] | None

    def __init__(
        self,
        num_rollout_steps: int = 1,
        *,
        time_level_loss: Callable[..., Array] = mse,
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        time_level_weights: Float[Array, " T"] | None = None,
        adjoint: AbstractAdjoint | Any = None,
        horizon: Int[Array, ""] | None = None,
    ) -> None:
        self.num_rollout_steps = check_count("num_rollout_steps", num_rollout_steps)
        self.time_level_loss = check_callable("time_level_loss", time_level_loss)
        cuts = check_cuts(cut_bptt, cut_bptt_every)
        self.cut_bptt, self.cut_bptt_every = cuts
        self.time_level_weights = check_weights(
            "time_level_weights", time_level_weights, num_rollout_steps, "time levels"
        )
        self.adjoint = to_rollout_adjoint(
            DirectAdjoint() if adjoint is None else adjoint
        )
        self.horizon = check_horizon(horizon, num_rollout_steps)

    @property
    def num_times(self) -> int:
        """T + 1."""
        return self.num_rollout_steps + 1

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss on windows of T + 1 times; `Aux.time_losses` is `(T,)`."""
        window = as_window(batch, self.num_times, "Supervised")
        u0 = initial(window)
        check_step(model, window, u0, key, "model", num_steps=self.num_rollout_steps)
        bundle = bundle_of(model)
        num_calls = self._num_calls(bundle)
        reference = targets(window, 1, self.num_rollout_steps)
        if bundle > 1:
            reference = jax.tree.map(
                lambda x: x.reshape(num_calls, bundle, *x.shape[1:]), reference
            )

        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, Array]:
            (u, nn_state), (i, target) = carry, x
            out, nn_state = step_batch(
                model, (u,), nn_state, t=i * bundle, window=window, key=key
            )
            if bundle == 1:
                losses, u = reduce_batch(self.time_level_loss, out, target), out
            else:
                times = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), out)
                losses = jax.vmap(
                    lambda p, r: reduce_batch(self.time_level_loss, p, r)
                )(times, target)
                u = jax.tree.map(lambda x: x[-1], times)
            here = is_cut(i + 1, cut_bptt=self.cut_bptt, every=self.cut_bptt_every)
            u = cut(u, when=here)
            return (u, nn_state), losses

        # A call counts while the first time that it returns lies within the horizon.
        horizon = None if self.horizon is None else -(-self.horizon // bundle)
        (_, nn_state), losses = chain(
            body,
            (u0, state_of(model)),
            reference,
            num_calls,
            adjoint=self.adjoint,
            horizon=horizon,
        )
        losses = losses.reshape(self.num_rollout_steps)
        if self.horizon is not None and bundle > 1:
            losses = jnp.where(
                jnp.arange(self.num_rollout_steps) < jnp.maximum(self.horizon, 1),
                losses,
                0.0,
            )
        loss = weighted_sum(self.time_level_weights, losses)
        return loss, Aux(time_losses=losses, model_state=nn_state)

    def _num_calls(self, bundle: int) -> int:
        if self.num_rollout_steps % bundle:
            raise ValueError(
                f"Expected `num_rollout_steps` to be a multiple of the model's bundle "
                f"({bundle}), got {self.num_rollout_steps}. Change one of the two."
            )
        return self.num_rollout_steps // bundle
