"""Energy by wavenumber, and how far a rollout's spectrum is off."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._fourier import mode_power
from ._check import check_trajectories


def energy_spectrum(
    field: Float[Array, "channels *space"],
) -> Float[Array, "num_wavenumbers"]:
    """Energy of a periodic field per wavenumber, binned over shells.

    E(k) = ½ Σ_channels Σ_{k−½ ≤ |κ| < k+½} |û_κ|², with |κ| the Euclidean norm in
    periods per domain. Parseval: Σ_k E(k) is the spatial mean of ½ |u|² (kinetic
    energy if the channels are velocities, enstrophy for a vorticity).

    Args:
        field: One sample `(channels, *space)`, real, with at least one space axis;
            vmap it over samples and times.

    Returns:
        `(num_wavenumbers,)` for k = 0, 1, …, up to the corner of the grid. In more than
        one dimension the shells above N/2 are incomplete.

    Raises:
        ValueError: If the field has no space axis or is not real.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import energy_spectrum
        >>> x = 2 * jnp.pi * jnp.arange(8) / 8
        >>> (energy_spectrum((2 * jnp.sin(x) + 3)[None]).round(4) + 0.0).tolist()
        [4.5, 1.0, 0.0, 0.0, 0.0]
    """
    squared_wavenumber, power = mode_power(field)
    corner = sum((n // 2) ** 2 for n in field.shape[1:])
    highest = (math.isqrt(4 * corner) + 1) // 2
    # Upper edges (k + ½)² times four, in integers: no mode lies on an edge.
    edges = jnp.asarray([(2 * k + 1) ** 2 for k in range(highest + 1)])
    shell = jnp.searchsorted(edges, 4 * squared_wavenumber.reshape(-1))
    energy = 0.5 * jnp.sum(power, axis=0).reshape(-1)
    return jnp.zeros(highest + 1, energy.dtype).at[shell].add(energy)


def spectral_error(
    prediction: Float[Array, "num_samples num_times channels *space"],
    reference: Float[Array, "num_samples num_times channels *space"],
) -> Float[Array, "num_times num_wavenumbers"]:
    """Relative error of the energy spectrum per lead time and wavenumber.

    |E_p(k) − E_r(k)| / max(E_r(k), ε Σ_k E_r(k)), where E is the spectrum averaged
    over the samples and ε the machine epsilon: a shell in which the reference holds
    nothing but rounding is measured against the rounding. Phases do not count, so a
    chaotic system can be judged beyond its predictability.

    Args:
        prediction: Trajectories `(num_samples, num_times, channels, *space)` with at
            least one space axis.
        reference: Trajectories of the same shape.

    Returns:
        `(num_times, num_wavenumbers)`, see `energy_spectrum` for the wavenumbers.

    Raises:
        ValueError: If the shapes do not match or there is no space axis.
        TypeError: If an argument is not a real floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.metrics import spectral_error
        >>> r = jnp.sin(2 * jnp.pi * jnp.arange(4) / 4).reshape(1, 1, 1, 4)
        >>> spectral_error(2 * r, r)[0, 1].round(4).tolist()
        3.0
    """
    check_trajectories(prediction, reference, min_ndim=4)
    spectrum = jax.vmap(jax.vmap(energy_spectrum))
    predicted = jnp.mean(spectrum(prediction), axis=0)
    expected = jnp.mean(spectrum(reference), axis=0)
    epsilon = jnp.finfo(reference.dtype).eps
    floor = epsilon * jnp.sum(expected, axis=-1, keepdims=True)
    return jnp.abs(predicted - expected) / jnp.maximum(expected, floor)
