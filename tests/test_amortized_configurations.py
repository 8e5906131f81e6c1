"""Configurations of amortized inference against formulas and closed forms."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from tests.test_amortized_posterior import (
    COVARIANCE,
    FORWARD,
    GAIN,
    PRIOR,
    draw_pairs,
    train,
)
from trainax_pk.amortized._mcmc import _starts

pytestmark = pytest.mark.slow

A, C = tx.amortized, tx.configuration
KEY = jax.random.key(9)
PAIRS = draw_pairs(jax.random.key(2), 7)


def _ratio(width=16, depth=2):
    return A.AmortizedRatio(
        A.IdentityEncoder(3), prior=PRIOR, width=width, depth=depth, key=KEY
    )


def _moments(samples):
    return np.mean(samples, axis=0), np.cov(np.asarray(samples).T)


def _assert_conjugate(samples, x, tolerance):
    mean, covariance = _moments(samples)
    spread = np.sqrt(np.diag(COVARIANCE))
    shift = (mean - GAIN @ np.asarray(x)) / spread
    assert np.abs(shift).max() < tolerance
    error = np.linalg.norm(covariance - COVARIANCE) / np.linalg.norm(COVARIANCE)
    assert error < tolerance


def test_nll_is_the_mean_of_single_log_densities():
    model = A.AmortizedPosterior(A.IdentityEncoder(3), A.FullGaussian(2, 3, key=KEY))
    theta, x = PAIRS
    single = eqx.filter_jit(model.log_prob)
    expected = -np.mean([single(t, y) for t, y in zip(theta, x, strict=True)])
    loss, _ = eqx.filter_jit(C.AmortizedNLL())(model, A.Pairs(theta, x))
    assert np.isclose(loss, expected)
    assert C.AmortizedNLL().num_times == 1


@pytest.mark.parametrize("gamma", [0.7, 1.0, 3.0, math.inf])
def test_ratio_estimation_is_its_formula(gamma):
    model, count = _ratio(), 3
    theta, x = PAIRS
    table = jax.vmap(jax.vmap(model.log_ratio, in_axes=(0, None)), in_axes=(None, 0))
    h = np.asarray(jax.jit(table)(theta, x))
    size, total = len(x), 0.0
    for i in range(size):
        joint = [h[i, (i + s) % size] for s in range(count)]
        apart = [h[i, (i + s) % size] for s in range(1, count + 1)]
        if math.isinf(gamma):
            total -= math.log(math.exp(joint[0]) / np.exp(joint).sum())
            continue
        none = count / (count + gamma * np.exp(apart).sum())
        first = gamma * math.exp(joint[0]) / (count + gamma * np.exp(joint).sum())
        total -= (math.log(none) + gamma * math.log(first)) / (1 + gamma)
    loss, _ = eqx.filter_jit(C.RatioEstimation(count, gamma))(model, (theta, x))
    assert np.isclose(loss, total / size)


def test_one_contrast_of_weight_one_is_binary_classification():
    model = _ratio()
    theta, x = PAIRS
    ratios = jax.jit(jax.vmap(model.log_ratio))
    own, other = ratios(theta, x), ratios(jnp.roll(theta, -1, axis=0), x)
    expected = 0.5 * jnp.mean(jax.nn.softplus(-own) + jax.nn.softplus(other))
    loss, _ = eqx.filter_jit(C.RatioEstimation(1, 1.0))(model, (theta, x))
    assert np.isclose(loss, expected)


def test_flow_matching_is_its_formula():
    model = A.FlowMatchingPosterior(
        A.IdentityEncoder(3), 2, prior=PRIOR, width=8, depth=1, key=KEY
    )
    theta, x = PAIRS
    key, sigma = jax.random.key(5), 0.2
    time_key, noise_key = jax.random.split(key)
    times = jax.random.uniform(time_key, (7,)) ** 0.5
    noise = jax.random.normal(noise_key, (7, 2))
    total, velocity = 0.0, eqx.filter_jit(model.velocity)
    for t, z0, z1, y in zip(times, noise, theta, x, strict=True):
        place = (1 - (1 - sigma) * t) * z0 + t * z1
        wanted = z1 - (1 - sigma) * z0
        total += jnp.mean((velocity(t, place, y) - wanted) ** 2) / 7
    matching = eqx.filter_jit(C.FlowMatching(sigma, time_exponent=1.0))
    loss, _ = matching(model, (theta, x), key=key)
    assert np.isclose(loss, total)


def test_flow_matching_density_is_that_of_its_samples():
    model = A.FlowMatchingPosterior(
        A.IdentityEncoder(3), 2, width=16, depth=2, num_ode_steps=16, key=KEY
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(jax.tree.map(lambda p: 2.5 * p, params), static)
    x = jnp.array([1.0, -0.5, 0.3])
    line = jnp.linspace(-12, 12, 161)
    theta = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    density = jax.jit(jax.vmap(lambda t: model.log_prob(t, x)))(theta)
    mass = jnp.exp(density) * (line[1] - line[0]) ** 2
    assert abs(mass.sum() - 1) < 0.01
    samples = jax.jit(lambda k: model.sample(k, x, 20_000))(KEY)
    mean = (mass[:, None] * theta).sum(axis=0)
    std = jnp.sqrt((mass[:, None] * (theta - mean[None]) ** 2).sum(axis=0))
    assert jnp.allclose(samples.mean(axis=0), mean, atol=0.05)
    assert jnp.allclose(samples.std(axis=0), std, rtol=0.05)
    assert jnp.abs(mean).max() + jnp.abs(std - 1).max() > 0.1  # Not the noise itself.


def test_flow_matching_learns_the_conjugate_posterior():
    pairs = draw_pairs(jax.random.key(0), 20_000)
    model = A.FlowMatchingPosterior(
        A.IdentityEncoder(3),
        2,
        prior=PRIOR,
        width=32,
        depth=2,
        num_ode_steps=8,
        key=KEY,
    ).standardised(pairs)
    model = train(model, C.FlowMatching(), A.Pairs(*pairs), 1000, 500, rate=1e-2)
    x = jnp.array([0.7, -0.2, 0.4])
    samples = jax.jit(lambda k: model.sample(k, x, 20_000))(KEY)
    _assert_conjugate(samples, x, 0.12)


def _log_likelihood(theta, x):
    return -2.0 * jnp.sum((x - jnp.asarray(FORWARD) @ theta) ** 2)


def test_variational_bound_is_the_divergence_from_the_posterior():
    configuration = C.Variational(_log_likelihood, PRIOR, num_samples=4000)
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3), A.FullGaussian(2, 3, depth=0, key=KEY)
    )
    _, x = PAIRS
    loss, _ = eqx.filter_jit(configuration)(model, (PAIRS[0], x), key=KEY)
    total = 0.0
    for y in x:
        mean, covariance = map(np.asarray, model.head.mean_and_covariance(y))
        shift = GAIN @ np.asarray(y) - mean
        inverse = np.linalg.inv(COVARIANCE)
        divergence = 0.5 * (
            np.trace(inverse @ covariance)
            + shift @ inverse @ shift
            - 2
            + np.log(np.linalg.det(COVARIANCE) / np.linalg.det(covariance))
        )
        # log ∫ p(θ) e^{log likelihood} dθ: a normal density of x, without its factor.
        marginal = FORWARD @ FORWARD.T + 0.25 * np.eye(3)
        log_evidence = -0.5 * y @ np.linalg.solve(marginal, y) - 0.5 * np.log(
            np.linalg.det(4 * marginal)
        )
        total += (divergence - log_evidence) / len(x)
    assert np.isclose(loss, total, rtol=0.02)


def test_variational_training_reaches_the_conjugate_posterior():
    pairs = draw_pairs(jax.random.key(0), 2000)
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3), A.FullGaussian(2, 3, depth=0, key=KEY), prior=PRIOR
    )
    configuration = C.Variational(_log_likelihood, PRIOR, num_samples=8)
    model = train(model, configuration, A.Pairs(*pairs), 800, 200)
    x = jnp.array([0.7, -0.2, 0.4])
    mean, covariance = model.head.mean_and_covariance(x)
    assert np.allclose(mean, GAIN @ np.asarray(x), atol=0.02)
    error = np.linalg.norm(covariance - COVARIANCE)
    assert error < 0.1 * np.linalg.norm(COVARIANCE)


def test_crps_is_its_definition():
    rng = np.random.default_rng(0)
    members, truth = rng.normal(size=(5, 3, 2)), rng.normal(size=(3, 2))
    error = np.abs(members - truth[None]).mean()
    spread = np.abs(members[:, None] - members[None]).sum() / (2 * 5 * 4 * 6)
    value = tx.loss.crps_ensemble(jnp.asarray(members), jnp.asarray(truth))
    assert np.isclose(value, error - spread)
    tree = tx.loss.crps_ensemble({"a": jnp.asarray(members)}, {"a": jnp.asarray(truth)})
    assert np.isclose(tree, value)
    with pytest.raises(ValueError, match="after the axis of members"):
        tx.loss.crps_ensemble(jnp.asarray(members), jnp.asarray(truth[:2]))
    model = A.AmortizedPosterior(A.IdentityEncoder(3), A.FullGaussian(2, 3, key=KEY))
    theta, x = PAIRS
    keys = jax.random.split(KEY, 7)
    single = jax.jit(lambda k, t, y: tx.loss.crps_ensemble(model.sample(k, y, 4), t))
    expected = np.mean([single(*row) for row in zip(keys, theta, x, strict=True)])
    loss, _ = eqx.filter_jit(C.EnsembleCRPS(4))(model, (theta, x), key=KEY)
    assert np.isclose(loss, expected)


def test_crps_of_a_normal_ensemble_is_the_closed_form():
    members = jax.random.normal(KEY, (200_000,))
    y = 0.8
    phi = math.exp(-0.5 * y**2) / math.sqrt(2 * math.pi)
    cdf = 0.5 * (1 + math.erf(y / math.sqrt(2)))
    expected = y * (2 * cdf - 1) + 2 * phi - 1 / math.sqrt(math.pi)
    assert abs(tx.loss.crps_ensemble(members, jnp.asarray(y)) - expected) < 0.005


def test_gaussian_losses_are_closed_forms():
    mean, std = jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])
    y = jnp.array([1.0, 0.2])
    expected = 0.5 * ((y - mean) / std) ** 2 + jnp.log(std) + 0.5 * np.log(2 * np.pi)
    assert np.isclose(tx.loss.gaussian_nll((mean, std), y), expected.mean())
    other = (jnp.array([0.1, 0.4]), jnp.array([1.5, 0.7]))
    draws = mean[None] + std[None] * jax.random.normal(KEY, (400_000, 2))
    log_density = lambda m, s: (  # noqa: E731
        -0.5 * ((draws - m[None]) / s[None]) ** 2 - jnp.log(s)[None]
    )
    sampled = (log_density(mean, std) - log_density(*other)).sum(axis=1).mean()
    assert np.isclose(tx.loss.kl_gaussian((mean, std), other), sampled, rtol=0.01)
    assert tx.loss.kl_gaussian((mean, std), (mean, std)) == 0
    with pytest.raises(ValueError, match="leaves of the same shapes"):
        tx.loss.kl_gaussian((mean, std[:1]), other)


def test_a_learned_likelihood_gives_the_conjugate_posterior_by_chains():
    pairs = draw_pairs(jax.random.key(0), 30_000)
    model = A.AmortizedLikelihood(
        A.FullGaussian(3, 2, depth=0, key=KEY), prior=PRIOR, shape=(3,)
    ).standardised(pairs)
    model = train(model, C.AmortizedNLL(), A.Pairs(*pairs), 800)
    theta = jnp.array([0.5, -1.0])
    made = jax.jit(lambda k: model.sample(k, theta, 20_000))(KEY)
    assert np.allclose(made.mean(axis=0), FORWARD @ np.asarray(theta), atol=0.03)
    assert np.allclose(np.cov(made.T), 0.25 * np.eye(3), atol=0.02)
    x = jnp.array([0.7, -0.2, 0.4])
    chains = A.sample_posterior(
        model, PRIOR, x, 8000, key=KEY, num_chains=40, num_warmup=100
    )
    assert float(chains.r_hat.max()) < 1.05 and int(chains.num_divergent) == 0
    _assert_conjugate(chains.samples, x, 0.08)


def test_chains_start_in_each_mode_as_its_mass_asks():
    # x = |θ| + noise under a prior with 3 times the mass on one side.
    class Lopsided(tx.data.AbstractPrior):
        def sample(self, key):
            side_key, key = jax.random.split(key)
            sign = jnp.where(jax.random.bernoulli(side_key, 0.75), 1.0, -1.0)
            return sign * (1 + jax.random.uniform(key, (1,)))

        def log_prob(self, value):
            return jnp.sum(jnp.log(jnp.where(value > 0, 0.75, 0.25)))

        def bounds(self):
            return jnp.array([-2.0]), jnp.array([2.0])

    model = A.AmortizedLikelihood(
        A.FullGaussian(1, 1, depth=0, key=KEY), prior=Lopsided(), shape=(1,)
    )
    evidence = lambda theta, x, mask: -50 * jnp.sum((jnp.abs(theta) - x) ** 2)  # noqa: E731
    starts = _starts(
        model, Lopsided(), evidence, jnp.array([1.5]), None, KEY, 200, 20_000
    )
    theta = jax.vmap(model.support.constrain)(starts)
    assert abs(float(jnp.mean(theta > 0)) - 0.75) < 0.01
    assert abs(float(jnp.mean(jnp.abs(theta))) - 1.5) < 0.02


def test_independent_observations_add_up():
    model = A.AmortizedLikelihood(
        A.FullGaussian(3, 2, key=KEY), prior=PRIOR, shape=(3,), independent=True
    )
    theta, x = PAIRS
    single = A.AmortizedLikelihood(
        A.FullGaussian(3, 2, key=KEY), prior=PRIOR, shape=(3,)
    )
    density = eqx.filter_jit(single.log_prob)
    total = sum(density(theta[0], y) for y in x)
    assert np.isclose(eqx.filter_jit(model.log_prob)(theta[0], x), total)
    scaled = model.standardised((theta[:1], x[None]))
    assert np.allclose(scaled.x_scale.mean.value, np.mean(x, axis=0))


def test_a_learned_ratio_gives_the_conjugate_posterior():
    pairs = draw_pairs(jax.random.key(0), 20_000)
    model = _ratio(width=32).standardised(pairs)
    model = train(model, C.RatioEstimation(8), A.Pairs(*pairs), 1000, 500, rate=5e-3)
    x = jnp.array([0.7, -0.2, 0.4])
    # Draws of the prior weighted by the ratio: what chains would sample, without them.
    theta = np.random.default_rng(0).normal(size=(100_000, 2))
    ratio = np.exp(jax.jit(jax.vmap(lambda t: model.log_ratio(t, x)))(theta))
    picked = np.random.default_rng(1).choice(100_000, 20_000, p=ratio / ratio.sum())
    _assert_conjugate(theta[picked], x, 0.2)
    # With a finite γ it is normalised: its mean over prior draws is 1.
    assert abs(ratio.mean() - 1) < 0.1


def _likelihood(**options):
    return A.AmortizedLikelihood(
        A.FullGaussian(3, 2, key=KEY), prior=PRIOR, shape=(3,), **options
    )


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: C.RatioEstimation(0), "`num_contrastive`"),
        (lambda: C.RatioEstimation(1, math.inf), "`num_contrastive`"),
        (lambda: C.RatioEstimation(3, 0.0), "`gamma`"),
        (lambda: C.RatioEstimation(7)(_ratio(), PAIRS), "batches of more than"),
        (lambda: C.FlowMatching(1.0), "`sigma`"),
        (lambda: C.FlowMatching()(None, PAIRS), "model with `velocity`"),
        (
            lambda: C.FlowMatching()(
                A.FlowMatchingPosterior(A.IdentityEncoder(3), 2, key=KEY), PAIRS
            ),
            "Expected a key",
        ),
        (
            lambda: A.FlowMatchingPosterior(
                A.IdentityEncoder(3), 3, prior=PRIOR, key=KEY
            ),
            "dim=2",
        ),
        (lambda: C.Variational(_log_likelihood, KEY), "prior with `log_prob"),
        (lambda: C.EnsembleCRPS(1), "`num_members`"),
        (lambda: _likelihood().log_prob(PAIRS[0][0], PAIRS[1]), "shape"),
        (
            lambda: _likelihood().log_prob(PAIRS[0][0], PAIRS[1][0], jnp.ones(3, bool)),
            "complete observations",
        ),
        (
            lambda: A.sample_posterior(None, PRIOR, PAIRS[1][0], 10, key=KEY),
            "AmortizedLikelihood or AmortizedRatio",
        ),
        (
            lambda: A.sample_posterior(
                _likelihood(), PRIOR, PAIRS[1][0], 10, key=KEY, num_chains=4
            ),
            "multiple of num_chains=4",
        ),
    ],
)
def test_bad_numbers_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
