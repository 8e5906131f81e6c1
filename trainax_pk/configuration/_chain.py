"""The loop over time that configurations share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk._types import Window
from trainax_pk.adjoint import AbstractAdjoint


def as_window(batch: Any, num_times: int, name: str) -> Window:
    """The batch as a `Window` of at least `num_times` times."""
    window = batch if isinstance(batch, Window) else Window(batch)
    flat, _ = jax.tree_util.tree_flatten_with_path((window.state, window.time))
    if not jax.tree.leaves(window.state):
        raise ValueError(
            f"Expected a batch with array leaves (B, L, ...) for {name}, got none. "
            "Pass an array, a PyTree of arrays, or a Window."
        )
    batch_size = jax.tree.leaves(window.state)[0].shape[0]
    for path, leaf in flat:
        where = jax.tree_util.keystr(path[1:]) or "the batch"
        if leaf.ndim < 2 or leaf.shape[0] != batch_size or leaf.shape[1] < num_times:
            raise ValueError(
                f"Expected {name} to get windows ({batch_size}, >= {num_times}, ...), "
                f"got {list(leaf.shape)} for {where}. Pass windows of "
                f"{num_times} consecutive times, batch axis first."
            )
    return window


def initial(window: Window) -> PyTree[Array]:
    """States of index 0, leaves `(B, ...)`."""
    return jax.tree.map(lambda x: x[:, 0], window.state)


def targets(window: Window, first: int, count: int) -> PyTree[Array]:
    """States of `count` times from index `first` on, time axis first."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x[:, first : first + count], 1, 0), window.state
    )


def cut_if(tree: PyTree[Array], flag: Array | bool) -> PyTree[Array]:
    """The tree, its gradient stopped where the flag is true."""
    if flag is False:
        return tree
    stopped = jax.lax.stop_gradient(tree)
    if flag is True:
        return stopped
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), stopped, tree)


def is_cut(step: Array, cut_bptt: bool, every: int) -> Array | bool:  # noqa: FBT001
    """Whether the main chain is cut after a number of steps."""
    if not cut_bptt or every == 1:
        return cut_bptt
    return step % every == 0


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
        horizon: Number of steps to take, traced, or None for all.
    """
    steps = jnp.arange(length, dtype=jnp.int32)
    if horizon is None:
        return adjoint.scan(body, carry, (steps, xs), length)

    def guarded(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        def skip(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            _, shapes = jax.eval_shape(body, carry, x)
            return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        return jax.lax.cond(x[0] < horizon, body, skip, carry, x)

    return adjoint.scan(guarded, carry, (steps, xs), length)


def check_cuts(cut_bptt: Any, cut_bptt_every: Any) -> None:
    """Options that every chain has."""
    check_flag("cut_bptt", cut_bptt)
    check_count("cut_bptt_every", cut_bptt_every)


def not_bundled(model: Any, name: str) -> None:
    """Configurations that interleave two steppers step one time at once."""
    if getattr(model, "bundle", 1) > 1:
        raise ValueError(
            f"Expected a stepper that returns one time for {name}, got one with "
            f"bundle={model.bundle}. Temporal bundling belongs to Supervised."
        )


def check_callable(name: str, value: Any) -> Any:
    """A callable, or a ValueError that names the field."""
    if not callable(value):
        raise ValueError(
            f"Expected `{name}` to be callable, got {value!r}. Pass a function or an "
            "eqx.Module with __call__."
        )
    return value
