"""Branches of reference steps that divert from the model's own chain."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from trainax_pk._stepper import check_step, state_of, step_batch
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


class DivertedChain(AbstractConfiguration):
    """Diverted chain: model and reference run side by side from the model's states.

    With main chain u_{t+1} = f(u_t), reference P and branches of length N:

        L = Σ_{t=0}^{T-N} w_t Σ_{b=1}^{N} v_b · l(f^b(u_t), P^b(u_t))

    N = T is supervised training with the reference made on the fly, N = 1 is
    `DivertedChainBranchOne`. Only the initial condition of a window is read. Compute is
    (T - N + 1)·N model steps and as many reference steps, forward and backward; memory
    of the direct adjoint grows with the same product. The adjoint acts on the main
    chain; the program's size depends on neither T nor N.

    Attributes:
        num_rollout_steps: T.
        num_branch_steps: N, at most T.
        ref_stepper: P, a callable `u -> u_next`, or a `Stepper`.
        time_level_loss: `(prediction, target) -> scalar` of one sample, averaged over
            the batch; or a `BatchLoss`.
        cut_bptt: Stop the gradient between the model's steps, in chain and branches.
        cut_bptt_every: ... after every so many steps from the window's start only.
        cut_div_chain: Stop the gradient into the reference; P need not be
            differentiable then.
        time_level_weights: `(T,)`, of which the first T - N + 1 are used (as trainax
            does); ones by default.
        branch_level_weights: `(N,)`; ones by default.
        adjoint: How the loop over the main chain is differentiated.
        horizon: Length h of the rollout that counts, N to T, traced; None for T. The
            T - N + 1 branches become h - N + 1, at least one. `Curriculum` sets it.

    Raises:
        ValueError: When built: a count below 1, a branch longer than the rollout, a
            wrong number of weights. When called: a model or reference that changes
            shape or dtype, a missing key.

    Source: trainax (github.com/Ceyron/trainax), `DivertedChain`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> double = lambda u: 2 * u
        >>> chain = tx.configuration.DivertedChain(2, 1, ref_stepper=double)
        >>> chain(lambda u: 3 * u, jnp.ones((1, 1, 1)))[0]  # (3 - 2)² + (9 - 6)²
        Array(10., dtype=float32)
    """

    num_rollout_steps: int = eqx.field(static=True)
    num_branch_steps: int = eqx.field(static=True)
    ref_stepper: Callable[..., Any]
    time_level_loss: Callable[..., Array]
    cut_bptt: bool = eqx.field(static=True)
    cut_bptt_every: int = eqx.field(static=True)
    cut_div_chain: bool = eqx.field(static=True)
    time_level_weights: Float[Array, " T"]
    branch_level_weights: Float[Array, " N"]
    adjoint: AbstractAdjoint
    horizon: Int[Array, ""] | None

    def __init__(
        self,
        num_rollout_steps: int = 1,
        num_branch_steps: int = 1,
        *,
        ref_stepper: Callable[..., Any],
        time_level_loss: Callable[..., Array] = mse,
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_div_chain: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
        branch_level_weights: Float[Array, " N"] | None = None,
        adjoint: AbstractAdjoint | Any = None,
        horizon: Int[Array, ""] | None = None,
    ) -> None:
        self.num_rollout_steps = check_count("num_rollout_steps", num_rollout_steps)
        self.num_branch_steps = check_count("num_branch_steps", num_branch_steps)
        if num_branch_steps > num_rollout_steps:
            raise ValueError(
                "Expected `num_branch_steps` to be at most `num_rollout_steps` "
                f"({num_rollout_steps}), got {num_branch_steps}. Shorten the branch."
            )
        self.ref_stepper = check_callable("ref_stepper", ref_stepper)
        self.time_level_loss = check_callable("time_level_loss", time_level_loss)
        cuts = check_cuts(cut_bptt, cut_bptt_every)
        self.cut_bptt, self.cut_bptt_every = cuts
        self.cut_div_chain = check_flag("cut_div_chain", cut_div_chain)
        self.time_level_weights = check_weights(
            "time_level_weights", time_level_weights, num_rollout_steps, "time levels"
        )
        self.branch_level_weights = check_weights(
            "branch_level_weights",
            branch_level_weights,
            num_branch_steps,
            "steps of a branch",
        )
        self.adjoint = to_rollout_adjoint(
            DirectAdjoint() if adjoint is None else adjoint
        )
        self.horizon = check_horizon(horizon, num_rollout_steps, num_branch_steps)

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
        """Loss from initial conditions.

        `Aux.time_losses` is `(T - N + 1,)`: Σ_b v_b · l of each branch, before w_t.
        """
        window = as_window(batch, self.num_times, "DivertedChain")
        u0 = initial(window)
        model_key, ref_key = two_keys(key)
        for name, stepper in (("model", model), ("ref_stepper", self.ref_stepper)):
            not_bundled(stepper, f"DivertedChain ({name})")
            check_step(stepper, window, u0, key, name, num_steps=self.num_rollout_steps)
        advance = _both_steps(self, model, window, model_key, ref_key)

        def branch_body(carry: PyTree, x: PyTree) -> tuple[PyTree, Array]:
            (pred, ref, states, t), (b, weight) = carry, x
            pred, ref, states, loss = advance(pred, ref, states, t + b)
            return (pred, ref, states, t), weight.astype(loss.dtype) * loss

        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, Array]:
            (u, states), (t, _) = carry, x
            # The branch's first step is also the main chain's next one.
            ref = cut(u, when=self.cut_div_chain)
            pred, ref, states, loss = advance(u, ref, states, t)
            loss = self.branch_level_weights[0].astype(loss.dtype) * loss
            if self.num_branch_steps > 1:
                rest = jnp.arange(1, self.num_branch_steps, dtype=jnp.int32)
                _, more = jax.lax.scan(
                    branch_body,
                    (pred, ref, states, t),
                    (rest, self.branch_level_weights[1:]),
                )
                loss = loss + jnp.sum(more)
            return (pred, states), loss

        num_branches = self.num_rollout_steps - self.num_branch_steps + 1
        horizon = self.horizon
        if horizon is not None:
            horizon = horizon - self.num_branch_steps + 1
        (_, (nn_state, _)), losses = chain(
            body,
            (u0, (state_of(model), state_of(self.ref_stepper))),
            None,
            num_branches,
            adjoint=self.adjoint,
            horizon=horizon,
        )
        loss = weighted_sum(self.time_level_weights[:num_branches], losses)
        return loss, Aux(time_losses=losses, model_state=nn_state)


def DivertedChainBranchOne(  # noqa: N802
    num_rollout_steps: int = 1, **options: Any
) -> DivertedChain:
    """`DivertedChain` with branches of one step: Σ_t w_t · l(f(u_t), P(u_t)).

    Args:
        num_rollout_steps: Number T of steps of the main chain.
        **options: As `DivertedChain`: ref_stepper, time_level_loss, cut_bptt,
            cut_bptt_every, cut_div_chain, time_level_weights, adjoint.

    Returns:
        The configuration.

    Raises:
        ValueError: As `DivertedChain`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> double = lambda u: 2 * u
        >>> one = tx.configuration.DivertedChainBranchOne(3, ref_stepper=double)
        >>> one.num_branch_steps
        1
    """
    return DivertedChain(num_rollout_steps, 1, **options)


def _both_steps(
    configuration: DivertedChain,
    model: Any,
    window: Window,
    model_key: Any,
    ref_key: Any,
) -> Callable[..., Any]:
    def advance(pred: PyTree, ref: PyTree, states: PyTree, t: Array) -> Any:
        nn_state, ref_state = states
        pred, nn_state = step_batch(
            model, (pred,), nn_state, t=t, window=window, key=model_key
        )
        ref, ref_state = step_batch(
            configuration.ref_stepper,
            (ref,),
            ref_state,
            t=t,
            window=window,
            key=ref_key,
        )
        loss = reduce_batch(configuration.time_level_loss, pred, ref)
        here = is_cut(
            t + 1,
            cut_bptt=configuration.cut_bptt,
            every=configuration.cut_bptt_every,
        )
        return cut(pred, when=here), ref, (nn_state, ref_state), loss

    return advance
