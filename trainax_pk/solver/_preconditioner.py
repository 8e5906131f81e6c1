"""Directions of the second order: gradients divided by the cost's curvature."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float

from trainax_pk.solver._block_tridiagonal import BlockTridiagonal
from trainax_pk.solver._cost import VariationalCost, Weight
from trainax_pk.solver._prior import DynamicalPrior


class AbstractPreconditioner(eqx.Module):
    """Turns a gradient into a direction, which the modulator sees in its place.

    To add one: subclass, declare what is trained as fields, and implement `__call__` on
    one sample, differentiable in all that it is given, `at` and `num_steps`.
    """

    @property
    @abc.abstractmethod
    def num_steps(self) -> int | None:
        """How many steps it has numbers for; None where all steps are alike."""

    @abc.abstractmethod
    def __call__(
        self,
        gradient: Float[Array, "T ..."],
        cost: VariationalCost,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "T ..."]:
        """The direction, of the gradient's shape.

        Args:
            gradient: ∇U(x).
            cost: U, at its step.
            x: Where the gradient was taken.
            y: Observations.
            mask: Where they hold.
        """

    @abc.abstractmethod
    def at(self, step: int | Array) -> "AbstractPreconditioner":
        """The preconditioner of a solver's step; itself where all are alike."""

    def directions(
        self,
        gradient: Array,
        cost: VariationalCost,
        x: Array,
        y: Array,
        mask: Array,
        background: Array | None = None,
    ) -> Array:
        """Of a batch, whose samples have a background each where there is any.

        One sample after another on a single CPU, where the matrices of one fit the
        cache and those of many do not; all at once elsewhere, so that a batch may be
        spread over devices.
        """

        def one(sample: Any) -> Array:
            gradient, background, *window = sample
            here = cost if background is None else cost.about(background)
            return self(gradient, here, *window)

        alone = jax.default_backend() == "cpu" and jax.device_count() == 1
        each = jax.lax.map if alone else lambda f, xs: jax.vmap(f)(xs)
        return each(one, (gradient, background, x, y, mask))


class GaussNewton(AbstractPreconditioner):
    """d = (JᵀJ + λ)⁻¹ ∇U / 2: the direction of Levenberg and Marquardt.

    J is the Jacobian of all that U squares, with its weights: U = ‖r‖², ∇U = 2 Jᵀr.
    With δ = d and λ = 0 a linear problem is solved in one step. On a long window the
    gradient carries what is observed a time or so further at each step; d carries it
    all the way at once, and what is left to be learned is where the model's
    linearisation misleads.

    Two ways to solve, with n = prod(space):

    * `BlockTridiagonal()`, for a `DynamicalPrior` and observations of each time by
      itself (H(x) of shape `(T, *obs)`, row t a function of x_t): exact, by
      elimination along time. Compute is n directions of the model's linearisation at
      each time and T · n³; a step that is differentiated needs 2 to 4 T · n² numbers
      more.
      In single precision weights up to some 10⁶ times the damping are safe.
    * Any matrix-free solver of positive definite systems, for any prior; conjugate
      gradients by default. Compute is as many products with J and Jᵀ as it takes,
      hundreds on a long window. Its tolerance is that of the direction and of the
      derivative through it, and where its `max_steps` end it the direction is what it
      has by then.

    Derivatives are those of the solution (implicit), second derivatives of the prior
    included. Prior and operator need derivatives of both modes (no `jax.custom_vjp`).
    The solve is in single precision where states are in half.

    Attributes:
        damping: λ, one number or one for each step, fixed or learned.
        linear_solver: How the system is solved.

    Raises:
        ValueError: A damping that is not positive, no linear solver; when called, a
            `BlockTridiagonal` for a prior that is no `DynamicalPrior`, or observations
            without a time axis.
        RuntimeError: At run time: a `BlockTridiagonal` for an H that mixes times.

    Source: Marquardt 1963, doi:10.1137/0111030; learned steps along such directions:
    Tang and Tan 2019, arXiv:1806.04807.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> cost = tx.solver.VariationalCost(tx.solver.DynamicalPrior(lambda u: u / 2))
        >>> newton = tx.solver.GaussNewton(1e-6, linear_solver=tx.solver.BlockTridiagonal())
        >>> x, y = jnp.zeros((3, 1)), jnp.array([[4.0], [2.0], [1.0]])
        >>> seen = jnp.ones((3, 1), bool)
        >>> d = newton(cost.gradient(x, y, seen), cost, x, y, seen)
        >>> [round(float(v), 3) for v in (x - d)[:, 0]]
        [4.0, 2.0, 1.0]
    """

    damping: Weight
    linear_solver: lx.AbstractLinearSolver

    def __init__(
        self,
        damping: float | Sequence[float] = 1e-2,
        *,
        learned: bool = False,
        linear_solver: lx.AbstractLinearSolver | None = None,
    ) -> None:
        """Checks and keeps.

        Args:
            damping: λ > 0, in units of the weights times squared derivatives of H and Φ.
            learned: Train the logarithm of λ.
            linear_solver: Of positive definite systems.
        """
        self.damping = Weight(damping, learned=learned, name="damping")
        if self.damping.fixed == 0:
            raise ValueError(
                "Expected `damping` > 0, got 0: what is neither observed nor tied to "
                "its neighbours would have no direction. Pass a small number."
            )
        if linear_solver is None:
            linear_solver = lx.CG(rtol=1e-3, atol=1e-6)
        if not isinstance(linear_solver, lx.AbstractLinearSolver):
            raise ValueError(
                f"Expected `linear_solver` to be a solver of lineax, got "
                f"{linear_solver!r}. Pass lx.CG(...) or tx.solver.BlockTridiagonal()."
            )
        if isinstance(linear_solver, lx.Normal):
            raise ValueError(
                "Expected a solver of the normal equations, got lx.Normal(...), which "
                "would square them once more. Pass the solver inside it."
            )
        self.linear_solver = linear_solver

    @property
    def num_steps(self) -> int | None:
        """How many steps there are dampings for."""
        return self.damping.num_steps

    def at(self, step: int | Array) -> "GaussNewton":
        """With the damping of a step."""
        return eqx.tree_at(lambda p: p.damping, self, self.damping.at(step))

    def __call__(
        self,
        gradient: Float[Array, "T ..."],
        cost: VariationalCost,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "T ..."]:
        """d."""
        # Half precision has no factorisations, and too few digits for products.
        full = jnp.promote_types(x.dtype, jnp.float32)
        x, y, b = x.astype(full), y.astype(full), (gradient / 2).astype(full)
        damping, *weights = (
            jnp.asarray(w, full) for w in (self.damping.value(), *cost.weights())
        )
        _, push = jax.linearize(lambda x: cost.parts(x, y, mask), x)
        pull = jax.linear_transpose(push, x)

        def product(v: Array) -> Array:
            parts = zip(weights, push(v), strict=True)
            return (
                pull(tuple((w * p).astype(p.dtype) for w, p in parts))[0] + damping * v
            )

        if isinstance(self.linear_solver, BlockTridiagonal):
            blocks = _blocks(cost, weights, x, y, mask, damping)
            factors = self.linear_solver.factorise(*jax.lax.stop_gradient(blocks))
            solve = lambda _, b: self.linear_solver.compute(factors, b, {})[0]  # noqa: E731
        else:
            solve = self._solve
        # Not lineax's own derivative, which raises where a window of a batch blows up.
        d = jax.lax.custom_linear_solve(product, b, solve, symmetric=True)
        return d.astype(gradient.dtype)

    def _solve(self, product: Callable[[Array], Array], b: Array) -> Array:
        spd, structure = lx.positive_semidefinite_tag, jax.eval_shape(lambda: b)
        operator = lx.FunctionLinearOperator(product, structure, spd)
        found = lx.linear_solve(operator, b, self.linear_solver, throw=False).value
        # An iterative solver stops at once there, and hands back where it started.
        return jnp.where(jnp.isfinite(b).all(), found, jnp.nan)


def _blocks(
    cost: VariationalCost,
    weights: list[Any],
    x: Array,
    y: Array,
    mask: Array,
    damping: Array,
) -> tuple[Array, Array]:
    """Diagonal blocks of JᵀJ + λ, `(T, n, n)`, and those below, `(T − 1, n, n)`."""
    prior, (w_o, w_p, *w_b) = cost.prior, weights
    if type(prior).__call__ is not DynamicalPrior.__call__:
        raise ValueError(
            f"Expected a DynamicalPrior beside BlockTridiagonal, got {prior!r}: only "
            "there a state meets none but its neighbours. Leave `linear_solver` out for "
            "conjugate gradients."
        )
    num_times = x.shape[0]
    if y.shape[:1] != (num_times,):
        raise ValueError(
            f"Expected observations of each of {num_times} times beside "
            f"BlockTridiagonal, got the shape {list(y.shape)}. Use conjugate gradients."
        )
    n = x[0].size
    ahead, roots = prior.propagators(x)
    squared = w_p * roots**2
    below = -squared[:, None, None] * ahead
    outer = ahead.swapaxes(1, 2) @ -below
    # One entry for each of the state on the diagonal, added in one pass over the blocks.
    entries = damping + jnp.pad(squared, (1, 0))[:, None]
    entries = entries.at[0].add(sum(w_b))
    if cost.observation is None:
        entries = entries + w_o * mask.reshape(num_times, n)
    entries = jnp.broadcast_to(entries, (num_times, n))[:, :, None]
    diagonal = jnp.pad(outer, ((0, 1), (0, 0), (0, 0))) + entries * jnp.eye(n)[None]
    if cost.observation is not None:
        rows = _rows(lambda x: cost.parts(x, y, mask)[0], x)
        diagonal = diagonal + w_o * (rows.swapaxes(1, 2) @ rows)
    return diagonal.astype(x.dtype), below.astype(x.dtype)


def _rows(observe: Callable[[Array], Array], x: Array) -> Array:
    """Derivatives of H(x)_t in x_t, `(T, m, n)`: one direction serves all times."""
    _, push = jax.linearize(observe, x)
    n, num_times = x[0].size, x.shape[0]
    column = lambda e: push(jnp.broadcast_to(e.reshape(x.shape[1:]), x.shape))  # noqa: E731
    columns = jax.vmap(column)(jnp.eye(n, dtype=x.dtype))
    rows = columns.reshape(n, num_times, -1).transpose(1, 2, 0)
    # With another change at each time, these are all there is to H if it is local.
    probe = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    seen = push(probe).reshape(num_times, -1)
    told = jnp.einsum("tmn,tn->tm", rows, probe.reshape(num_times, n))
    mixed = jnp.abs(seen - told).max(initial=0) > 1e-2 * jnp.abs(seen).max(initial=0)
    return eqx.error_if(
        rows,
        mixed,
        "Expected an observation operator that acts on each time by itself beside "
        "BlockTridiagonal, got one that mixes times. Use conjugate gradients: "
        "GaussNewton(...) without `linear_solver`.",
    )
