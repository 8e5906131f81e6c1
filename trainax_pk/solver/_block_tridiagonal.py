"""Linear systems that couple neighbouring times alone."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float


class _Factors(eqx.Module):
    """Of A = L Lᵀ: Cholesky factors of the pivots, and blocks below the diagonal."""

    pivots: Float[Array, "num_times n n"]
    below: Float[Array, "num_times n n"]


class BlockTridiagonal(lx.AbstractLinearSolver):
    """Direct solver of A x = b with A positive definite and block tridiagonal in time.

    For x of shape `(num_times, *state)`, blocks of n = prod(state). The normal equations
    of weak-constraint 4D-Var are such: a state meets its neighbours alone. A is an
    operator without a matrix; its blocks are read off with 3n products, since columns
    three times apart share no row. Elimination forward and substitution backward are
    then a Kalman smoother in information form: O(num_times · n³).

    Inside `lineax.Normal` it solves the linear systems of optimistix's Gauss-Newton and
    Levenberg-Marquardt; `tx.solver.GaussNewton` takes it as it is.

    Raises:
        ValueError: A vector that is not one array with a time axis and a state.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx
        >>> from trainax_pk.solver import BlockTridiagonal
        >>> def a(x):  # x − x'' at 4 times of 1 entry
        ...     wide = jnp.pad(x, ((1, 1), (0, 0)))
        ...     return 3 * x - wide[2:] - wide[:-2]
        >>> x = jnp.arange(4.0)[:, None]
        >>> spd = lx.positive_semidefinite_tag
        >>> operator = lx.FunctionLinearOperator(a, jax.eval_shape(lambda: x), spd)
        >>> b = a(x)
        >>> x = lx.linear_solve(operator, b, BlockTridiagonal()).value
        >>> [round(float(v), 4) + 0.0 for v in x[:, 0]]
        [0.0, 1.0, 2.0, 3.0]
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        """Reads the blocks and factors them."""
        del options
        structure = operator.in_structure()
        if getattr(structure, "ndim", 0) < 2:
            raise ValueError(
                f"Expected a system in one array (num_times, *state), got {structure}. "
                "Use another linear solver for other unknowns."
            )
        return self.factorise(*_blocks(operator, structure))

    def factorise(
        self,
        diagonal: Float[Array, "num_times n n"],
        below: Float[Array, "num_times-1 n n"],
    ) -> _Factors:
        """The `state` of `lineax.linear_solve` from blocks that are known.

        Args:
            diagonal: Blocks (t, t).
            below: Blocks (t + 1, t).
        """
        return _factorise(diagonal, below)

    def compute(self, state: _Factors, vector: Array, options: dict[str, Any]) -> Any:
        """Substitution forward, then backward."""
        del options
        b = vector.reshape(vector.shape[0], -1)
        x = _substitute(state, b).reshape(vector.shape)
        return x, lx.RESULTS.successful, {}

    def transpose(self, state: _Factors, options: dict[str, Any]) -> Any:
        """A is symmetric."""
        return state, options

    def conj(self, state: _Factors, options: dict[str, Any]) -> Any:
        """A is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """A is positive definite."""
        return True


def _blocks(operator: lx.AbstractLinearOperator, structure: Any) -> tuple[Array, Array]:
    num_times, shape = structure.shape[0], structure.shape
    n = structure.size // num_times
    colour = jnp.arange(num_times) % 3
    unit = jnp.eye(n, dtype=structure.dtype)

    def product(c: Array, j: Array) -> Array:
        probe = jnp.where((colour == c)[:, None], unit[j][None], 0.0)
        return operator.mv(probe.reshape(shape)).reshape(num_times, n)

    colours, columns = jnp.repeat(jnp.arange(3), n), jnp.tile(jnp.arange(n), 3)
    products = jax.vmap(product)(colours, columns).reshape(3, n, num_times, n)
    # Column j of the block (t, t) stands in row t of the product with t's colour, that
    # of the block (t + 1, t) in row t + 1.
    times = jnp.arange(num_times)
    diagonal = products[colour, :, times, :].swapaxes(1, 2)
    below = products[colour[:-1], :, times[1:], :].swapaxes(1, 2)
    return diagonal, below


def _factorise(diagonal: Array, below: Array) -> _Factors:
    def eliminate(pivot: Array, blocks: tuple[Array, Array]) -> tuple[Array, Array]:
        block, coupling = blocks
        # C = B P⁻ᵀ with P the factor of the last pivot; the next pivot is D − C Cᵀ.
        column = _solve(pivot, coupling.T).T
        pivot = jnp.linalg.cholesky(block - column @ column.T)
        return pivot, (pivot, column)

    first = jnp.linalg.cholesky(diagonal[0])
    _, (pivots, columns) = jax.lax.scan(eliminate, first, (diagonal[1:], below))
    zero = jnp.zeros_like(diagonal[:1])
    return _Factors(
        jnp.concatenate([first[None], pivots]), jnp.concatenate([zero, columns])
    )


def _substitute(factors: _Factors, b: Array) -> Array:
    def forward(z: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        pivot, column, b = row
        z = _solve(pivot, (b - column @ z)[:, None])[:, 0]
        return z, z

    _, z = jax.lax.scan(
        forward, jnp.zeros_like(b[0]), (factors.pivots, factors.below, b)
    )
    # The block below the pivot of time t is that of time t + 1.
    after = jnp.concatenate([factors.below[1:], jnp.zeros_like(factors.below[:1])])

    def backward(x: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        pivot, column, z = row
        x = _solve(pivot, (z - column.T @ x)[:, None], transposed=True)[:, 0]
        return x, x

    rows = (factors.pivots, after, z)
    _, x = jax.lax.scan(backward, jnp.zeros_like(b[0]), rows, reverse=True)
    return x


def _solve(factor: Array, b: Array, *, transposed: bool = False) -> Array:
    return jax.scipy.linalg.solve_triangular(
        factor, b, lower=True, trans=int(transposed)
    )
