"""Truncated gradients in constant memory."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from trainax_pk._tree import as_int, check_count
from trainax_pk.adjoint._base import AbstractAdjoint, settled_carry
from trainax_pk.adjoint._k_step_loop import k_step_while_loop

Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class KStepAdjoint(AbstractAdjoint):
    """Gradients reach back at most k steps: they stop at every k-th state.

    States u₀, u₁, … with y_t computed along: the cotangent of u_k, u_2k, … is dropped
    where the state enters the next step. The value is exact; the gradient is biased
    (truncated backpropagation through time, Williams & Peng 1990,
    doi:10.1162/neco.1990.2.4.490) and exact only if k >= T. Near a fixed point with
    spectral radius ρ of the step's Jacobian the bias is of order ρ^k (Bolte, Pauwels &
    Vaiter 2023, arXiv:2305.13768).

    Segments between cuts do not depend on one another in the backward pass, so that it
    walks forward through them again and differentiates one at a time. Backward memory
    is the intermediates of k steps whatever T is; compute is one more forward pass.
    Reverse mode only, unless k >= T. Differentiated again, as by hyper-gradients, it
    gives the exact derivative of the truncated gradient, at the memory of all T steps.

    In a solve that stops by itself (`optimistix.fixed_point`, `root_find`,
    `least_squares`, `minimise`) the last k updates are differentiated, and the solver's
    whole state before them is held fixed: k = 1 is the one-step derivative of Bolte et
    al. A solve of at most k steps is differentiated exactly. Memory is that of k steps
    however many are taken; compute is one solve, at most k - 1 steps of it again, and k
    live steps. Without a gradient it costs as much as `jax.lax.while_loop`.

    Attributes:
        k: Number of steps that a gradient may cross, >= 1.

    Raises:
        ValueError: `k` is no integer >= 1.

    Example:
        >>> import jax
        >>> from trainax_pk import KStepAdjoint
        >>> def decay(a):
        ...     step = lambda u, _: (a * u, a * u)
        ...     return KStepAdjoint(2).scan(step, 1.0, None, 4)[1].sum()
        >>> value, gradient = jax.value_and_grad(decay)(0.5)
        >>> float(value), float(gradient)  # exact would be 1 + 2a + 3a² + 4a³ = 3.25
        (0.9375, 2.5)
    """

    k: int = eqx.field(converter=as_int)

    def __check_init__(self) -> None:
        check_count("k", self.k)

    def scan(
        self,
        body: Body,
        init: PyTree[Any],
        xs: PyTree[Any],
        length: int,
    ) -> tuple[PyTree[Any], PyTree[Any]]:
        """As `jax.lax.scan`; its gradient stops at every k-th carry."""
        if self.k >= length:
            return jax.lax.scan(body, init, xs, length=length)
        init = settled_carry(body, init, xs, length)
        first = jax.tree.map(lambda x: x[0], xs)
        # The gradient rule must see every array that the body closes over.
        closed = eqx.filter_closure_convert(body, init, first)
        return _truncated_scan((closed, init, xs), self.k, length)

    def while_loop(
        self,
        cond_fun: Callable[[PyTree], Any],
        body_fun: Callable[[PyTree], PyTree],
        init: PyTree[Any],
        *,
        max_steps: int | None,
    ) -> PyTree[Any]:
        """As `jax.lax.while_loop`; its gradient crosses the last k updates."""
        return k_step_while_loop(
            cond_fun, body_fun, init, k=self.k, max_steps=max_steps
        )


def OneStepAdjoint() -> KStepAdjoint:  # noqa: N802
    """`KStepAdjoint(1)`: gradients cross one step (arXiv:2305.13768).

    Example:
        >>> from trainax_pk import OneStepAdjoint
        >>> OneStepAdjoint().k
        1
    """
    return KStepAdjoint(1)


@eqx.filter_custom_vjp
def _truncated_scan(operands: Any, k: int, length: int) -> Any:
    del k
    return _plain_scan(*operands, length)


@_truncated_scan.def_fwd
def _forward(perturbed: Any, operands: Any, k: int, length: int) -> Any:
    del perturbed, k
    return _plain_scan(*operands, length), None


@_truncated_scan.def_bwd
def _backward(
    residuals: None,
    cotangent: Any,
    perturbed: Any,
    operands: Any,
    k: int,
    length: int,
) -> Any:
    del residuals
    needed, fixed = eqx.partition(operands, perturbed)
    # Scalars that are differentiated can arrive as Python literals.
    body_d, init_d, xs_d = jax.tree.map(jnp.asarray, needed)
    body_f, init_f, xs_f = fixed
    init = eqx.combine(init_d, init_f)
    last_ct, ys_ct = cotangent
    count, rest = divmod(length, k)
    split = count * k

    def pull(carry: Any, x: Any, ct_end: Any, steps: int) -> Any:
        return _pull_segment(body_d, body_f, carry, x, ct_end, steps)

    def head(state: Any, x: Any) -> Any:
        carry, ct_body, ct_init = state
        i, x = x
        is_last = (i == count - 1) & (rest == 0)
        ct_end = jax.tree.map(
            lambda c: jnp.where(is_last, c, jnp.zeros_like(c)), last_ct
        )
        carry, (new_body, ct_carry, ct_x) = pull(carry, x, ct_end, k)
        ct_body = jax.tree.map(jnp.add, ct_body, new_body)
        ct_init = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), ct_carry, ct_init)
        return (carry, ct_body, ct_init), ct_x

    xs = (xs_d, xs_f, ys_ct)
    blocks = jax.tree.map(lambda x: x[:split].reshape(count, k, *x.shape[1:]), xs)
    zeros = jax.tree.map(
        jnp.zeros_like, (body_d, eqx.filter(init, eqx.is_inexact_array))
    )
    (carry, ct_body, ct_init), ct_xs = jax.lax.scan(
        head, (init, *zeros), (jnp.arange(count), blocks)
    )
    ct_xs = jax.tree.map(lambda x: x.reshape(split, *x.shape[2:]), ct_xs)
    if rest:
        tail = jax.tree.map(lambda x: x[split:], xs)
        _, (new_body, _, ct_x) = pull(carry, tail, last_ct, rest)
        ct_body = jax.tree.map(jnp.add, ct_body, new_body)
        ct_xs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ct_xs, ct_x)
    return ct_body, _where_needed(init_d, ct_init), ct_xs


def _pull_segment(
    body_d: Any, body_f: Any, carry: Any, x: Any, ct_end: Any, steps: int
) -> Any:
    """Last carry of a segment, and the cotangents of body, first carry and inputs."""
    x_d, x_f, y_ct = x
    carry_d, carry_f = eqx.partition(carry, eqx.is_inexact_array)

    def run(body_d: Any, carry_d: Any, x_d: Any) -> Any:
        body = eqx.combine(body_d, body_f)
        start = eqx.combine(carry_d, carry_f)
        return _plain_scan(body, start, eqx.combine(x_d, x_f), steps)

    (end, ys), pull = eqx.filter_vjp(run, body_d, carry_d, x_d)
    return end, pull((_filled(ct_end, end), _filled(y_ct, ys)))


def _plain_scan(body: Any, init: Any, xs: Any, length: int) -> Any:
    # A closure-converted body is a Module with arrays, which scan cannot hash.
    return jax.lax.scan(lambda c, x: body(c, x), init, xs, length=length)


def _filled(cotangent: Any, value: Any) -> Any:
    """The cotangent of the inexact leaves, zeros where it is absent."""
    return jax.tree.map(
        lambda v, c: jnp.zeros_like(v) if c is None and eqx.is_inexact_array(v) else c,
        value,
        cotangent,
        is_leaf=_is_none,
    )


def _where_needed(needed: Any, cotangent: Any) -> Any:
    return jax.tree.map(
        lambda d, c: None if d is None else c, needed, cotangent, is_leaf=_is_none
    )


def _is_none(x: Any) -> bool:
    return x is None
