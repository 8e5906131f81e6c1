"""Simulators of the sbibm benchmark of simulation-based inference.

Each is `(key, theta) -> x` of one sample, and so fits `jax.vmap` and
`tx.amortized.posterior_predictive`. Where a posterior can be drawn from exactly there is a
function for it.

Source: Lueckmann et al. 2021, arXiv:2101.04653 (appendix T).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._runge_kutta import rk4_step

_HALF_ROOT = math.sqrt(0.5)


def two_moons(key: PRNGKeyArray, theta: Float[Array, "2"]) -> Float[Array, "2"]:
    """A crescent, moved by θ so that its posterior is two crescents.

    x = (r cos a + ¼ − |θ₁ + θ₂| / √2, r sin a + (θ₂ − θ₁) / √2), a ~ U(−π/2, π/2),
    r ~ N(0.1, 0.01²). Prior: uniform on [−1, 1]².

    Args:
        key: Random key.
        theta: `(2,)`.

    Returns:
        `(2,)`.

    Raises:
        ValueError: Another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import two_moons
        >>> two_moons(jax.random.key(0), jnp.zeros(2)).shape
        (2,)
    """
    _check_theta("two_moons", theta, 2)
    shift = jnp.stack([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]])
    return _crescent(key, theta.dtype) + _HALF_ROOT * shift


def two_moons_posterior(
    key: PRNGKeyArray, x: Float[Array, "2"], num_samples: int
) -> Float[Array, "n 2"]:
    """Exact draws of the posterior of `two_moons`, by rejection.

    Given the place on the crescent, x fixes (θ₁ + θ₂) up to its sign and θ₂ − θ₁; what
    leaves the prior's box is rejected.

    Args:
        key: Random key.
        x: `(2,)`, near to what the simulator makes: a draw per 64 candidates must fit.
        num_samples: n.

    Returns:
        `(n, 2)`; rows are NaN if too few candidates fit.

    Raises:
        ValueError: Another shape, a count below 1.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import two_moons_posterior
        >>> two_moons_posterior(jax.random.key(0), jnp.zeros(2), 5).shape
        (5, 2)
    """
    _check_theta("two_moons_posterior", x, 2)
    _check.count("num_samples", num_samples)

    def candidate(key: PRNGKeyArray) -> tuple[Array, Array]:
        place_key, sign_key = jax.random.split(key)
        place = _crescent(place_key, x.dtype)
        total = place[0] - x[0]
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        difference = x[1] - place[1]
        theta = _HALF_ROOT * jnp.stack(
            [sign * total - difference, sign * total + difference]
        )
        return theta, (total >= 0) & jnp.all(jnp.abs(theta) <= 1)

    theta, fits = jax.vmap(candidate)(jax.random.split(key, 64 * num_samples))
    first = jnp.argsort(~fits, stable=True)[:num_samples]
    return jnp.where(fits[first][:, None], theta[first], jnp.nan)


def slcp(key: PRNGKeyArray, theta: Float[Array, "5"]) -> Float[Array, "4 2"]:
    """Simple likelihood, complex posterior: four points of a normal density.

    x_i ~ N((θ₁, θ₂), S), S = [[s₁², ρ s₁ s₂], [ρ s₁ s₂, s₂²]], s₁ = θ₃², s₂ = θ₄²,
    ρ = tanh θ₅. Prior: uniform on [−3, 3]⁵. θ₃ and θ₄ are known up to their signs: four
    modes.

    Args:
        key: Random key.
        theta: `(5,)`.

    Returns:
        `(4, 2)`, four independent points.

    Raises:
        ValueError: Another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import slcp
        >>> slcp(jax.random.key(0), jnp.ones(5)).shape
        (4, 2)
    """
    _check_theta("slcp", theta, 5)
    scale, rho = theta[2:4] ** 2, jnp.tanh(theta[4])
    noise = jax.random.normal(key, (4, 2), theta.dtype)
    second = rho * noise[:, 0] + jnp.sqrt(1 - rho**2) * noise[:, 1]
    correlated = jnp.stack([noise[:, 0], second], axis=1)
    return theta[None, :2] + scale[None] * correlated


def gaussian_mixture(key: PRNGKeyArray, theta: Float[Array, "2"]) -> Float[Array, "2"]:
    """A point around θ, with standard deviation 1 or 0.1, equally likely.

    x ~ ½ N(θ, I) + ½ N(θ, 0.01 I). Prior: uniform on [−10, 10]².

    Args:
        key: Random key.
        theta: `(2,)`.

    Returns:
        `(2,)`.

    Raises:
        ValueError: Another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import gaussian_mixture
        >>> gaussian_mixture(jax.random.key(0), jnp.zeros(2)).shape
        (2,)
    """
    _check_theta("gaussian_mixture", theta, 2)
    which_key, noise_key = jax.random.split(key)
    std = jnp.where(jax.random.bernoulli(which_key), 1.0, 0.1).astype(theta.dtype)
    return theta + std * jax.random.normal(noise_key, (2,), theta.dtype)


def gaussian_linear_uniform(
    key: PRNGKeyArray, theta: Float[Array, "10"]
) -> Float[Array, "10"]:
    """θ with normal noise of variance 0.1, under a uniform prior on [−1, 1]¹⁰.

    Args:
        key: Random key.
        theta: `(10,)`.

    Returns:
        `(10,)`.

    Raises:
        ValueError: Another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import gaussian_linear_uniform
        >>> gaussian_linear_uniform(jax.random.key(0), jnp.zeros(10)).shape
        (10,)
    """
    _check_theta("gaussian_linear_uniform", theta, 10)
    noise = jax.random.normal(key, (10,), theta.dtype)
    return theta + math.sqrt(0.1) * noise


def lotka_volterra(key: PRNGKeyArray, theta: Float[Array, "4"]) -> Float[Array, "2 10"]:
    """Logarithms of two populations at ten times, with noise.

    Ẋ = α X − β X Y, Ẏ = −γ Y + δ X Y from X = 30, Y = 1; log x ~ N(log (X, Y), 0.1²) at
    t = 0, 2.1, … 18.9. Prior: log-normal, log θ ~ N((−⅛, −3, −⅛, −3), ½²). Runge-Kutta 4
    in the logarithms of the populations, which then stay positive, 100 steps between two
    observations.

    Args:
        key: Random key.
        theta: (α, β, γ, δ), `(4,)`.

    Returns:
        `(2, 10)`: prey and predators. Populations are clipped to [10⁻¹⁰, 10⁴].

    Raises:
        ValueError: Another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.sample_data import lotka_volterra
        >>> theta = jnp.exp(jnp.array([-0.125, -3.0, -0.125, -3.0]))
        >>> lotka_volterra(jax.random.key(0), theta).shape
        (2, 10)
    """
    _check_theta("lotka_volterra", theta, 4)
    alpha, beta, gamma, delta = theta
    dt = 2.1 / 100

    def rate(u: Float[Array, "2"]) -> Float[Array, "2"]:
        prey, predators = jnp.exp(u)
        return jnp.stack([alpha - beta * predators, delta * prey - gamma])

    def step(u: Float[Array, "2"], _: None) -> tuple[Float[Array, "2"], None]:
        return rk4_step(rate, u, dt), None

    def between(u: Float[Array, "2"], _: None) -> tuple[Array, Array]:
        return jax.lax.scan(step, u, None, length=100)[0], u

    start = jnp.log(jnp.array([30.0, 1.0], theta.dtype))
    states = jax.lax.scan(between, start, None, length=10)[1].T
    states = jnp.clip(states, math.log(1e-10), math.log(1e4))
    return states + 0.1 * jax.random.normal(key, (2, 10), theta.dtype)


def _crescent(key: PRNGKeyArray, dtype: jnp.dtype) -> Float[Array, "2"]:
    angle_key, radius_key = jax.random.split(key)
    angle = math.pi * (jax.random.uniform(angle_key, (), dtype) - 0.5)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key, (), dtype)
    return jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)])


def _check_theta(who: str, theta: Array, dim: int) -> None:
    if jnp.shape(theta) != (dim,):
        raise ValueError(
            f"Expected {who} to get one vector ({dim},), got the shape "
            f"{jnp.shape(theta)}. Use jax.vmap over keys and parameters for a batch."
        )
