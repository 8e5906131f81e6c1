"""The loop over time that configurations share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._stepper import bundle_of
from trainax_pk._tree import check_count, check_flag, is_concrete
from trainax_pk._types import Window
from trainax_pk.adjoint import AbstractAdjoint


def as_window(batch: Any, num_times: int, name: str) -> Window:
    """The batch as a `Window` of at least `num_times` times."""
    window = batch if isinstance(batch, Window) else Window(batch)
    if not jax.tree.leaves(window.state):
        raise ValueError(
            f"Expected a batch with array leaves (B, L, ...) for {name}, got none. "
            "Pass an array, a PyTree of arrays, or a Window."
        )
    batch_size = jnp.shape(jax.tree.leaves(window.state)[0])[:1]
    for part, tree, times in (
        ("states", window.state, num_times),
        ("time", window.time, 0),
        ("sample", window.sample, None),
    ):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape = jnp.shape(leaf)
            long_enough = times is None or (len(shape) > 1 and shape[1] >= times)
            if shape[:1] != batch_size or not shape or not long_enough:
                wanted = "" if times is None else f", L >= {times}"
                where = part + jax.tree_util.keystr(path)
                raise ValueError(
                    f"Expected {name} to get windows with leaves "
                    f"(B = {batch_size}{wanted}, ...), got {list(shape)} for {where}. "
                    f"Pass windows of {num_times} consecutive times, batch axis first."
                )
    return jax.tree.map(jnp.asarray, window)


def initial(window: Window) -> PyTree[Array]:
    """States of index 0, leaves `(B, ...)`."""
    return jax.tree.map(lambda x: x[:, 0], window.state)


def targets(window: Window, first: int, count: int) -> PyTree[Array]:
    """States of `count` times from index `first` on, time axis first."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x[:, first : first + count], 1, 0), window.state
    )


def cut(tree: PyTree[Array], *, when: Array | bool) -> PyTree[Array]:
    """The tree, its gradient stopped where the condition holds."""
    if when is False:
        return tree
    stopped = jax.lax.stop_gradient(tree)
    if when is True:
        return stopped
    return jax.tree.map(lambda a, b: jnp.where(when, a, b), stopped, tree)


def is_cut(step: Array, *, cut_bptt: bool, every: int) -> Array | bool:
    """Whether the main chain is cut after a number of steps."""
    if not cut_bptt or every == 1:
        return cut_bptt
    return step % every == 0


def weighted_sum(weights: Array, losses: Array) -> Array:
    """Σ w_t l_t in the precision of the losses, which is the model's."""
    return jnp.sum(weights.astype(losses.dtype) * losses)


def chain(
    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree[Any],
    xs: PyTree[Any],
    length: int,
    *,
    adjoint: AbstractAdjoint,
    horizon: Array | None = None,
) -> tuple[PyTree[Any], PyTree[Any]]:
    """The adjoint's scan; steps past the horizon cost nothing and contribute zeros.

    Args:
        body: `(carry, (t, x)) -> (carry, losses)`.
        carry: First carry.
        xs: Leaves `(length, ...)`, or None.
        length: Number of steps of the program.
        adjoint: How the loop is differentiated.
        horizon: Number of steps to take, traced, or None for all. At least one is
            taken: a loss of nothing would look like a perfect one.
    """
    steps = jnp.arange(length, dtype=jnp.int32)
    if horizon is None:
        return adjoint.scan(body, carry, (steps, xs), length)

    horizon = jnp.maximum(horizon, 1)

    def guarded(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        def skip(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            # Zeros like the shape, which also knows over which devices it varies.
            _, shapes = jax.eval_shape(body, carry, x)
            return carry, jax.tree.map(jnp.zeros_like, shapes)

        return jax.lax.cond(x[0] < horizon, body, skip, carry, x)

    return adjoint.scan(guarded, carry, (steps, xs), length)


def check_cuts(cut_bptt: Any, cut_bptt_every: Any) -> tuple[bool, int]:
    """Options that every chain has."""
    check_flag("cut_bptt", cut_bptt)
    return cut_bptt, check_count("cut_bptt_every", cut_bptt_every)


def check_horizon(horizon: Any, longest: int, shortest: int = 1) -> Any:
    """None, or a number of times in a range; `chain` clips those that are traced."""
    if horizon is not None and is_concrete(horizon):
        number = np.asarray(horizon)
        is_integer = number.shape == () and number.dtype.kind in "iu"
        if not is_integer or not shortest <= int(number) <= longest:
            raise ValueError(
                f"Expected `horizon` to be an integer in {shortest} ... {longest}, got "
                f"{horizon!r}. Leave it to Curriculum, or pass None for all times."
            )
    return horizon


def not_bundled(model: Any, name: str) -> None:
    """Configurations that interleave two steppers step one time at once."""
    if bundle_of(model) > 1:
        raise ValueError(
            f"Expected a stepper that returns one time for {name}, got one with "
            f"bundle={bundle_of(model)}. Temporal bundling belongs to Supervised."
        )


def check_callable(name: str, value: Any) -> Any:
    """A callable, or a ValueError that names the field."""
    if not callable(value):
        raise ValueError(
            f"Expected `{name}` to be callable, got {value!r}. Pass a function or an "
            "eqx.Module with __call__."
        )
    return value


def two_keys(key: PRNGKeyArray | None) -> Any:
    """Keys of two independent sources of randomness, or of none."""
    return (None, None) if key is None else jax.random.split(key)
