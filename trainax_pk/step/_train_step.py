"""One update as a pure function."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from trainax_pk._stepper import Stepper
from trainax_pk._tree import (
    all_finite,
    cast_floating,
    check_count,
    global_norm_squared,
    is_floating,
    select,
)
from trainax_pk._types import Window
from trainax_pk.configuration import AbstractConfiguration, Aux, at_step
from trainax_pk.step._state import TrainState, check_optimizer

NonFinite = Literal["raise", "skip", "ignore"]
_STREAMS = {"train": 0, "evaluate": 1}


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


def stream_key(root: PRNGKeyArray, stream: str, step: Array) -> PRNGKeyArray:
    """Key of a named stream at a step: evaluation cannot disturb training.

    Args:
        root: Root key.
        stream: "train" or "evaluate".
        step: Number of updates done.

    Returns:
        `fold_in(fold_in(root, stream), step)`.

    Example:
        >>> import jax
        >>> from trainax_pk.step import stream_key
        >>> stream_key(jax.random.key(0), "train", 3).shape
        ()
    """
    return jax.random.fold_in(jax.random.fold_in(root, _STREAMS[stream]), step)


def make_train_step(
    configuration: AbstractConfiguration,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    compute_dtype: Any = None,
    ema_decay: float | None = None,
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
        accumulate: Parts that a batch is split into, one after another; gradients and
            losses are averaged.
        max_grad_norm: Scale gradients down to this Euclidean norm.
        compute_dtype: `jnp.bfloat16`: the model computes in it; states between steps,
            losses, gradients and parameters keep their precision.
        ema_decay: Decay d of the moving average, with warm-up min(d, (1+n)/(10+n)); the
            state has to be created with `ema=True`.
        nonfinite: What to do when loss or gradient is not finite. "skip" leaves the
            update out and counts it. "raise" does that to this and every later update;
            the engine and the trainers raise FloatingPointError then, a loop of one's
            own reads `Info.skipped`. "ignore" updates all the same, and saves the check.
        axis_name: Name of the mapped axis over which gradients are averaged.

    Returns:
        The step. Its noise at update n is a function of the state's key and n alone.

    Raises:
        ValueError: When built: an option out of its range, no configuration or
            optimizer. When called: a batch that `accumulate` does not divide, a state
            without moving average.

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
    _check_options(configuration, optimizer, accumulate, max_grad_norm, compute_dtype)
    _check_policies(ema_decay, nonfinite)
    update_rule = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: PyTree[Array]) -> tuple[TrainState, Info]:
        if ema_decay is not None and state.ema is None:
            raise ValueError(
                "Expected a state with a moving average for ema_decay, got none. "
                "Create it with TrainState.create(..., ema=True)."
            )
        current = at_step(configuration, state.step)
        key = stream_key(state.key, "train", state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def loss_of(params: PyTree[Array]) -> tuple[Array, Aux]:
            model = _in_precision(state.model_with(params), compute_dtype)
            return _over_parts(current, model, batch, key, accumulate)

        def value_and_grad(params: PyTree[Array]) -> Any:
            if accumulate == 1:
                (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            else:
                loss, aux, grads = _accumulated(
                    current, state, params, batch, key, accumulate, compute_dtype
                )
            if axis_name is not None:
                loss, aux, grads = _average((loss, aux, grads), axis_name)
            return loss, aux, jax.tree.map(jnp.conj, grads)

        def value(params: PyTree[Array]) -> Array:
            loss, _ = loss_of(params)
            return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

        loss, aux, grads = value_and_grad(state.params)
        grad_norm = jnp.sqrt(global_norm_squared(grads))
        if max_grad_norm is not None:
            # Through NaN-free arithmetic only: a norm of 0 must not divide.
            scale = max_grad_norm / jnp.maximum(grad_norm, max_grad_norm)
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        updates, opt_state = update_rule.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=value,
        )
        params = optax.apply_updates(state.params, updates)
        new = _advance(state, params, opt_state, aux, ema_decay)
        new, skipped = _guard(state, new, loss, grad_norm, grads, nonfinite)
        info = Info(loss, aux, grad_norm, _learning_rate(opt_state), skipped)
        return new, info

    return step


def make_eval_step(
    configuration: AbstractConfiguration, *, use_ema: bool = False
) -> Callable[[TrainState, PyTree[Array]], tuple[Array, Aux]]:
    """A pure function `(TrainState, batch) -> (loss, aux)` that changes nothing.

    Layers run in inference mode (dropout off, batch norm with running statistics), and
    noise comes from a stream of its own.

    Args:
        configuration: What is evaluated; curricula count at full length.
        use_ema: Evaluate the moving average of the model.

    Returns:
        The step.

    Raises:
        ValueError: No configuration; when called, a state without moving average.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> state = tx.TrainState.create(model, optax.sgd(1.0), key=jax.random.key(1))
        >>> evaluate = tx.make_eval_step(tx.configuration.Supervised())
        >>> evaluate(state, jnp.ones((8, 2, 2)))[0].shape
        ()
    """
    _check_configuration(configuration)

    def evaluate(state: TrainState, batch: PyTree[Array]) -> tuple[Array, Aux]:
        model = state.ema_model if use_ema else state.model
        model = eqx.nn.inference_mode(model)
        key = stream_key(state.key, "evaluate", state.step)
        return configuration(model, batch, key=key)

    return evaluate


class _LowPrecision(eqx.Module):
    """A module that computes in another precision and answers in its input's."""

    module: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, u: PyTree[Array], *args: Any, **kwargs: Any) -> Any:
        module, low, rest = cast_floating((self.module, u, args), self.dtype)
        out = module(low, *rest, **kwargs)
        dtypes = [x.dtype for x in jax.tree.leaves(u) if is_floating(x)]
        return cast_floating(out, dtypes[0] if dtypes else self.dtype)


def _in_precision(model: Any, dtype: Any) -> Any:
    if dtype is None:
        return model
    if isinstance(model, Stepper):
        return eqx.tree_at(
            lambda m: m.module, model, _LowPrecision(model.module, dtype)
        )
    return _LowPrecision(model, dtype)


def _over_parts(
    configuration: AbstractConfiguration,
    model: Any,
    batch: PyTree[Array],
    key: PRNGKeyArray,
    accumulate: int,
) -> tuple[Array, Aux]:
    """Loss of a batch, part by part (for line searches under accumulation)."""
    if accumulate == 1:
        return configuration(model, batch, key=key)
    parts, keys = _split_parts(batch, key, accumulate)

    def body(total: Array, x: Any) -> tuple[Array, None]:
        part, k = x
        return total + configuration(model, part, key=k)[0], None

    total, _ = jax.lax.scan(body, jnp.zeros(()), (parts, keys))
    return total / accumulate, Aux()


def _accumulated(
    configuration: AbstractConfiguration,
    state: TrainState,
    params: PyTree[Array],
    batch: PyTree[Array],
    key: PRNGKeyArray,
    accumulate: int,
    compute_dtype: Any,
) -> tuple[Array, Aux, PyTree[Array]]:
    parts, keys = _split_parts(batch, key, accumulate)
    stateful = isinstance(state.model, Stepper) and state.model.state is not None

    def one(params: PyTree, layers: Any, part: PyTree, k: Any) -> tuple[Array, Aux]:
        model = state.model_with(params)
        if stateful:
            model = eqx.tree_at(lambda m: m.state, model, layers)
        model = _in_precision(model, compute_dtype)
        return configuration(model, part, key=k)

    def body(carry: Any, x: Any) -> Any:
        loss, grads, layers = carry
        (value, aux), new = jax.value_and_grad(one, has_aux=True)(params, layers, *x)
        layers = aux.model_state if stateful else None
        grads = jax.tree.map(jnp.add, grads, new)
        aux = Aux(time_losses=aux.time_losses, parts=aux.parts)
        return (loss + value, grads, layers), aux

    first_part = jax.tree.map(lambda x: x[0], (parts, keys))
    layers = state.model.state if stateful else None
    dtype = jax.eval_shape(one, params, layers, *first_part)[0].dtype
    zeros = jax.tree.map(jnp.zeros_like, params)
    (loss, grads, layers), auxs = jax.lax.scan(
        body, (jnp.zeros((), dtype), zeros, layers), (parts, keys)
    )
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), auxs)
    aux = Aux(mean.time_losses, layers, mean.parts)
    return loss / accumulate, aux, jax.tree.map(lambda g: g / accumulate, grads)


def _split_parts(batch: PyTree[Array], key: PRNGKeyArray, parts: int) -> Any:
    window = batch if isinstance(batch, Window) else Window(batch)
    size = window.batch_size
    if size % parts:
        raise ValueError(
            f"Expected a batch size that `accumulate` ({parts}) divides, got {size}. "
            "Change one of the two."
        )
    split = jax.tree.map(
        lambda x: x.reshape(parts, size // parts, *x.shape[1:]), window
    )
    return split, jax.random.split(key, parts)


def _average(tree: PyTree[Any], axis_name: str) -> PyTree[Any]:
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if eqx.is_inexact_array(x) else x, tree
    )


def _advance(
    state: TrainState,
    params: PyTree[Array],
    opt_state: PyTree[Array],
    aux: Aux,
    ema_decay: float | None,
) -> TrainState:
    ema = state.ema
    if ema_decay is not None:
        count = state.step.astype(jnp.result_type(float)) + 1
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(
            lambda e, p: e + (1 - decay).astype(p.real.dtype) * (p - e), ema, params
        )
    buffers = state.buffers
    if aux.model_state is not None:
        model = eqx.tree_at(lambda m: m.state, state.model, aux.model_state)
        _, buffers = state.split(model)
    return TrainState(
        params=params,
        buffers=buffers,
        opt_state=opt_state,
        ema=ema,
        step=state.step + 1,
        num_skipped=state.num_skipped,
        key=state.key,
        static=state.static,
    )


def _guard(
    old: TrainState,
    new: TrainState,
    loss: Array,
    grad_norm: Array,
    grads: PyTree[Array],
    nonfinite: NonFinite,
) -> tuple[TrainState, Array]:
    """The new state, or where loss or gradient is not finite the old one, counted."""
    if nonfinite == "ignore":
        return new, jnp.zeros((), bool)
    # The norm of a finite gradient may overflow; only then are all leaves looked at.
    ok = jnp.isfinite(loss) & (jnp.isfinite(grad_norm) | all_finite(grads))
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
    return jnp.asarray(found[0][1]) if found else None


def _check_configuration(configuration: Any) -> None:
    if not isinstance(configuration, AbstractConfiguration):
        raise ValueError(
            f"Expected `configuration` to be a configuration, got {configuration!r}. "
            "Pass an instance of a tx.configuration class."
        )


def _check_options(
    configuration: Any,
    optimizer: Any,
    accumulate: Any,
    max_grad_norm: Any,
    compute_dtype: Any,
) -> None:
    _check_configuration(configuration)
    check_optimizer(optimizer)
    check_count("accumulate", accumulate)
    is_number = isinstance(max_grad_norm, int | float)
    if max_grad_norm is not None and (not is_number or max_grad_norm <= 0):
        raise ValueError(
            f"Expected `max_grad_norm` to be a number > 0, got {max_grad_norm!r}. "
            "Pass None for no clipping."
        )
    if compute_dtype is not None and jnp.dtype(compute_dtype) not in (
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.float64),
    ):
        raise ValueError(
            "Expected `compute_dtype` to be bfloat16, float32 or float64, got "
            f"{compute_dtype!r}. float16 underflows without loss scaling: use bfloat16."
        )


def _check_policies(ema_decay: Any, nonfinite: Any) -> None:
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(
            f"Expected `ema_decay` to lie in [0, 1), got {ema_decay!r}. Pass for "
            "example 0.999, or None."
        )
    if nonfinite not in ("raise", "skip", "ignore"):
        raise ValueError(
            "Expected `nonfinite` to be 'raise', 'skip' or 'ignore', got "
            f"{nonfinite!r}. Choose one of them."
        )
