"""Mean squared and mean absolute error, their roots and normalised forms."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._compare import difference, mean_over_entries


def mse(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Mean squared error of one sample.

    (1/n) Σᵢ |pᵢ − tᵢ|², over the n entries of all leaves together.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. None stands for zero.

    Returns:
        Scalar.

    Raises:
        ValueError: If prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
        2.0
    """
    return mean_over_entries(_mean_square, difference(prediction, target))


def mae(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Mean absolute error of one sample.

    (1/n) Σᵢ |pᵢ − tᵢ|, over the n entries of all leaves together. The gradient at
    pᵢ = tᵢ is zero.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. None stands for zero.

    Returns:
        Scalar.

    Raises:
        ValueError: If prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
        1.0
    """
    return mean_over_entries(_mean_absolute, difference(prediction, target))


def rmse(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Root of the mean squared error of one sample.

    √mse(p, t), in the units of the state. The root has no derivative at zero error;
    the gradient there is defined as zero, so that a perfect fit stays finite.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. None stands for zero.

    Returns:
        Scalar.

    Raises:
        ValueError: If prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.rmse(jnp.array([3.0, 3.0])))
        3.0
    """
    return _root(mse(prediction, target))


def nmse(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Mean squared error relative to the mean square of the target.

    mse(p, t) / mse(t). One is the error of predicting zero. A target that vanishes
    everywhere gives inf or NaN.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. Required.

    Returns:
        Scalar.

    Raises:
        ValueError: Without a target, or if prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.nmse(jnp.array([0.0, 0.0]), jnp.array([1.0, 4.0])))
        1.0
    """
    target = _require(target, "nmse", "mse")
    return mse(prediction, target) / mse(target)


def nmae(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Mean absolute error relative to the mean absolute value of the target.

    mae(p, t) / mae(t). One is the error of predicting zero. A target that vanishes
    everywhere gives inf or NaN.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. Required.

    Returns:
        Scalar.

    Raises:
        ValueError: Without a target, or if prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.nmae(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])))
        0.25
    """
    target = _require(target, "nmae", "mae")
    return mae(prediction, target) / mae(target)


def nrmse(
    prediction: PyTree[Array], target: PyTree[Array] | None = None
) -> Float[Array, ""]:
    """Root mean squared error relative to the root mean square of the target.

    rmse(p, t) / rmse(t). One is the error of predicting zero. A target that vanishes
    everywhere gives inf or NaN; the gradient at zero error is zero.

    Args:
        prediction: State, for example `(channels, *space)`, or a PyTree of such.
        target: State of the same structure, shapes and dtypes. Required.

    Returns:
        Scalar.

    Raises:
        ValueError: Without a target, or if prediction and target do not match.
        TypeError: If a leaf is not a floating or complex array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.loss as loss
        >>> float(loss.nrmse(jnp.array([3.0, 3.0]), jnp.array([2.0, 2.0])))
        0.5
    """
    target = _require(target, "nrmse", "rmse")
    return rmse(prediction, target) / rmse(target)


def _mean_square(x: Array) -> Float[Array, ""]:
    if jnp.iscomplexobj(x):
        return jnp.mean(x.real**2 + x.imag**2)
    return jnp.mean(jnp.square(x))


def _mean_absolute(x: Array) -> Float[Array, ""]:
    if jnp.iscomplexobj(x):
        return jnp.mean(jnp.abs(x))
    # `jnp.abs` has the derivative 1 at zero, which moves a perfect fit; this has 0.
    return jnp.mean(x * jnp.sign(x))


def _root(x: Float[Array, ""]) -> Float[Array, ""]:
    # Two selections: the inner keeps the derivative finite (inf · 0 is NaN), the outer
    # restores the value. `~(x == 0)` and not `x > 0`, so that NaN stays NaN.
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def _require(target: PyTree[Array] | None, name: str, absolute: str) -> PyTree[Array]:
    if target is None or not jax.tree.leaves(target):
        raise ValueError(
            f"Expected a target for the normalised loss `{name}`, got none. "
            f"Pass a target, or use `{absolute}`, which also reduces a residuum."
        )
    return target
