"""What the classical assimilation methods share. A window is `(num_times, *state)`."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from trainax_pk._tree import is_concrete

Whitener = Callable[[Array], Array]


class Analysis(eqx.Module):
    """What an assimilation method found.

    Attributes:
        state: The analysis, of the shape of what was estimated: `(num_times, *state)`
            for a window.
        converged: Whether the solve met its tolerance. False, not an error, when the
            steps ran out or a linear solve failed: windows of a batch fail one by one.
        num_steps: Steps of the outer solve; 0 for a direct one.
        cost: ½ (misfit to observations + misfit to background and model), each in its
            error covariance, at the analysis.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import strong_4dvar
        >>> y = jnp.array([[1.0], [1.0]])
        >>> found = strong_4dvar(lambda u: 2 * u, y, y > 0, initial=y[0], obs_err_cov=1.0)
        >>> round(float(found.state[0, 0]), 3), round(float(found.cost), 3)
        (0.6, 0.1)
    """

    state: Array
    converged: Bool[Array, ""]
    num_steps: Int[Array, ""]
    cost: Float[Array, ""]


def check_window(observed: Any, mask: Any) -> tuple[Array, Array]:
    """Observations, zero where there are none, and their mask."""
    observed, mask = jnp.asarray(observed), jnp.asarray(mask)
    if observed.ndim < 2 or not jnp.issubdtype(observed.dtype, jnp.floating):
        raise ValueError(
            f"Expected `observed` to be a real array (num_times, *state), got "
            f"{observed.dtype}{list(observed.shape)}. Pass one window; use jax.vmap for "
            "many."
        )
    if mask.shape != observed.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"Expected `mask` to be bool{list(observed.shape)}, as `observed` is, got "
            f"{mask.dtype}{list(mask.shape)}. Mark every entry that was observed."
        )
    both = is_concrete(observed) and is_concrete(mask)
    if both and not bool(jnp.isfinite(jnp.where(mask, observed, 0.0)).all()):
        raise ValueError(
            "Expected finite observations where `mask` is True, got NaN or infinity. "
            "Set the mask to False where nothing was observed."
        )
    # By selection: 0 · NaN is NaN.
    return jnp.where(mask, observed, 0.0), mask


def check_stepper(stepper: Any, state: Any) -> None:
    """The stepper keeps shape and dtype of a state."""
    if not callable(stepper):
        raise ValueError(
            f"Expected `stepper` to be callable, got {stepper!r}. Pass `u -> u_next`."
        )
    out = eqx.filter_eval_shape(stepper, state)
    if getattr(out, "shape", None) != state.shape or out.dtype != state.dtype:
        raise ValueError(
            f"Expected `stepper` to keep a state of {state.dtype}{list(state.shape)}, "
            f"got {out}. A stepper maps `u` to `u_next`."
        )


def check_operator(obs_op: Any, state: Any, shape: tuple[int, ...]) -> Callable:
    """The observation operator maps a state to observations of a shape."""
    if obs_op is None:
        obs_op = _identity
    if not callable(obs_op):
        raise ValueError(
            f"Expected `obs_op` to be callable or None, got {obs_op!r}. Pass "
            "`u -> H(u)`; None observes the state itself."
        )
    out = eqx.filter_eval_shape(obs_op, state)
    if getattr(out, "shape", None) != shape:
        raise ValueError(
            f"Expected `obs_op` to map a state of shape {state.shape} to observations "
            f"of shape {shape}, got {getattr(out, 'shape', out)}. Pass the operator "
            "that made these observations."
        )
    return obs_op


def whitener(
    name: str, covariance: Any, shape: tuple[int, ...], dtype: Any
) -> Whitener:
    """`w -> L⁻¹ w`, L Lᵀ = covariance, for vectors of a shape.

    Args:
        name: What messages call the covariance.
        covariance: A variance; variances of `shape`; or a covariance `(n, n)` of the
            flattened entries.
        shape: Shape of what is weighted.
        dtype: Precision.
    """
    array = _checked_covariance(name, covariance, shape, dtype)
    if array.shape in ((), shape):
        deviation = jnp.broadcast_to(jnp.sqrt(array), shape)
        return lambda w: w / deviation
    factor = jnp.linalg.cholesky(array)
    _check_factor(name, factor)
    return lambda w: _forward(factor, w)


def square_root(
    name: str, covariance: Any, shape: tuple[int, ...], dtype: Any
) -> Whitener:
    """`v -> L v`, L Lᵀ = covariance, for vectors of a shape; see `whitener`."""
    array = _checked_covariance(name, covariance, shape, dtype)
    if array.shape in ((), shape):
        deviation = jnp.broadcast_to(jnp.sqrt(array), shape)
        return lambda v: deviation * v
    factor = jnp.linalg.cholesky(array)
    _check_factor(name, factor)
    return lambda v: (factor @ v.reshape(-1)).reshape(v.shape)


def masked_whitener(covariance: Any, mask: Array, dtype: Any) -> Whitener:
    """`w -> L⁻¹ w` for the observed entries of a window; 0 in the gaps.

    The covariance is that of one time, `mask.shape[1:]`. Of a full one, the rows and
    columns of the gaps are replaced by those of the identity, which leaves the marginal
    covariance of what was observed.
    """
    shape = mask.shape[1:]
    array = _checked_covariance("obs_err_cov", covariance, shape, dtype)
    if array.shape in ((), shape):
        deviation = jnp.broadcast_to(jnp.sqrt(array), shape)
        return lambda w: jnp.where(mask, w / deviation[None], 0.0)
    _check_factor("obs_err_cov", jnp.linalg.cholesky(array))
    seen = mask.reshape(mask.shape[0], -1)
    both = seen[:, :, None] & seen[:, None, :]
    eye = jnp.eye(array.shape[0], dtype=dtype)[None]
    factors = jnp.linalg.cholesky(jnp.where(both, array[None], eye))
    return lambda w: jax.vmap(_forward)(factors, jnp.where(mask, w, 0.0))


def half_squares(*residuals: Array) -> Float[Array, ""]:
    """½ Σ r²."""
    return 0.5 * sum(jnp.sum(jnp.square(r)) for r in residuals)


def default_solver(dtype: Any, linear_solver: Any = None) -> optx.LevenbergMarquardt:
    """Levenberg-Marquardt to the square root of the precision."""
    tolerance = float(jnp.finfo(dtype).eps) ** 0.5
    if linear_solver is None:
        return optx.LevenbergMarquardt(rtol=tolerance, atol=tolerance)
    return optx.LevenbergMarquardt(
        rtol=tolerance, atol=tolerance, linear_solver=linear_solver
    )


def check_solver(solver: Any) -> None:
    """A solver that optimistix runs on least squares."""
    if not isinstance(solver, optx.AbstractLeastSquaresSolver | optx.AbstractMinimiser):
        raise ValueError(
            f"Expected `solver` to be an optimistix least-squares solver or minimiser, "
            f"got {solver!r}. Pass for example optx.LevenbergMarquardt(1e-6, 1e-6)."
        )


def _checked_covariance(
    name: str, covariance: Any, shape: tuple[int, ...], dtype: Any
) -> Array:
    array = jnp.asarray(covariance, dtype)
    size = math.prod(shape)
    if array.shape not in ((), shape, (size, size)):
        raise ValueError(
            f"Expected `{name}` to be a variance, variances of shape {shape} or a "
            f"covariance of shape {(size, size)}, got shape {array.shape}."
        )
    variances = array if array.shape in ((), shape) else jnp.diagonal(array)
    known = is_concrete(variances)
    if known and not bool(((variances > 0) & jnp.isfinite(variances)).all()):
        raise ValueError(
            f"Expected `{name}` to be positive and finite, got {covariance}. Observations "
            "are left out with the mask, not with a variance."
        )
    return array


def _check_factor(name: str, factor: Array) -> None:
    if is_concrete(factor) and not bool(jnp.isfinite(factor).all()):
        raise ValueError(
            f"Expected `{name}` to be positive definite, got a matrix without a "
            "Cholesky factor. Add a small multiple of the identity."
        )


def _forward(factor: Array, w: Array) -> Array:
    flat = jax.scipy.linalg.solve_triangular(factor, w.reshape(-1), lower=True)
    return flat.reshape(w.shape)


def _identity(u: Array) -> Array:
    return u
