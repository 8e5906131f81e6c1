"""Priors: densities that integrate to one, draws that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainax_pk.data import (
    AbstractPrior,
    BoxUniform,
    Empirical,
    FourierField,
    GaussianRandomField,
    LogUniform,
    MultivariateNormal,
    Normal,
    Product,
    SimulationDataset,
)

KEY = jax.random.key(3)
COVARIANCE = np.array([[2.0, 0.7], [0.7, 0.5]])


def draws(prior, n=20_000, key=KEY):
    return jax.jit(jax.vmap(prior.sample))(jax.random.split(key, n))


# Prior, interval that holds all but nothing of it, mean, standard deviation.
SCALAR = {
    "uniform": (BoxUniform(-1.5, 2.5), (-2, 3), 0.5, 4 / np.sqrt(12)),
    "log-uniform": (
        LogUniform(0.2, 5.0),
        (0.1, 5.5),
        4.8 / np.log(25),
        np.sqrt((25 - 0.04) / 2 / np.log(25) - (4.8 / np.log(25)) ** 2),
    ),
    "normal": (Normal(1.5, 0.3), (-2, 5), 1.5, 0.3),
}


@pytest.mark.parametrize("name", SCALAR)
def test_density_integrates_to_one_and_draws_have_its_moments(name):
    prior, (low, high), mean, std = SCALAR[name]
    x = jnp.linspace(low, high, 200_001)
    density = jnp.exp(jax.vmap(prior.log_prob)(x))
    assert abs(float(jnp.sum(density) * (x[1] - x[0])) - 1) < 1e-4
    assert abs(float(jnp.sum(x * density) * (x[1] - x[0])) - mean) < 1e-3
    sample = draws(prior)
    # Five standard errors.
    assert abs(float(sample.mean()) - mean) < 5 * std / np.sqrt(len(sample))
    assert abs(float(sample.std()) / std - 1) < 0.03
    least, greatest = prior.bounds()
    assert bool(jnp.all((sample >= least) & (sample <= greatest)))
    assert bool(jnp.all(jnp.isfinite(jax.vmap(prior.log_prob)(sample))))


@pytest.mark.parametrize(
    "prior", [BoxUniform([0.0, 1], [2, 3.0]), LogUniform([1, 2], 4)]
)
def test_nothing_outside_of_the_bounds(prior):
    low, high = prior.bounds()
    for outside in (low - 0.1, high, high.at[0].set(high[0] + 1e-3)):
        assert float(prior.log_prob(outside)) == -np.inf


def test_normal_is_the_closed_form():
    mean, std, x = np.array([1.0, -2.0]), np.array([0.5, 3.0]), np.array([0.2, 1.0])
    expected = np.sum(-0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)))
    assert abs(float(Normal(mean, std).log_prob(x)) - expected) < 1e-12


def test_multivariate_normal():
    mean, x = np.array([1.0, -2.0]), np.array([0.3, 0.4])
    prior = MultivariateNormal(mean, COVARIANCE)
    r = x - mean
    expected = -0.5 * (
        r @ np.linalg.solve(COVARIANCE, r)
        + np.log(np.linalg.det(COVARIANCE))
        + 2 * np.log(2 * np.pi)
    )
    assert abs(float(prior.log_prob(x)) - expected) < 1e-12
    sample = draws(prior)
    np.testing.assert_allclose(np.cov(sample.T), COVARIANCE, rtol=0.06)
    np.testing.assert_allclose(sample.mean(0), mean, atol=0.05)


def test_product_draws_its_parts_independently():
    a, b = Normal(0.5, 1.5), LogUniform(1.0, 3.0)
    named, listed = Product({"b": b, "a": a}), Product([a, a])
    value = {"a": jnp.array(0.3), "b": jnp.array(2.0)}
    expected = a.log_prob(value["a"]) + b.log_prob(value["b"])
    assert abs(float(named.log_prob(value) - expected)) < 1e-12
    first, second = draws(listed)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(float(listed.log_prob((0.1, 0.2))) - 2 * float(
        a.log_prob(0.15) - 0.5 * (0.0025 / 1.5**2)
    )) < 1e-6  # fmt: skip
    low, high = named.bounds()
    assert float(low["b"]) == 1.0 and float(high["a"]) == np.inf
    # The order in which a dictionary was written does not change the draw.
    other = Product({"a": a, "b": b})
    assert float(other.sample(KEY)["b"]) == float(named.sample(KEY)["b"])


def test_empirical_draws_rows_whole():
    rows = {"x": jnp.arange(5.0), "y": 10 * jnp.arange(5.0)[:, None] * jnp.ones((1, 2))}
    prior = Empirical(rows)
    sample = draws(prior, 5000)
    assert bool((sample["y"] == 10 * sample["x"][:, None]).all())
    counts = np.bincount(np.asarray(sample["x"]).astype(int), minlength=5)
    assert (abs(counts / 5000 - 0.2) < 0.03).all()
    there = {"x": jnp.array(3.0), "y": jnp.full(2, 30.0)}
    assert abs(float(prior.log_prob(there)) - np.log(0.2)) < 1e-6
    assert float(prior.log_prob({**there, "x": jnp.array(1.0)})) == -np.inf


def test_fourier_fields_show_the_same_functions_on_a_finer_grid():
    coarse = FourierField(16, num_space_axes=2, highest_mode=3, num_channels=2)
    fine = FourierField(32, num_space_axes=2, highest_mode=3, num_channels=2)
    u, v = coarse.sample(KEY), fine.sample(KEY)
    assert u.shape == (2, 16, 16)
    np.testing.assert_allclose(v[:, ::2, ::2], u, atol=1e-10)
    np.testing.assert_allclose(u.std(axis=(1, 2)), 1.0, rtol=1e-10)
    np.testing.assert_allclose(u.mean(axis=(1, 2)), 0.0, atol=1e-12)
    modes = np.abs(np.fft.fft2(u[0]))
    assert modes[4:13].max() < 1e-9 and modes[:, 4:13].max() < 1e-9


def test_gaussian_random_field_has_the_covariance_that_its_density_uses():
    prior = GaussianRandomField(8, alpha=1.3, tau=4.0, std=1.7, extent=2.0)
    sample = np.asarray(draws(prior))[:, 0]
    # Circulant: the first row tells all; its spectrum is the formula's, by hand.
    k = 2 * np.pi * np.fft.fftfreq(8, 1 / 8) / 2.0
    spectrum = (4.0**2 + k**2) ** -1.3
    row = np.fft.ifft(spectrum).real
    row *= 1.7**2 / row[0]
    covariance = np.array([np.roll(row, i) for i in range(8)])
    np.testing.assert_allclose(sample.T @ sample / len(sample), covariance, atol=0.1)
    x = sample[0]
    expected = -0.5 * (
        x @ np.linalg.solve(covariance, x)
        + np.linalg.slogdet(covariance)[1]
        + 8 * np.log(2 * np.pi)
    )
    assert abs(float(prior.log_prob(x[None])) - expected) < 1e-8


def test_a_foreign_distribution_is_taken_as_it_is():
    class Foreign:
        """Like distreqx and numpyro: `sample(key)`, `log_prob(value)`."""

        def sample(self, key, sample_shape=()):
            return jax.random.exponential(key, sample_shape)

        def log_prob(self, value):
            return -value

    dataset = SimulationDataset(lambda theta: 2 * theta, Foreign(), 4)
    params, output = dataset[:]
    assert bool((output == 2 * params).all()) and len(set(params.tolist())) == 4
    both = Product({"foreign": Foreign(), "own": Normal(0.0, 1.0)})
    assert both.sample(KEY)["foreign"].shape == ()


REFUSED = [
    (lambda: BoxUniform(1.0, 1.0), "`high` to be greater than `low`"),
    (lambda: BoxUniform([0.0, 0.0], [1.0, 1.0, 1.0]), "shapes that broadcast"),
    (lambda: BoxUniform(0.0, np.inf), "`high` to be finite"),
    (lambda: LogUniform(0.0, 1.0), "`low` to be positive"),
    (lambda: LogUniform(2.0, 1.0), "`high` to be greater"),
    (lambda: Normal(0.0, [1.0, 0.0]), "`std` to be positive"),
    (lambda: Normal(1j, 1.0), "`mean` to be real"),
    (lambda: MultivariateNormal(np.zeros(2), np.eye(3)), r"covariance \(n, n\)"),
    (lambda: MultivariateNormal(np.zeros(2), [[1.0, 0.5], [0, 1]]), "symmetric"),
    (lambda: MultivariateNormal(np.zeros(2), [[1.0, 2], [2, 1]]), "positive definite"),
    (lambda: Product({}), "got none"),
    (lambda: Product([1.0]), r"prior with `sample\(key\)`"),
    (lambda: Empirical({"a": np.ones(3), "b": np.ones(4)}), "one number of rows"),
    (lambda: Empirical(np.float64(1.0)), "one number of rows"),
    (lambda: FourierField(8, highest_mode=4), "highest_mode < num_points / 2"),
    (lambda: FourierField(8, highest_mode=2, num_space_axes=4), "1, 2 or 3"),
    (lambda: FourierField(8, highest_mode=2, std=0), "`std` to be a number > 0"),
    (lambda: GaussianRandomField(8, alpha=-1.0), "`alpha` to be a number > 0"),
    (lambda: FourierField(8, highest_mode=2).log_prob(np.ones(8)), "with a density"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_single_precision_stays_single():
    prior = Normal(jnp.zeros(3, jnp.float32), jnp.float32(2.0))
    assert prior.sample(KEY).dtype == jnp.float32
    assert isinstance(prior, AbstractPrior)
    assert BoxUniform([0, 0], [1, 1]).sample(KEY).dtype == jnp.float64
