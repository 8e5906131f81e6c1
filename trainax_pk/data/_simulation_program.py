"""One sample, from its key to what is observed: traced, vmapped and compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, PRNGKeyArray, PyTree, UInt32

from trainax_pk._tree import describe
from trainax_pk.data._forward import (
    Observation,
    Observed,
    Stochastic,
    check_signature,
    is_forward_model,
    resolve,
    simulator_key,
    split_observers,
)
from trainax_pk.data._simulation_keys import sample_key


class Draw(NamedTuple):
    """One simulated sample, or with a leading axis many.

    Attributes:
        params: What the prior drew.
        output: What came of it.
        failed: Whether it is not finite, or beyond the limit.
        attempts: Draws that were made for it.
    """

    params: PyTree[Array]
    output: PyTree[Array]
    failed: Bool[Array, ""]
    attempts: Int32[Array, ""]


class Recipe(eqx.Module):
    """All that determines the samples of a stream but its word.

    Attributes:
        forward: Forward model or plain callable, with its observers.
        prior: What is drawn from.
        num_steps: Steps of a trajectory, or None for single outputs.
        stride: Steps between the times that are kept.
        num_warmup_steps: Steps before the first of them.
        limit: Largest magnitude that counts as success, or None.
        max_attempts: Draws for one sample; 1 keeps failures.
        blank: Whether failed outputs are overwritten with NaN.
    """

    forward: Any
    prior: Any
    num_steps: int | None = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    num_warmup_steps: int = eqx.field(static=True)
    limit: float | None = eqx.field(static=True)
    max_attempts: int = eqx.field(static=True)
    blank: bool = eqx.field(static=True)

    def draw(self, word: UInt32[Array, ""], index: UInt32[Array, ""]) -> Draw:
        """Sample `index` of the stream `word`."""
        return self.draw_with(sample_key(word, index))

    def draw_with(self, key: PRNGKeyArray) -> Draw:
        """The sample of a key."""
        if self.max_attempts == 1:
            return self._blanked(self._attempt(key, jnp.int32(0)))

        def again(draw: Draw) -> Draw:
            return self._attempt(key, draw.attempts)

        like = jax.eval_shape(self._attempt, key, jnp.int32(0))
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        start = none._replace(failed=jnp.array(True))  # noqa: FBT003
        return self._blanked(
            jax.lax.while_loop(
                lambda draw: draw.failed & (draw.attempts < self.max_attempts),
                again,
                start,
            )
        )

    def _attempt(self, key: PRNGKeyArray, attempt: Int32[Array, ""]) -> Draw:
        prior_key, noise_key = jax.random.split(jax.random.fold_in(key, attempt))
        params = jax.tree.map(jnp.asarray, self.prior.sample(prior_key))
        output, failed = self.simulate(params, noise_key)
        return Draw(params, output, failed, attempt + 1)

    def _blanked(self, draw: Draw) -> Draw:
        if not self.blank:
            return draw
        blank = jax.tree.map(
            lambda x: jnp.where(draw.failed, _nan_like(x), x), draw.output
        )
        return draw._replace(output=blank)

    def simulate(
        self, params: PyTree[Array], key: PRNGKeyArray
    ) -> tuple[PyTree[Array], Bool[Array, ""]]:
        """Output for some parameters, and whether it failed."""
        forward, observers = split_observers(self.forward)
        model, state = resolve(forward, params)
        if isinstance(model, Observed):
            # Built by Parametric, with observers of its own.
            model, inner = split_observers(model)
            observers = (*inner, *observers)
        check_steps(model, self.num_steps, self.num_warmup_steps)

        def see(state: PyTree, time: Any) -> PyTree:
            for i, observer in enumerate(observers):
                noise_key = jax.random.fold_in(jax.random.fold_in(key, i), time)
                state = _observe(observer, state, noise_key)
            return state

        step = _stepper(model, key)
        if self.num_steps is None:
            state = step(_run(step, state, self.num_warmup_steps))
            output = jax.tree.map(jnp.asarray, see(state, 0))
            return output, self._has_failed(state, output)
        state = _run(step, state, self.num_warmup_steps)
        # Without observers the outputs are the states: nothing else to watch.
        also = (lambda seen: seen) if observers else (lambda seen: ())
        output, largest = _trajectory(
            step, see, also, state, self.num_steps, self.stride
        )
        return output, self._has_failed(*largest)

    def _has_failed(self, states: PyTree[Array], outputs: PyTree[Array]) -> Array:
        """Whether anything is not finite, or a state beyond the limit."""
        failed = jnp.array(False)  # noqa: FBT003
        for x in _inexact((states, outputs)):
            failed = failed | ~jnp.all(jnp.isfinite(x))
        if self.limit is not None:
            for x in _inexact(states):
                failed = failed | ~jnp.all(jnp.abs(x) <= self.limit)
        return failed


def check_fit(recipe: Recipe) -> tuple[Draw, PyTree]:
    """Shapes of a draw; errors of a prior and a model that do not fit together.

    Raises:
        ValueError: The model does not take what the prior draws, or does not return
            states like those that it takes.
    """
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    params = jax.eval_shape(
        lambda k: jax.tree.map(jnp.asarray, recipe.prior.sample(k)), key
    )
    if not jax.tree.leaves(params):
        raise ValueError(
            "Expected the prior to draw arrays, got a PyTree without any. Pass a prior "
            "with at least one array."
        )
    try:
        return jax.eval_shape(recipe.draw_with, key), params
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"Expected a forward model that takes what the prior draws "
            f"({describe(params)}), got an error from it: {error}. Change the prior, or "
            "wrap the model in Parametric(build)."
        ) from error


def check_steps(model: Any, num_steps: int | None, num_warmup_steps: int) -> None:
    """Steps of a model that has steps, or a ValueError."""
    steps = num_steps is not None or num_warmup_steps > 0
    if isinstance(model, Stochastic) and steps:
        raise ValueError(
            f"Expected a Stochastic simulator without steps, got num_steps={num_steps} "
            f"and num_warmup_steps={num_warmup_steps}. Step within the simulator, with "
            "keys split from its own."
        )


def _stepper(model: Any, key: PRNGKeyArray) -> Callable[[PyTree], PyTree]:
    if isinstance(model, Stochastic):
        return lambda params: model(params, key=simulator_key(key))
    if not is_forward_model(model):
        return model

    def step(state: PyTree) -> PyTree:
        check_signature(model, state)
        return model.step(state, model.dt)

    return step


def _run(step: Callable, state: PyTree[Array], num_steps: int) -> PyTree[Array]:
    if num_steps == 0:
        return state
    state = _settled(step, state)
    if num_steps == 1:
        return step(state)
    return jax.lax.scan(lambda u, _: (step(u), None), state, None, length=num_steps)[0]


def _trajectory(
    step: Callable,
    see: Callable,
    also: Callable,
    state: PyTree,
    num_steps: int,
    stride: int,
) -> tuple[PyTree[Array], tuple[list[Array], list[Array]]]:
    """States after 0, stride, ..., num_steps steps, as they are seen.

    With them the largest magnitudes of the states and of `also(seen)`, entry by entry: a
    reduction of every state would cost as much as many a step, while this is fused with
    it, and reduced after the last.
    """
    state = _settled(step, state)
    num_kept = num_steps // stride

    def magnitudes(state: PyTree, seen: PyTree) -> tuple[list[Array], list[Array]]:
        return _magnitudes(state), _magnitudes(also(seen))

    like = jax.eval_shape(lambda u: magnitudes(u, see(u, 0)), state)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def look(carry: PyTree, t: Array) -> tuple[PyTree, PyTree]:
        state, largest = carry
        seen = see(state, t)
        return jax.tree.map(jnp.maximum, largest, magnitudes(state, seen)), seen

    def advance(carry: PyTree, t: Array) -> tuple[PyTree, Any]:
        largest, seen = look(carry, t)
        return (_run(step, carry[0], stride), largest), seen

    if stride == 1:
        # Sees the state before each step. One step is made in vain, which is cheaper
        # than a copy of everything to append the last state.
        times = jnp.arange(num_kept + 1, dtype=jnp.int32)
        (_, largest), seen = jax.lax.scan(advance, (state, none), times)
        return seen, largest
    times = jnp.arange(num_kept, dtype=jnp.int32)
    last, seen = jax.lax.scan(advance, (state, none), times)
    largest, end = look(last, jnp.int32(num_kept))
    join = lambda x, y: jnp.concatenate([x, y[None]])  # noqa: E731
    return jax.tree.map(join, seen, end), largest


def _settled(step: Callable, state: PyTree) -> PyTree[Array]:
    """The state in the types that stepping keeps; an error if it keeps none."""
    state = jax.tree.map(jnp.asarray, state)
    out = jax.eval_shape(step, state)
    same = jax.tree.structure(out) == jax.tree.structure(state) and all(
        a.shape == b.shape
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(state), strict=True)
    )
    if same:
        # A weakly typed or narrower start takes the type that a step returns.
        state = jax.tree.map(lambda x, y: x.astype(y.dtype), state, out)
        again = jax.eval_shape(step, state)
        same = all(
            a.dtype == b.dtype
            for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True)
        )
    if not same:
        raise ValueError(
            f"Expected a step to return states like those it takes ({describe(state)}), "
            f"got ({describe(out)}). A trajectory needs a model that keeps shape and "
            "dtype; leave out num_steps for single outputs"
        )
    return state


def _observe(observer: Callable, state: PyTree, key: PRNGKeyArray) -> PyTree[Array]:
    if isinstance(observer, Observation):
        return observer.sample(state, key=key)
    return observer(state)


def _inexact(tree: PyTree[Array]) -> list[Array]:
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _magnitudes(tree: PyTree[Array]) -> list[Array]:
    return [jnp.abs(x) for x in _inexact(tree)]


def _nan_like(x: Array) -> Array:
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.full_like(x, jnp.nan) if inexact else x
