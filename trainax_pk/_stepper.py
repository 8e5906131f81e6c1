"""Steppers that take or return more than a state say so with a wrapper."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._tree import as_int, check_count, check_flag, describe
from trainax_pk._types import Inputs, Window

BATCH_AXIS = "batch"


class Stepper(eqx.Module):
    """Declares what a stepper takes and returns beside `u -> u_next`.

    A plain callable `u -> u_next` needs no wrapper. The wrapped module is called as
    `module(u, [inputs], [state], [key=key])`, with what was declared, and returns
    `u_next`, or `(u_next, state)` if it is stateful.

    Attributes:
        module: The callable PyTree, of one sample.
        state: An `eqx.nn.State` (batch norm, ...), or None. It is carried through time
            and training, shared by the samples of a batch; the batch's axis is named
            `"batch"`, which is what `eqx.nn.BatchNorm` has to be given.
        stochastic: The module takes `key=`; each sample and time gets its own key.
        conditioned: The module takes `Inputs(sample, time)` after the state.
        bundle: Number m of times that one call returns (temporal bundling, Brandstetter
            et al. 2022, arXiv:2202.03376). With m > 1 the module returns leaves
            `(m, ...)`; the last of them is stepped next.

    Raises:
        ValueError: A flag that is no bool, a bundle that is no integer >= 1, a module
            that is not callable, a state that is no `eqx.nn.State`; when called, a
            missing key.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk import Inputs, Stepper
        >>> decay = lambda u, inputs: u * (1 - inputs.sample)
        >>> stepper = Stepper(decay, conditioned=True)
        >>> stepper(jnp.ones(2), Inputs(sample=jnp.array(0.25)))
        Array([0.75, 0.75], dtype=float32)
    """

    module: Callable[..., Any]
    state: eqx.nn.State | None = None
    stochastic: bool = eqx.field(default=False, static=True, kw_only=True)
    conditioned: bool = eqx.field(default=False, static=True, kw_only=True)
    bundle: int = eqx.field(default=1, static=True, kw_only=True, converter=as_int)

    def __check_init__(self) -> None:
        check_flag("stochastic", self.stochastic)
        check_flag("conditioned", self.conditioned)
        check_count("bundle", self.bundle)
        if not callable(self.module):
            raise ValueError(
                f"Expected `module` to be callable, got {self.module!r}. Pass a "
                "function or an eqx.Module with __call__."
            )
        if not isinstance(self.state, eqx.nn.State | None):
            raise ValueError(
                f"Expected `state` to be an eqx.nn.State or None, got {self.state!r}. "
                "Pass both parts of eqx.nn.make_with_state(...)."
            )

    def __call__(
        self,
        u: PyTree[Array],
        inputs: Inputs | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> PyTree[Array]:
        """One step of one sample, for inference; a new `state` is dropped."""
        check_key(self, key, "a single step")
        # Layers invalidate the state that they update; this one is called again.
        state = jax.tree.map(lambda x: x, self.state)
        inputs = Inputs() if inputs is None else inputs
        return _call(self, (u,), inputs, state, key)[0]


def bundle_of(stepper: Any) -> int:
    """Number of times that one call returns."""
    return stepper.bundle if isinstance(stepper, Stepper) else 1


def state_of(stepper: Any) -> eqx.nn.State | None:
    """The layers' state that the stepper carries, or None."""
    return stepper.state if isinstance(stepper, Stepper) else None


def is_stochastic(stepper: Any) -> bool:
    """Whether the stepper needs a key."""
    return isinstance(stepper, Stepper) and stepper.stochastic


def check_key(stepper: Any, key: Any, name: str) -> None:
    """A stochastic stepper without a key is an error before any compute."""
    if is_stochastic(stepper) and key is None:
        raise ValueError(
            f"Expected a key for the stochastic stepper `{name}`, got None. "
            "Pass `key=`."
        )


def step_batch(
    stepper: Any,
    states: tuple[PyTree[Array], ...],
    nn_state: eqx.nn.State | None,
    *,
    t: Array,
    window: Window,
    key: PRNGKeyArray | None,
) -> tuple[PyTree[Array], eqx.nn.State | None]:
    """One call of a stepper for a batch.

    Args:
        stepper: A callable, or a `Stepper`.
        states: What the callable compares or steps, each with leaves `(B, ...)`.
        nn_state: State of its layers, shared by the batch.
        t: Index of the window's time that is stepped.
        window: Where the auxiliary inputs come from.
        key: Key of the whole rollout, for stochastic steppers.

    Returns:
        The result, leaves `(B, ...)` or `(B, m, ...)`, and the layers' new state.
    """
    if not isinstance(stepper, Stepper):
        return jax.vmap(stepper)(*states), nn_state
    inputs, inputs_axes = Inputs(), None
    if stepper.conditioned:
        inputs = _inputs_at(window, t, stepper.bundle)
        inputs_axes = 0
    keys, keys_axes = None, None
    if stepper.stochastic:
        batch_size = jax.tree.leaves(states)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(key, t), batch_size)
        keys_axes = 0
    return jax.vmap(
        lambda s, i, n, k: _call(stepper, s, i, n, k),
        in_axes=(0, inputs_axes, None, keys_axes),
        out_axes=(0, None),
        axis_name=BATCH_AXIS,
    )(states, inputs, nn_state, keys)


def check_inputs(stepper: Any, window: Window, num_steps: int, name: str) -> None:
    """A conditioned stepper needs inputs, and forcing for every step."""
    if not (isinstance(stepper, Stepper) and stepper.conditioned):
        return
    times = [jnp.shape(x)[1] for x in jax.tree.leaves(window.time)]
    if not times and not jax.tree.leaves(window.sample):
        raise ValueError(
            f"Expected inputs for `{name}`, which is declared as conditioned, got "
            "none. Pass a Window with `sample` or `time`."
        )
    # An index past the end would be clamped, not refused.
    if times and min(times) < num_steps:
        raise ValueError(
            f"Expected `time` to hold forcing for {num_steps} steps of `{name}`, got "
            f"{min(times)} times. Pass one forcing for each step."
        )


def check_step(
    stepper: Any,
    window: Window,
    u: PyTree[Array],
    key: Any,
    name: str,
    *,
    num_steps: int,
) -> None:
    """The stepper must return what it was given: structure, shapes and dtypes."""
    if not callable(stepper) and not isinstance(stepper, Stepper):
        raise ValueError(
            f"Expected `{name}` to be callable, got {stepper!r}. Pass `u -> u_next`, or "
            "a tx.Stepper."
        )
    check_key(stepper, key, name)
    check_inputs(stepper, window, num_steps, name)
    out = _shape_of_step(stepper, window, u, key, name)
    bundle = bundle_of(stepper)
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0], bundle, *x.shape[1:]) if bundle > 1 else x.shape, x.dtype
        ),
        u,
    )
    same = jax.tree.structure(out) == jax.tree.structure(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
    )
    if not same:
        raise ValueError(
            f"Expected `{name}` to return a batch of states like its input "
            f"({describe(expected)}), got {describe(out)}. A stepper must keep shape "
            "and dtype; one that returns several times at once is declared with "
            "`Stepper(module, bundle=m)`."
        )


def _shape_of_step(
    stepper: Any, window: Window, u: PyTree[Array], key: Any, name: str
) -> PyTree[Any]:
    try:
        return jax.eval_shape(
            lambda u: step_batch(
                stepper,
                (u,),
                state_of(stepper),
                t=jnp.zeros((), jnp.int32),
                window=window,
                key=key,
            )[0],
            u,
        )
    # Whatever a stepper of someone else raises; it stays the cause.
    except Exception as error:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), u)
        declared = "its `stochastic`, `conditioned` and `state`"
        if not isinstance(stepper, Stepper):
            declared = (
                "whether it has to be wrapped in tx.Stepper, as whatever takes a key "
                "(dropout), a state of its layers (batch norm) or inputs has to be"
            )
        raise ValueError(
            f"Expected `{name}` to map a state ({describe(one)}) to the next one, got: "
            f"{type(error).__name__}: {error} Check the sizes that it was built with, "
            f"and {declared}."
        ) from error


def _call(
    stepper: Stepper,
    states: tuple[PyTree[Array], ...],
    inputs: Inputs,
    nn_state: eqx.nn.State | None,
    key: PRNGKeyArray | None,
) -> tuple[PyTree[Array], eqx.nn.State | None]:
    args = (*states, inputs) if stepper.conditioned else states
    kwargs = {"key": key} if stepper.stochastic else {}
    if nn_state is None:
        return stepper.module(*args, **kwargs), None
    return stepper.module(*args, nn_state, **kwargs)


def _inputs_at(window: Window, t: Array, bundle: int) -> Inputs:
    if window.time is None:
        return Inputs(window.sample, None)
    if bundle == 1:
        now = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False),
            window.time,
        )
    else:
        now = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, t, bundle, axis=1), window.time
        )
    return Inputs(window.sample, now)
