"""How an ensemble of fields compares with what was there."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._spectrum import energy_spectrum


def spectral_ratio(
    ensemble: Float[Array, "num_samples num_members channels *space"],
    reference: Float[Array, "num_samples channels *space"],
) -> Float[Array, "num_wavenumbers"]:
    """E_members(k) / E_reference(k): 1 where fields have the power of the truth.

    Spectra are averaged over samples (and members) before they are divided. A mean of
    members, or a single best field, falls short of 1 where its scale is uncertain. Shells
    in which the reference holds nothing but rounding are measured against the rounding.

    Args:
        ensemble: Members for each sample, on a periodic domain.
        reference: What was there.

    Returns:
        `(num_wavenumbers,)`, see `energy_spectrum` for the wavenumbers.

    Raises:
        ValueError: If the shapes do not match or there is no space axis.
        TypeError: If an argument is not a real floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import spectral_ratio
        >>> u = jnp.sin(2 * jnp.pi * jnp.arange(8) / 8).reshape(1, 1, 8)
        >>> spectral_ratio(jnp.stack([2 * u, 0 * u], axis=1), u)[1].round(4).tolist()
        2.0
    """
    check_ensemble(ensemble, reference, min_ndim=3)
    spectrum = jax.vmap(energy_spectrum)
    members = jnp.mean(jax.vmap(spectrum)(ensemble), axis=(0, 1))
    expected = jnp.mean(spectrum(reference), axis=0)
    floor = jnp.finfo(reference.dtype).eps * jnp.sum(expected)
    return members / jnp.maximum(expected, floor)


def spread_error_ratio(
    ensemble: Float[Array, "num_samples num_members channels *space"],
    reference: Float[Array, "num_samples channels *space"],
) -> Float[Array, ""]:
    """√((M + 1) / M · mean variance of members) / RMSE of their mean.

    1 for members that are draws of the same distribution as the truth, whatever their
    number; below 1 for an ensemble that is too sure of itself.

    Args:
        ensemble: M >= 2 members for each sample.
        reference: What was there.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes do not match, or there are fewer than 2 members.
        TypeError: If an argument is not a real floating array.

    Source: Fortin et al. 2014, doi:10.1175/JHM-D-14-0008.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import spread_error_ratio
        >>> members = jnp.array([-1.0, 1.0]).reshape(1, 2, 1)
        >>> round(float(spread_error_ratio(members, jnp.full((1, 1), 1.5))), 4)
        1.1547
    """
    check_ensemble(ensemble, reference, min_ndim=2)
    count = ensemble.shape[1]
    if count < 2:
        raise ValueError(
            f"Expected at least 2 members, got {count}. One has no spread: draw more."
        )
    variance = jnp.mean(jnp.var(ensemble, axis=1, ddof=1))
    error = jnp.mean((jnp.mean(ensemble, axis=1) - reference) ** 2)
    return jnp.sqrt((count + 1) / count * variance / error)


def check_ensemble(ensemble: Any, reference: Any, *, min_ndim: int) -> None:
    """Raise unless members and reference are real fields of one shape."""
    for name, value in (("ensemble", ensemble), ("reference", reference)):
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Expected {name} to be a real floating array, got "
                f"{type(value).__name__ if dtype is None else dtype}. "
                "Metrics take one array; apply them per leaf of a PyTree."
            )
    shape, wanted = jnp.shape(ensemble), jnp.shape(reference)
    if len(wanted) < min_ndim or (*shape[:1], *shape[2:]) != wanted or 0 in shape:
        axes = "num_samples, [num_members,] channels" + ", *space" * (min_ndim > 2)
        raise ValueError(
            f"Expected an ensemble and a reference ({axes}), got the shapes {shape} and "
            f"{wanted}. Members are the second axis of the ensemble."
        )
