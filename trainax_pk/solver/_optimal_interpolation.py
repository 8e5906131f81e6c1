"""The best linear estimate from a mean, a covariance and observations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float

from trainax_pk._tree import is_concrete
from trainax_pk.solver._windows import Analysis, check_window

_SPD = lx.positive_semidefinite_tag
_MAX_STEPS = 500


def optimal_interpolation(
    observed: Float[Array, "num_times *state"],
    mask: Bool[Array, "num_times *state"],
    *,
    mean: Any,
    covariance: Any,
    obs_err_var: Any,
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> Analysis:
    """Gaussian estimate of a window: x = x̄ + B Mᵀ (M B Mᵀ + R)⁻¹ (y − M x̄).

    M picks the observed entries, B is the covariance in space and time, R = diag(r) that
    of the observation errors. For a Gaussian field this is the posterior mean; for any
    other the best estimate that is linear in the observations.

    The system is solved at full size, with the identity in the gaps, so that windows
    with different masks share one program. With the same mask for all windows
    (`jax.vmap` with `in_axes=None` for it) a dense B is factored once.

    Args:
        observed: Observations of one window; what stands under the mask is ignored.
        mask: Where the window was observed.
        mean: x̄: a number, `(*state)`, or one for each time, `(num_times, *state)`.
        covariance: B: a matrix `(n, n)` of the flattened window, as
            `jnp.cov(windows.reshape(num_windows, -1), rowvar=False)` estimates it, or a
            lineax operator on arrays `(num_times, *state)` for windows whose matrix
            would not fit.
        obs_err_var: r: a variance, or one for each entry, `(*state)` or
            `(num_times, *state)`.
        linear_solver: Of lineax. By default Cholesky for a matrix, conjugate gradients
            for an operator, 500 steps at most.

    Returns:
        The analysis; `num_steps` counts iterations of the linear solver, 0 for a direct
        one. Cost: n³/3 operations for a matrix, one product with B per iteration for an
        operator.

    Raises:
        ValueError: Shapes that differ, variances that are not positive, NaN where the
            mask is True.

    Source: Gandin 1963; Bretherton et al. 1976, doi:10.1016/0011-7471(76)90001-2.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import optimal_interpolation
        >>> observed, mask = jnp.array([[1.0], [0.0]]), jnp.array([[True], [False]])
        >>> covariance = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        >>> analysis = optimal_interpolation(
        ...     observed, mask, mean=0.0, covariance=covariance, obs_err_var=1.0)
        >>> [round(float(x), 4) for x in analysis.state[:, 0]]
        [0.5, 0.25]
    """
    observed, mask = check_window(observed, mask)
    mean = _entries("mean", mean, observed)
    variance = _entries("obs_err_var", obs_err_var, observed)
    if is_concrete(variance) and not bool((variance > 0).all()):
        raise ValueError(
            f"Expected `obs_err_var` to be positive, got {obs_err_var}. Leave "
            "observations out with the mask."
        )
    departure = jnp.where(mask, observed - mean, 0.0)
    if isinstance(covariance, lx.AbstractLinearOperator):
        product, system = _by_operator(covariance, mask, variance)
        solver = _conjugate_gradients(observed)
    else:
        product, system = _by_matrix(covariance, mask, variance)
        solver = lx.Cholesky()
    solution = lx.linear_solve(system, departure, linear_solver or solver, throw=False)
    weights = jnp.where(mask, solution.value, 0.0)
    state = mean + product(weights)
    solved = solution.result == lx.RESULTS.successful
    return Analysis(
        state=state,
        converged=solved & jnp.isfinite(state).all(),
        num_steps=jnp.asarray(solution.stats.get("num_steps", 0)),
        cost=0.5 * jnp.sum(departure * weights),
    )


def _entries(name: str, value: Any, observed: Array) -> Array:
    array = jnp.asarray(value, observed.dtype)
    if array.shape not in ((), observed.shape[1:], observed.shape):
        raise ValueError(
            f"Expected `{name}` to be a number, of shape {observed.shape[1:]} or of shape "
            f"{observed.shape}, got shape {array.shape}."
        )
    if array.shape == observed.shape[1:]:
        array = array[None]
    return jnp.broadcast_to(array, observed.shape)


def _by_operator(
    covariance: lx.AbstractLinearOperator, mask: Array, variance: Array
) -> tuple[Callable[[Array], Array], lx.AbstractLinearOperator]:
    structure = jax.ShapeDtypeStruct(mask.shape, variance.dtype)
    if covariance.in_structure() != structure:
        raise ValueError(
            f"Expected `covariance` to act on {structure}, got an operator on "
            f"{covariance.in_structure()}."
        )

    def system(w: Array) -> Array:
        inside = covariance.mv(jnp.where(mask, w, 0.0)) + variance * w
        return jnp.where(mask, inside, w)

    return covariance.mv, lx.FunctionLinearOperator(system, structure, _SPD)


def _by_matrix(
    covariance: Any, mask: Array, variance: Array
) -> tuple[Callable[[Array], Array], lx.AbstractLinearOperator]:
    matrix = jnp.asarray(covariance, variance.dtype)
    if matrix.shape != (mask.size, mask.size):
        raise ValueError(
            f"Expected `covariance` of shape {(mask.size, mask.size)}, that of the "
            f"flattened window, got {matrix.shape}. Pass a lineax operator where the "
            "matrix would be too large."
        )
    seen = mask.reshape(-1)
    system = jnp.where(seen[:, None] & seen[None, :], matrix, 0.0)
    system = system + jnp.diag(jnp.where(seen, variance.reshape(-1), 1.0))
    product = lambda w: (matrix @ w.reshape(-1)).reshape(w.shape)  # noqa: E731
    structure = jax.ShapeDtypeStruct(mask.shape, variance.dtype)
    # As a tree of one array, so that both kinds take and give windows.
    blocks = system.reshape(*mask.shape, *mask.shape)
    return product, lx.PyTreeLinearOperator(blocks, structure, _SPD)


def _conjugate_gradients(observed: Array) -> lx.CG:
    # Above the rounding of the products, below which the residual would not fall; and a
    # window that stagnates must not keep its batch waiting.
    tolerance = float(jnp.finfo(observed.dtype).eps) ** 0.75
    return lx.CG(rtol=tolerance, atol=tolerance, max_steps=_MAX_STEPS)
