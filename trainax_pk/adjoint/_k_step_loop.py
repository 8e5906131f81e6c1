"""The last k steps of a loop that ends by itself, differentiated; the others not."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from trainax_pk.adjoint._base import settled_carry


def k_step_while_loop(
    cond_fun: Callable[[PyTree], Any],
    body_fun: Callable[[PyTree], PyTree],
    init: PyTree[Any],
    *,
    k: int,
    max_steps: int | None,
) -> PyTree[Any]:
    """Value of `jax.lax.while_loop`; its gradient crosses the last k steps.

    The loop runs without gradient and leaves a copy of the carry behind at every k-th
    step, the last two of which are kept. From the older or the newer one it is at most
    k - 1 steps, again without gradient, to the carry k steps before the end. From there
    k steps are differentiated. Loops that take fewer steps are differentiated whole.
    """
    if max_steps == 0:
        return init
    init = settled_carry(lambda c, _: (body_fun(c), None), init, None, 1)
    # Gradients reach a loop through what its body closes over: it must be an operand
    # to be held fixed.
    body_fun = eqx.filter_closure_convert(body_fun, init)
    live = k + (1 if _lags(body_fun, init) else 0)
    live = live if max_steps is None else min(live, max_steps)
    fixed_body, fixed_init = jax.lax.stop_gradient(
        eqx.filter((body_fun, init), eqx.is_array)
    )
    fixed_body = eqx.combine(fixed_body, body_fun)
    count, last, older, newer = _warm_up(
        cond_fun, fixed_body, fixed_init, live, max_steps
    )
    start = jnp.maximum(count - live, 0)
    newest = jnp.maximum(count - 1, 0) // live * live
    near = jnp.where(newest <= start, newest, jnp.maximum(newest - live, 0))
    carry = _select(newest <= start, newer, older)
    carry = _advance(fixed_body, carry, start - near)
    # A loop of at most k steps is all live, its first carry too.
    carry = _select(count <= live, init, jax.lax.stop_gradient(carry))

    def step(carry: PyTree, i: Array) -> tuple[PyTree, None]:
        # A closure-converted body holds arrays, and cond hashes what it is given.
        return jax.lax.cond(i < count, lambda c: body_fun(c), lambda c: c, carry), None

    carry, _ = jax.lax.scan(step, carry, jnp.arange(live))
    return _value_of(last, carry)


def _lags(body_fun: Callable[[PyTree], PyTree], carry: PyTree[Any]) -> bool:
    """Whether the iterate that a step returns was computed by the step before.

    Solvers with a search (gradient descent, BFGS, Gauss-Newton, ...) propose an iterate
    at the end of a step and accept it in the next one. A single step's iterate then
    does not depend on what the function closes over, and k updates take k + 1 steps.
    """
    operands, static = eqx.partition(body_fun, eqx.is_inexact_array)
    if not jax.tree.leaves(operands):
        return False

    def iterate(operands: PyTree) -> PyTree:
        # The iterate is the first entry of the solver's carry.
        first = jax.tree.leaves(eqx.combine(operands, static)(carry)[:1])
        return [x for x in first if eqx.is_inexact_array(x)]

    def pull(operands: PyTree) -> PyTree:
        out, pull = jax.vjp(iterate, operands)
        return [jnp.ones_like(x) for x in out], pull

    def of_cotangents(operands: PyTree, cotangents: PyTree) -> PyTree:
        return pull(operands)[1](cotangents)

    cotangents = jax.eval_shape(lambda x: pull(x)[0], operands)
    jaxpr = jax.make_jaxpr(of_cotangents)(operands, cotangents).jaxpr
    given = jaxpr.invars[len(jax.tree.leaves(operands)) :]
    used = [v for equation in jaxpr.eqns for v in equation.invars] + [*jaxpr.outvars]
    return not any(v is c for v in used for c in given)


def _warm_up(
    cond_fun: Callable[[PyTree], Any],
    body_fun: Callable[[PyTree], PyTree],
    init: PyTree[Any],
    every: int,
    max_steps: int | None,
) -> tuple[Array, PyTree, PyTree, PyTree]:
    """Number of steps, last carry, and the carries of the last two marks but the end.

    Marks are at every `every`-th step.
    """

    def more(state: Any) -> Array:
        count, carry, _, _ = state
        going = jnp.asarray(cond_fun(carry))
        return going if max_steps is None else going & (count < max_steps)

    def step(state: Any) -> Any:
        count, carry, older, newer = state
        mark = count % every == 0
        older, newer = _select(mark, newer, older), _select(mark, carry, newer)
        return count + 1, body_fun(carry), older, newer

    return jax.lax.while_loop(more, step, (jnp.array(0), init, init, init))


def _advance(
    body_fun: Callable[[PyTree], PyTree], carry: PyTree[Any], steps: Array
) -> PyTree[Any]:
    def step(state: Any) -> Any:
        left, carry = state
        return left - 1, body_fun(carry)

    return jax.lax.while_loop(lambda s: s[0] > 0, step, (steps, carry))[1]


def _select(condition: Array, on_true: PyTree[Any], on_false: PyTree[Any]) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def _value_of(value: PyTree[Any], gradient: PyTree[Any]) -> PyTree[Any]:
    """The value of one tree with the derivative of the other.

    Both are equal up to how XLA fuses. Without a derivative the other is dead code.
    """
    floats, rest = eqx.partition(value, eqx.is_inexact_array)
    return eqx.combine(_first(floats, eqx.filter(gradient, eqx.is_inexact_array)), rest)


@jax.custom_jvp
def _first(value: PyTree[Any], gradient: PyTree[Any]) -> PyTree[Any]:
    del gradient
    return value


@_first.defjvp
def _first_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[1]
