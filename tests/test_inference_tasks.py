"""Simulators of inference tasks against their definitions."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk import sample_data

KEY = jax.random.key(2)
KEYS = jax.random.split(KEY, 40_000)


def _draws(simulator, theta):
    return np.asarray(jax.vmap(lambda k: simulator(k, theta))(KEYS))


@pytest.mark.slow
def test_two_moons_posterior_is_calibrated():
    class Exact(eqx.Module):
        def sample(self, key, x, num_samples, mask=None):
            return sample_data.two_moons_posterior(key, x, num_samples)

    prior = tx.data.BoxUniform([-1.0, -1.0], [1.0, 1.0])
    theta = jax.vmap(prior.sample)(KEYS[:200])
    x = jax.vmap(sample_data.two_moons)(KEYS[200:400], theta)
    report = tx.amortized.simulation_based_calibration(
        Exact(),
        (theta, x),
        key=KEY,
        num_samples=15,
        num_bins=10,
        statistics={"sum": lambda theta, x: jnp.abs(theta[0] + theta[1])},
    )
    assert np.isfinite(report.ranks).all() and (report.p_values > 0.01).all()
    far = sample_data.two_moons_posterior(KEY, jnp.array([90.0, 0.0]), 3)
    assert np.isnan(far).all()


def test_two_moons_has_two():
    theta = jnp.array([0.3, 0.4])
    x = sample_data.two_moons(KEY, theta)
    mirrored = sample_data.two_moons(KEY, jnp.array([-0.4, -0.3]))
    assert np.allclose(x, mirrored)
    draws = sample_data.two_moons_posterior(KEY, x, 4000)
    assert 0.45 < (draws.sum(axis=1) > 0).mean() < 0.55


def test_slcp_has_the_covariance_of_its_definition():
    theta = jnp.array([0.7, -2.9, -1.2, 0.8, 0.6])
    points = _draws(sample_data.slcp, theta).reshape(-1, 2)
    s, rho = np.array([1.44, 0.64]), np.tanh(0.6)
    covariance = np.outer(s, s) * np.array([[1, rho], [rho, 1]])
    assert np.allclose(points.mean(axis=0), [0.7, -2.9], atol=0.02)
    assert np.allclose(np.cov(points.T), covariance, atol=0.03)
    signs = theta * jnp.array([1.0, 1.0, -1.0, -1.0, 1.0])
    assert (sample_data.slcp(KEY, theta) == sample_data.slcp(KEY, signs)).all()


def test_gaussian_tasks_have_their_moments():
    mixed = _draws(sample_data.gaussian_mixture, jnp.array([2.0, -1.0]))
    assert np.allclose(mixed.mean(axis=0), [2.0, -1.0], atol=0.02)
    centred = mixed[:, 0] - 2
    assert np.isclose(np.mean(centred**2), 0.505, rtol=0.03)
    assert np.isclose(np.mean(centred**4), 1.5 * (1 + 1e-4), rtol=0.06)
    theta = jnp.linspace(-0.9, 0.8, 10)
    linear = _draws(sample_data.gaussian_linear_uniform, theta)
    assert np.allclose(linear.mean(axis=0), theta, atol=0.01)
    assert np.allclose(np.cov(linear.T), 0.1 * np.eye(10), atol=0.005)


def test_lotka_volterra_is_the_equation():
    theta = jnp.array([0.9, 0.06, 1.1, 0.04])

    def field(t, y, args):
        alpha, beta, gamma, delta = args
        prey, predators = y
        return jnp.stack(
            [alpha * prey - beta * prey * predators,
             -gamma * predators + delta * prey * predators]
        )  # fmt: skip

    times = 2.1 * jnp.arange(10)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Dopri8(), 0.0, 19.0, 0.01,
        jnp.array([30.0, 1.0]), theta, saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    )  # fmt: skip
    noise = 0.1 * jax.random.normal(KEY, (2, 10))
    states = sample_data.lotka_volterra(KEY, theta) - noise
    assert np.allclose(states, np.log(solution.ys).T, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dim"),
    [("two_moons", 2), ("slcp", 5), ("gaussian_mixture", 2), ("lotka_volterra", 4),
     ("gaussian_linear_uniform", 10)],
)  # fmt: skip
def test_simulators_are_functions_of_key_and_one_theta(name, dim):
    simulator = getattr(sample_data, name)
    theta = jnp.full(dim, 0.5)
    assert (simulator(KEY, theta) == simulator(KEY, theta)).all()
    assert (simulator(KEYS[1], theta) != simulator(KEY, theta)).all()
    assert simulator(KEY, theta.astype(jnp.float32)).dtype == jnp.float32
    with pytest.raises(ValueError, match=f"{name} to get one vector"):
        simulator(KEY, jnp.ones((3, dim)))
