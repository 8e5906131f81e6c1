"""Simulations that the benchmarks of data share."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk as tx

DT = 0.01


def lorenz():
    """Forward model, prior, number of samples and of steps."""
    stepper = tx.sample_data.make_lorenz_63_stepper(DT)
    prior = tx.data.Normal(jnp.array([0.0, 0.0, 25.0]), 5.0)
    return tx.data.StepperModel(stepper, dt=DT), prior, 16384, 100


def oscillator():
    """Van der Pol by an adaptive solver."""

    def field(t, y, args):
        x, v = y
        return jnp.stack([v, (1 - x**2) * v - x])

    controller = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    model = tx.data.DiffraxModel(
        field, diffrax.Tsit5(), dt=0.5, stepsize_controller=controller
    )
    return model, tx.data.BoxUniform([-2.0, -2.0], [2.0, 2.0]), 4096, 10


def diffusion():
    """Advection and diffusion on 32 x 32 points."""
    stepper = tx.sample_data.make_advection_diffusion_2d_stepper(num_points=32)
    prior = tx.data.FourierField(32, num_space_axes=2)
    return tx.data.StepperModel(stepper, dt=1.0), prior, 256, 20


CASES = {"Lorenz 63": lorenz, "diffrax, Van der Pol": oscillator, "2D PDE": diffusion}


class InMemory:
    """An array as a source, of trajectories if it has times."""

    block_size = 1
    is_parametric = False

    def __init__(self, array, num_times=None):
        self.array, self.num_times = array, num_times
        row = jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
        self.element_spec = (jax.ShapeDtypeStruct((1,), np.float32), row)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        output = self.array[rows]
        return np.zeros((len(output), 1), np.float32), output

    def with_split(self, split):
        return self

    def content_hash(self):
        return "benchmark" + 60 * "0"
