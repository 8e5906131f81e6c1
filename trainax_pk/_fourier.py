"""Power of a periodic field by wavenumber, shared by losses and metrics."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def mode_power(
    field: Float[Array, "channels *space"],
) -> tuple[Int[Array, "*modes"], Float[Array, "channels *modes"]]:
    """Squared wavenumber and power of every Fourier mode of a periodic field.

    With û the discrete Fourier transform and M the number of grid points, the power
    of mode κ is |û_κ|² / M². Parseval: its sum over the modes is the spatial mean of
    u². The transform is real; a mode that stands for itself and its conjugate has the
    power of both.

    Args:
        field: One sample, `(channels, *space)`, real, with at least one space axis.

    Returns:
        `(squared_wavenumber, power)` of shapes `modes` and `(channels, *modes)`, where
        `modes` is `space` with the last axis cut to `N // 2 + 1`. The wavenumber
        counts periods per domain on every axis: |κ|² = Σᵢ κᵢ² is an integer.

    Raises:
        ValueError: If the field has no space axis or is not real.
    """
    if jnp.ndim(field) < 2:
        raise ValueError(
            f"Expected a field (channels, *space) with at least one space axis, got "
            f"shape {jnp.shape(field)}. Add a channel axis in front, or use a loss or "
            f"metric without a Fourier transform."
        )
    dtype = jnp.result_type(field)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"Expected a real field, got dtype {dtype}. "
            "Pass real and imaginary part as two channels."
        )
    space = field.shape[1:]
    axes = tuple(range(1, field.ndim))
    # The transform has no half precision.
    wide = field.astype(jnp.promote_types(dtype, jnp.float32))
    modes = jnp.fft.rfftn(wide, axes=axes) / math.prod(space)
    # Not abs()**2, whose derivative passes through the root at zero.
    power = modes.real**2 + modes.imag**2
    multiplicity = _multiplicity(space[-1]).astype(power.dtype)
    return _squared_wavenumber(space), power * multiplicity.reshape(
        (1,) * (field.ndim - 1) + (-1,)
    )


def _multiplicity(num_points: int) -> np.ndarray:
    # All but the mean and (for an even number of points) the Nyquist mode also stand
    # for the conjugate mode, which a real transform leaves out.
    multiplicity = np.full(num_points // 2 + 1, 2.0)
    multiplicity[0] = 1.0
    if num_points % 2 == 0:
        multiplicity[-1] = 1.0
    return multiplicity


def _squared_wavenumber(space: tuple[int, ...]) -> Int[Array, "*modes"]:
    total = jnp.zeros((1,) * len(space), dtype=jnp.int32)
    for axis, num_points in enumerate(space):
        if axis == len(space) - 1:
            wavenumber = np.arange(num_points // 2 + 1)
        else:
            wavenumber = np.rint(np.fft.fftfreq(num_points, 1 / num_points))
        shape = [1] * len(space)
        shape[axis] = -1
        total = total + jnp.asarray(wavenumber**2, dtype=jnp.int32).reshape(shape)
    return total
