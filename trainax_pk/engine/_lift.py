"""Steps whose optimizer or configuration holds arrays of a transformation around them."""

import functools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from trainax_pk.engine._feed_base import AbstractBesideFeed, AbstractFeed


class LiftedFeed(AbstractBesideFeed):
    """Batches `(captured, batch)`: what a step has captured comes as an operand.

    Attributes:
        feed: Where the batches come from.
        captured: Arrays that the step reads beside them.
    """

    feed: AbstractFeed
    captured: PyTree[Array]

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """The feed's arrays, and the captured ones."""
        return self.feed.load(order, start, count, size), self.captured


def lift(
    step: Callable[..., Any], feed: AbstractFeed, state: Any, order: Any, start: int
) -> tuple[Callable[..., Any], LiftedFeed]:
    """A step without captured arrays, and a feed that brings them.

    A learning rate that is mapped over by a `jax.vmap` around the trainer is a constant
    to the programs in it, which are compiled apart from that `vmap` and take operands
    alone.

    Args:
        step: `(state, batch) -> (state, info)`.
        feed: Where batches come from.
        state: Such as the step takes.
        order: Of the batches.
        start: Number of an update.

    Returns:
        The step of batches `(captured, batch)`, and their feed.
    """
    arrays = feed.load(order, start, 1, 1)
    batch = jax.eval_shape(feed.single, arrays, start, 0)
    form = eqx.filter_closure_convert(step, state, batch)
    captured, static = eqx.partition(form, eqx.is_array)

    def lifted(state: Any, batch: Any) -> Any:
        return eqx.combine(batch[0], static)(state, batch[1])

    return lifted, LiftedFeed(feed, captured)


def holds_tracers(*parts: Any) -> bool:
    """Whether functions or PyTrees hold arrays of a transformation that is under way.

    Args:
        parts: Functions are looked into: closures, defaults, bound objects.

    Example:
        >>> import jax
        >>> import optax
        >>> from trainax_pk.engine._lift import holds_tracers
        >>> found = []
        >>> _ = jax.vmap(lambda rate: found.append(holds_tracers(optax.sgd(rate))) or rate)(
        ...     jax.numpy.ones(2)
        ... )
        >>> found, holds_tracers(optax.sgd(0.1))
        ([True], False)
    """
    waiting, seen = list(parts), set()
    while waiting:
        x = waiting.pop()
        if isinstance(x, jax.core.Tracer):
            return True
        if id(x) in seen or isinstance(x, type | types.ModuleType):
            continue
        seen.add(id(x))
        leaves = jax.tree.leaves(x)
        waiting += leaves if leaves != [x] else _within(x)
    return False


def _within(x: Any) -> list[Any]:
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    found = [getattr(x, name, None) for name in ("__self__", "__wrapped__")]
    if isinstance(x, types.FunctionType):
        found += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        for cell in x.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
    elif callable(x):
        found += list(getattr(x, "__dict__", {}).values())
    return [f for f in found if f is not None]
