"""trainax's sample data, with the same numbers for the same key."""

from trainax_pk.sample_data import (
    advection_1d_periodic,
    lorenz_rk4,
    make_lorenz_stepper_rk4,
)

__all__ = ["advection_1d_periodic", "lorenz_rk4", "make_lorenz_stepper_rk4"]
