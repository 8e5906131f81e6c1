"""Tasks of the sbibm benchmark: priors, simulators, reference posteriors."""

import bz2
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk as tx


class LogNormal(tx.data.AbstractPrior):
    """Independent entries whose logarithm is normal."""

    mean: jax.Array
    std: float

    def sample(self, key):
        return jnp.exp(self.mean + self.std * jax.random.normal(key, self.mean.shape))

    def log_prob(self, value):
        logarithm = jnp.log(value)
        normal = tx.data.Normal(self.mean, self.std)
        return normal.log_prob(logarithm) - jnp.sum(logarithm)

    def bounds(self):
        return jnp.zeros(self.mean.shape), jnp.full(self.mean.shape, jnp.inf)


def _box(dim: int, half_width: float) -> tx.data.BoxUniform:
    return tx.data.BoxUniform(jnp.full(dim, -half_width), jnp.full(dim, half_width))


@dataclasses.dataclass(frozen=True)
class Task:
    """A prior, a simulator, the shape of x; published C2ST of NPE, NLE and NRE, and what
    is aimed at where that is less than the published NPE, by budget."""

    prior: Any
    simulator: Callable[..., Any]
    shape: tuple[int, ...]
    published: dict[int, tuple[float | None, float | None, float | None]]
    targets: dict[int, float] = dataclasses.field(default_factory=dict)

    def simulate(self, key: Any, num: int) -> tuple[Any, Any]:
        """Pairs (θ, x) as NumPy arrays, one compiled block after another."""
        return _simulate(self, key, num)


def _simulate(task: Task, key: Any, num: int) -> tuple[Any, Any]:
    @jax.jit
    def block(keys):
        def one(key):
            theta_key, x_key = jax.random.split(key)
            theta = task.prior.sample(theta_key)
            return theta, task.simulator(x_key, theta)

        return jax.vmap(one)(keys)

    keys = jax.random.split(key, num)
    parts = [block(keys[i : i + 10_000]) for i in range(0, num, 10_000)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


_LOTKA = jnp.array([-0.125, -3.0, -0.125, -3.0])
# Lueckmann et al. 2021, results repository; means over ten observations. The row of the
# Gaussian mixture is the corrected rerun.
TASKS = {
    "two_moons": Task(
        _box(2, 1.0), tx.sample_data.two_moons, (2,),
        {1000: (0.725, None, None), 10_000: (0.606, 0.713, 0.761),
         100_000: (0.542, 0.668, 0.629)},
        {10_000: 0.545},
    ),
    "gaussian_mixture": Task(
        _box(2, 10.0), tx.sample_data.gaussian_mixture, (2,),
        {1000: (0.716, None, None), 10_000: (0.615, 0.723, 0.748),
         100_000: (0.548, 0.690, 0.735)},
        {10_000: 0.565},
    ),
    "slcp": Task(
        _box(5, 3.0), tx.sample_data.slcp, (4, 2),
        {1000: (0.975, None, None), 10_000: (0.901, 0.771, 0.947),
         100_000: (0.831, 0.699, 0.919)},
        {10_000: 0.800},
    ),
    "gaussian_linear_uniform": Task(
        _box(10, 1.0), tx.sample_data.gaussian_linear_uniform, (10,),
        {1000: (0.696, None, None), 10_000: (0.553, 0.548, 0.706),
         100_000: (0.509, 0.506, 0.631)},
        {10_000: 0.545},
    ),
    "lotka_volterra": Task(
        LogNormal(_LOTKA, 0.5), tx.sample_data.lotka_volterra, (2, 10),
        {1000: (0.999, None, None), 10_000: (0.997, 0.956, 0.998),
         100_000: (0.981, 0.952, 0.996)},
    ),
}  # fmt: skip


def references(folder: Path, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations and reference draws that a folder of the public benchmark holds."""
    found = []
    for place in sorted((folder / task).glob("observation_*")):
        x = np.loadtxt(place / "observation.csv", delimiter=",", skiprows=1)
        packed = bz2.open(place / "reference_posterior_samples.csv.bz2", "rt")
        with packed as lines:
            draws = np.loadtxt(lines, delimiter=",", skiprows=1)
        shape = TASKS[task].shape
        found.append((np.float32(x).reshape(shape), np.float32(draws)))
    return found
