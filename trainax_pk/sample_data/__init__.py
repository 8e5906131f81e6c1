"""Sample data: trajectories of well-known systems, made on the device from a key.

Every generator returns `(num_samples, num_times, channels, *space)`, or
`(num_samples, num_times, dof)` for an ODE, with the initial condition (after the
warm-up) at time 0. Samples are vmapped and the time loop is one scan in one compiled
program: a second call with the same settings and another key compiles nothing. Every
generator has a constructor of its stepper, `make_*_stepper`, a callable PyTree
`u -> u_next` without batch axis, to be used as physics inside a configuration.

Beside them stand simulators of inference tasks, `(key, theta) -> x` of one sample: `slcp`,
`two_moons` and the others.

To add one: a stepper (an `eqx.Module`, or one of exponax built under `filter_jit`), an
initial condition from `_initial`, and a function that checks its arguments and hands
both to `simulate`.
"""

from ._advection import advection_1d_periodic, make_advection_1d_stepper
from ._advection_diffusion import (
    advection_diffusion_2d,
    make_advection_diffusion_2d_stepper,
)
from ._burgers import burgers_1d, make_burgers_1d_stepper
from ._inference_tasks import (
    gaussian_linear_uniform,
    gaussian_mixture,
    lotka_volterra,
    slcp,
    two_moons,
    two_moons_posterior,
)
from ._kolmogorov import kolmogorov_flow_2d, make_kolmogorov_flow_2d_stepper
from ._kuramoto_sivashinsky import (
    kuramoto_sivashinsky_1d,
    make_kuramoto_sivashinsky_1d_stepper,
)
from ._lorenz_63 import (
    lorenz_63,
    lorenz_rk4,
    make_lorenz_63_stepper,
    make_lorenz_stepper_rk4,
)
from ._lorenz_96 import lorenz_96, make_lorenz_96_stepper

__all__ = [
    "advection_1d_periodic",
    "advection_diffusion_2d",
    "burgers_1d",
    "gaussian_linear_uniform",
    "gaussian_mixture",
    "kolmogorov_flow_2d",
    "kuramoto_sivashinsky_1d",
    "lorenz_63",
    "lorenz_96",
    "lorenz_rk4",
    "lotka_volterra",
    "make_advection_1d_stepper",
    "make_advection_diffusion_2d_stepper",
    "make_burgers_1d_stepper",
    "make_kolmogorov_flow_2d_stepper",
    "make_kuramoto_sivashinsky_1d_stepper",
    "make_lorenz_63_stepper",
    "make_lorenz_96_stepper",
    "make_lorenz_stepper_rk4",
    "slcp",
    "two_moons",
    "two_moons_posterior",
]
