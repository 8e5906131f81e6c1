"""Metrics of rollouts: how the error of an autoregressive emulator grows.

Functions of two trajectories `(num_samples, num_times, channels, *space)`, prediction
and reference. They are pure JAX: jit them, or vmap over seeds. The entries of the time
axis are the lead times; leave the initial condition out (`trajectory[:, 1:]`), where
every error is zero. `spectral_ratio` and `spread_error_ratio` take ensembles
`(num_samples, num_members, channels, *space)` and `(num_samples, channels, *space)`.
"""

from ._correlation import correlation_per_lead_time, correlation_time
from ._ensemble import spectral_ratio, spread_error_ratio
from ._error import geometric_mean, nrmse_per_lead_time
from ._spectrum import energy_spectrum, spectral_error

__all__ = [
    "correlation_per_lead_time",
    "correlation_time",
    "energy_spectrum",
    "geometric_mean",
    "nrmse_per_lead_time",
    "spectral_error",
    "spectral_ratio",
    "spread_error_ratio",
]
