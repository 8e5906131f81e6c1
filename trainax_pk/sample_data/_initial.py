"""Random initial conditions: callables `(key, num_samples) -> (num_samples, ...)`.

They are modules and not closures: a module with the same fields is equal, so that the
compiled program of an earlier call is found again.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class FourierSeries1D(eqx.Module):
    """u(x) = Σ_{k=1}^{K} aₖ sin(kx) + bₖ cos(kx), with aₖ, bₖ uniform in [−1, 1).

    Draws what trainax 0.0.2 draws from the same key, so its trajectories come back.
    """

    num_points: int
    highest_mode: int

    def __call__(
        self, key: PRNGKeyArray, num_samples: int
    ) -> Float[Array, "num_samples 1 num_points"]:
        """Initial states for one key."""
        return jax.vmap(self._sample)(jax.random.split(key, num_samples))

    def _sample(self, key: PRNGKeyArray) -> Float[Array, "1 num_points"]:
        # The third key is trainax's draw of an offset, unused there too; `split` by
        # two would give other keys.
        sine_key, cosine_key, _ = jax.random.split(key, 3)
        shape = (self.highest_mode,)
        sines = jax.random.uniform(sine_key, shape, minval=-1.0, maxval=1.0)
        cosines = jax.random.uniform(cosine_key, shape, minval=-1.0, maxval=1.0)
        grid = jnp.linspace(0, 2 * jnp.pi, self.num_points + 1)[:-1]
        phase = jnp.arange(1, self.highest_mode + 1)[:, None] * grid[None]
        products = sines[:, None] * jnp.sin(phase), cosines[:, None] * jnp.cos(phase)
        # Added up in a loop of their own and in trainax's order, to agree with it to
        # the last bit: in one kernel with the products, the sum is a fused
        # multiply-add and rounds otherwise.
        u, _ = jax.lax.scan(
            lambda u, terms: (u + (terms[0] + terms[1]), None),
            jnp.zeros_like(grid),
            products,
        )
        return u[None]


class RandomFourier(eqx.Module):
    """Real field of random Fourier modes with |κᵢ| ≤ K on every axis, without mean.

    The coefficients are independent complex normals, and the field is scaled to the
    standard deviation `std`. The draw does not depend on the resolution: a finer grid
    shows the same functions.
    """

    num_space_axes: int
    num_points: int
    highest_mode: int
    std: float

    def __call__(
        self, key: PRNGKeyArray, num_samples: int
    ) -> Float[Array, "num_samples 1 *space"]:
        """Initial states for one key."""
        return jax.vmap(self._sample)(jax.random.split(key, num_samples))

    def _sample(self, key: PRNGKeyArray) -> Float[Array, "1 *space"]:
        modes = jnp.arange(-self.highest_mode, self.highest_mode + 1)
        real, imaginary = jax.random.normal(
            key, (2,) + (len(modes),) * self.num_space_axes
        )
        middle = (self.highest_mode,) * self.num_space_axes
        field = (real + 1j * imaginary).at[middle].set(0.0)
        grid = 2 * jnp.pi * jnp.arange(self.num_points) / self.num_points
        waves = jnp.exp(1j * modes[:, None] * grid[None])
        for _ in range(self.num_space_axes):
            # Contracts the first mode axis and appends its space axis at the end.
            field = jnp.tensordot(
                field, waves, axes=(0, 0), precision=jax.lax.Precision.HIGHEST
            )
        field = field.real
        return (self.std * field / jnp.std(field))[None]


class NormalState(eqx.Module):
    """Independent normals with mean `mean` and standard deviation `std`, `(dof,)`."""

    num_dofs: int
    mean: float
    std: float

    def __call__(
        self, key: PRNGKeyArray, num_samples: int
    ) -> Float[Array, "num_samples num_dofs"]:
        """Initial states for one key."""
        noise = jax.random.normal(key, (num_samples, self.num_dofs))
        return self.mean + noise * self.std
