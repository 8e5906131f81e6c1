"""Training on a condition between two times, without reference states."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from trainax_pk._stepper import (
    bundle_of,
    check_inputs,
    check_key,
    check_step,
    state_of,
    step_batch,
)
from trainax_pk._tree import check_count, check_flag, check_weights
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
    not_bundled,
    two_keys,
    weighted_sum,
)
from trainax_pk.loss import mse, reduce_batch


class Residuum(AbstractConfiguration):
    """Residuum rollout: Σ_t w_t · l(R(u_{t+1}, u_t)) with u_{t+1} = f(u_t).

    R vanishes when u_{t+1} follows u_t under the discretised physics (an implicit
    scheme, say, that need not be solved). Only the initial condition of a window is
    read. Compute is T model steps and residua, forward and backward.

    Attributes:
        num_rollout_steps: T.
        residuum_fn: R, `(u_next, u_prev) -> residuum` of one sample; as a `Stepper`
            with `conditioned=True` it receives the inputs as third argument.
        time_level_loss: `(residuum, None) -> scalar` of one sample, averaged over the
            batch; or a `BatchLoss`.
        cut_bptt: Stop the gradient between the model's steps.
        cut_bptt_every: ... after every so many steps only.
        cut_prev: Stop the gradient into R's second argument.
        cut_next: Stop the gradient into R's first argument.
        time_level_weights: `(T,)`; ones by default.
        adjoint: How the loop over time is differentiated.
        horizon: Number of steps that count, traced; None for all. `Curriculum` sets it.

    Raises:
        ValueError: When built: a count below 1, a wrong number of weights. When called:
            a model that changes shape or dtype, a missing key.

    Source: trainax (github.com/Ceyron/trainax), `Residuum`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> doubled = lambda u_next, u_prev: u_next - 2 * u_prev
        >>> residuum = tx.configuration.Residuum(2, residuum_fn=doubled)
        >>> residuum(lambda u: 3 * u, jnp.ones((1, 1, 1)))[0]  # 1² + 3²
        Array(10., dtype=float32)
    """

    num_rollout_steps: int = eqx.field(static=True)
    residuum_fn: Callable[..., Any]
    time_level_loss: Callable[..., Array]
    cut_bptt: bool = eqx.field(static=True)
    cut_bptt_every: int = eqx.field(static=True)
    cut_prev: bool = eqx.field(static=True)
    cut_next: bool = eqx.field(static=True)
    time_level_weights: Float[Array, " T"]
    adjoint: AbstractAdjoint
    horizon: Int[Array, ""] | None

    def __init__(
        self,
        num_rollout_steps: int = 1,
        *,
        residuum_fn: Callable[..., Any],
        time_level_loss: Callable[..., Array] = mse,
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_prev: bool = False,
        cut_next: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
        adjoint: AbstractAdjoint | Any = None,
        horizon: Int[Array, ""] | None = None,
    ) -> None:
        self.num_rollout_steps = check_count("num_rollout_steps", num_rollout_steps)
        self.residuum_fn = check_callable("residuum_fn", residuum_fn)
        if state_of(residuum_fn) is not None or bundle_of(residuum_fn) > 1:
            raise ValueError(
                "Expected a `residuum_fn` without state or bundle, got "
                f"{residuum_fn!r}. Only the model may carry a state."
            )
        self.time_level_loss = check_callable("time_level_loss", time_level_loss)
        cuts = check_cuts(cut_bptt, cut_bptt_every)
        self.cut_bptt, self.cut_bptt_every = cuts
        self.cut_prev = check_flag("cut_prev", cut_prev)
        self.cut_next = check_flag("cut_next", cut_next)
        self.time_level_weights = check_weights(
            "time_level_weights", time_level_weights, num_rollout_steps, "time levels"
        )
        self.adjoint = to_rollout_adjoint(
            DirectAdjoint() if adjoint is None else adjoint
        )
        self.horizon = check_horizon(horizon, num_rollout_steps)

    @property
    def num_times(self) -> int:
        """1: the initial condition."""
        return 1

    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss from initial conditions; `Aux.time_losses` is `(T,)`."""
        window = as_window(batch, self.num_times, "Residuum")
        u0 = initial(window)
        not_bundled(model, "Residuum")
        num_steps = self.num_rollout_steps
        check_step(model, window, u0, key, "model", num_steps=num_steps)
        check_inputs(self.residuum_fn, window, num_steps, "residuum_fn")
        check_key(self.residuum_fn, key, "residuum_fn")
        model_key, residuum_key = two_keys(key)

        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, Array]:
            (u, nn_state), (i, _) = carry, x
            u_next, nn_state = step_batch(
                model, (u,), nn_state, t=i, window=window, key=model_key
            )
            pair = (cut(u_next, when=self.cut_next), cut(u, when=self.cut_prev))
            residuum, _ = step_batch(
                self.residuum_fn, pair, None, t=i, window=window, key=residuum_key
            )
            loss = reduce_batch(self.time_level_loss, residuum, None)
            here = is_cut(i + 1, cut_bptt=self.cut_bptt, every=self.cut_bptt_every)
            return (cut(u_next, when=here), nn_state), loss

        (_, nn_state), losses = chain(
            body,
            (u0, state_of(model)),
            None,
            self.num_rollout_steps,
            adjoint=self.adjoint,
            horizon=self.horizon,
        )
        loss = weighted_sum(self.time_level_weights, losses)
        return loss, Aux(time_losses=losses, model_state=nn_state)
