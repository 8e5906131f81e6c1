"""One update as a pure function."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from trainax_pk._stepper import state_of
from trainax_pk._tree import global_norm, plain_norm, select, stays_finite
from trainax_pk.configuration import AbstractConfiguration, Aux, at_step
from trainax_pk.step._accumulate import mean_loss, mean_value_and_grad
from trainax_pk.step._devices import average, per_device
from trainax_pk.step._keys import stream_key
from trainax_pk.step._options import (
    SKIP_GRADIENT,
    NonFinite,
    as_decays,
    check_options,
    check_parts_of_batch,
    check_policies,
)
from trainax_pk.step._precision import in_precision
from trainax_pk.step._state import TrainState


class Info(eqx.Module):
    """What an update reports; never carried.

    Attributes:
        loss: Loss before the update, averaged over devices.
        aux: What the configuration reports.
        grad_norm: Euclidean norm of the gradient, before clipping.
        learning_rate: Where the optimizer holds one as a hyper-parameter, else None.
        skipped: Whether the update was left out because it was not finite.
    """

    loss: Float[Array, ""]
    aux: Aux
    grad_norm: Float[Array, ""]
    learning_rate: Array | None
    skipped: Bool[Array, ""]


def make_train_step(
    configuration: AbstractConfiguration,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    compute_dtype: Any = None,
    ema_decay: float | Sequence[float] | None = None,
    nonfinite: NonFinite = "raise",
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree[Array]], tuple[TrainState, Info]]:
    """A pure function `(TrainState, batch) -> (TrainState, Info)`.

    It composes with jit, vmap (ensembles of models, seeds, learning rates), pmap and
    shard_map, scan, and grad (hyper-gradients through training). One update costs one
    evaluation of the loss and its gradient; with n accumulated parts as much, at the
    memory of a batch n times smaller.

    Complex leaves descend along the conjugate of JAX's gradient, which is the direction
    of steepest descent.

    Args:
        configuration: The compute graph of the loss.
        optimizer: An optax transformation. Those that take `value`, `grad`, `value_fn`
            (L-BFGS, line searches) get them.
        accumulate: Number n of parts that a batch is split into, one after another;
            gradients and losses are averaged, so that losses have to be means over
            samples: a `BatchLoss` is refused.
        max_grad_norm: Scale gradients down to this Euclidean norm.
        compute_dtype: `jnp.bfloat16`: the model computes in it; states between steps,
            losses, gradients, parameters and layers' states keep their precision.
        ema_decay: Decay d of the moving average, with warm-up min(d, (1+n)/(10+n)); the
            state has to be created with `ema=True`. Several decays keep as many
            averages, of a state created with `ema=` their number.
        nonfinite: What to do when loss, gradient or what the optimizer makes of it is
            not finite. "skip" leaves the update out and counts it. "raise" does that to
            this and every later update; the engine and the trainers raise
            FloatingPointError then, a loop of one's own reads `Info.skipped`. "ignore"
            updates all the same, and saves the check.
        axis_name: Name of the mapped axis over which gradients are averaged, and loss
            and layers' states with them; a `BatchLoss` is refused.

    Returns:
        The step. Its noise at update n is a function of the state's key and n alone.

    Raises:
        ValueError: When built: an option out of its range, no configuration or
            optimizer, a `BatchLoss` of parts of a batch. When called: a batch that
            `accumulate` does not divide, a state with a moving average and no
            `ema_decay`, or the other way round.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> sgd = optax.sgd(0.1)
        >>> state = tx.TrainState.create(model, sgd, key=jax.random.key(1))
        >>> step = tx.make_train_step(tx.configuration.Supervised(), sgd)
        >>> state, info = jax.jit(step)(state, jnp.ones((8, 2, 2)))
        >>> int(state.step), bool(info.skipped)
        (1, False)
    """
    check_options(configuration, optimizer, accumulate, max_grad_norm, compute_dtype)
    decays = as_decays(ema_decay)
    check_policies(nonfinite, axis_name)
    check_parts_of_batch(configuration, accumulate, axis_name)
    update_rule = optax.with_extra_args_support(optimizer)
    # Where nothing is decided by it, the norm may overflow before its entries do.
    only_reported = nonfinite == "ignore" and max_grad_norm is None
    norm_of = plain_norm if only_reported else global_norm

    def step(state: TrainState, batch: PyTree[Array]) -> tuple[TrainState, Info]:
        _check_average(state, decays)
        objective = _Objective(
            at_step(configuration, state.step),
            per_device(state.buffers, axis_name),
            state,
            batch,
            _key(state, axis_name),
            accumulate,
            compute_dtype,
            axis_name,
        )
        loss, aux, grads = objective.value_and_grad(state.params)
        grad_norm = norm_of(grads)
        if max_grad_norm is not None:
            # The quotient of two numbers of which neither can be 0.
            scale = max_grad_norm / jnp.maximum(grad_norm, max_grad_norm)
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        updates, opt_state = update_rule.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=objective.value_fn(),
        )
        params = optax.apply_updates(state.params, updates)
        new = _advance(state, params, opt_state, aux, decays)
        new, skipped = _guard(state, new, loss, grad_norm, nonfinite)
        info = Info(loss, aux, grad_norm, _learning_rate(opt_state), skipped)
        return new, info

    return step


class _Objective(eqx.Module):
    """Loss and gradient of a batch as functions of the trained leaves."""

    configuration: AbstractConfiguration
    buffers: PyTree[Array]
    state: TrainState
    batch: PyTree[Array]
    key: PRNGKeyArray
    parts: int
    compute_dtype: Any
    axis_name: str | None

    def value_and_grad(self, params: PyTree[Array]) -> tuple[Array, Aux, PyTree[Array]]:
        """Averaged over parts and devices; the gradient points uphill."""
        params = per_device(params, self.axis_name)
        loss, aux, grads = mean_value_and_grad(
            self._part, params, self._layers(), self.batch, self.key, self.parts
        )
        loss, aux, grads = average((loss, aux, grads), self.axis_name)
        # For complex leaves JAX returns the conjugate of the uphill direction.
        return loss, aux, jax.tree.map(jnp.conj, grads)

    def value_fn(self) -> Callable[[PyTree[Array]], Array]:
        """The loss, for line searches, which may differentiate it."""
        if self.axis_name is None:
            return self._value

        # Whether JAX averages the gradient of a mean over devices depends on how these
        # are mapped over; with a rule of its own the gradient is that of the update.
        @jax.custom_vjp
        def value(params: PyTree[Array]) -> Array:
            return self._value(params)

        def forward(params: PyTree[Array]) -> Any:
            loss, _, grads = self.value_and_grad(params)
            return loss, jax.tree.map(jnp.conj, grads)

        def backward(grads: PyTree[Array], cotangent: Array) -> Any:
            return (jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grads),)

        value.defvjp(forward, backward)
        return value

    def _value(self, params: PyTree[Array]) -> Array:
        params = per_device(params, self.axis_name)
        args = (params, self._layers(), self.batch, self.key, self.parts)
        return average(mean_loss(self._part, *args), self.axis_name)

    def _part(
        self, params: PyTree[Array], layers: Any, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, Aux]:
        model = self._model(params)
        if layers is not None:
            model = eqx.tree_at(lambda m: m.state, model, layers)
        return self.configuration(
            in_precision(model, self.compute_dtype), batch, key=key
        )

    def _model(self, params: PyTree[Array]) -> Any:
        return eqx.combine(params, self.buffers, self.state.static.tree)

    def _layers(self) -> Any:
        return state_of(self._model(self.state.params))


def _key(state: TrainState, axis_name: str | None) -> PRNGKeyArray:
    key = stream_key(state.key, "train", state.step)
    if axis_name is None:
        return key
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _check_average(state: TrainState, decays: tuple[float, ...]) -> None:
    if decays and state.ema is None:
        raise ValueError(
            "Expected a state with a moving average for ema_decay, got none. "
            "Create it with TrainState.create(..., ema=True)."
        )
    if not decays and state.ema is not None:
        raise ValueError(
            "Expected `ema_decay` for a state with a moving average, got None; the "
            "average would stay where it is. Pass make_train_step(..., ema_decay=...)."
        )
    if len(decays) > 1 or state.more_ema:
        if len(decays) != 1 + len(state.more_ema):
            raise ValueError(
                f"Expected a moving average for each of the {len(decays)} decays, got "
                f"{1 + len(state.more_ema)}. Create the state with TrainState.create(..., "
                f"ema={len(decays)})."
            )


def _advance(
    state: TrainState,
    params: PyTree[Array],
    opt_state: PyTree[Array],
    aux: Aux,
    decays: tuple[float, ...],
) -> TrainState:
    averages = [
        _average(ema, params, decay, state.step)
        for ema, decay in zip((state.ema, *state.more_ema), decays, strict=False)
    ]
    buffers = state.buffers
    if aux.model_state is not None:
        model = eqx.tree_at(lambda m: m.state, state.model, aux.model_state)
        _, buffers = state.split(model)
    return TrainState(
        params=params,
        buffers=buffers,
        opt_state=opt_state,
        ema=averages[0] if averages else None,
        more_ema=tuple(averages[1:]),
        step=state.step + 1,
        num_skipped=state.num_skipped,
        key=state.key,
        static=state.static,
    )


def _average(
    ema: PyTree[Array], params: PyTree[Array], decay: float, step: Array
) -> PyTree[Array]:
    count = step.astype(jnp.result_type(float)) + 1
    warm = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(
        lambda e, p: e + (1 - warm).astype(p.real.dtype) * (p - e), ema, params
    )


def _guard(
    old: TrainState,
    new: TrainState,
    loss: Array,
    grad_norm: Array,
    nonfinite: NonFinite,
) -> tuple[TrainState, Array]:
    """The new state, or where an update is not finite the old one, counted."""
    if nonfinite == "ignore":
        return new, jnp.zeros((), bool)
    # The norm does not overflow while the gradient is finite.
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if nonfinite is not SKIP_GRADIENT:
        # An optimizer may divide a finite gradient by zero.
        ok = ok & stays_finite(new.params, old.params)
    if nonfinite == "raise":
        ok = ok & (old.num_skipped == 0)
    kept = select(ok, new, old)
    kept = eqx.tree_at(
        lambda s: (s.step, s.num_skipped),
        kept,
        (new.step, old.num_skipped + jnp.where(ok, 0, 1).astype(jnp.int32)),
    )
    return kept, ~ok


def _learning_rate(opt_state: PyTree[Array]) -> Array | None:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    # Beside the value there may be the state of its schedule, under the same name.
    numbers = [value for _, value in found if eqx.is_array_like(value)]
    return jnp.asarray(numbers[0]) if numbers else None
