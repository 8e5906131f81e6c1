"""Diagnostics pass what is exact and find what is 20 % too narrow."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from tests.test_amortized_posterior import COVARIANCE, GAIN, draw_pairs, simulate

pytestmark = pytest.mark.slow

A = tx.amortized
KEY = jax.random.key(13)
PAIRS = draw_pairs(jax.random.key(21), 2000)


class Exact(eqx.Module):
    """The conjugate posterior, its standard deviations times a factor."""

    factor: jax.Array
    shift: jax.Array

    def __init__(self, factor=1.0, shift=0.0):
        self.factor, self.shift = jnp.asarray(factor), jnp.asarray(shift)

    def _root(self):
        return self.factor * jnp.linalg.cholesky(jnp.asarray(COVARIANCE))

    def _mean(self, x):
        return jnp.asarray(GAIN) @ x + self.shift

    def sample(self, key, x, num_samples, mask=None):
        noise = jax.random.normal(key, (num_samples, 2))
        return self._mean(x)[None] + noise @ self._root().T

    def log_prob(self, theta, x, mask=None):
        root = self._root()
        white = jax.scipy.linalg.solve_triangular(
            root, theta - self._mean(x), lower=True
        )
        return -0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(jnp.diagonal(root)))


def _fit(theta, x):
    return Exact().log_prob(theta, x)


def _p_values(posterior):
    ranks = A.simulation_based_calibration(
        posterior,
        PAIRS,
        key=KEY,
        num_samples=127,
        statistics={"density": _fit},
    )
    assert ranks.names == ("theta[0]", "theta[1]", "density")
    coverage = A.expected_coverage(posterior, PAIRS, key=KEY, num_samples=127)
    random = A.tarp(posterior, PAIRS, key=KEY, num_samples=127)
    return ranks.p_values, coverage, random


def test_the_exact_posterior_passes():
    p_values, coverage, random = _p_values(Exact())
    assert (p_values > 0.05).all()
    assert coverage.p_value > 0.05 and random.p_value > 0.05
    for report in (coverage, random):
        # Four standard errors of a share of 2000.
        assert jnp.abs(report.coverage - report.levels).max() < 0.045


def test_one_that_is_a_fifth_too_narrow_is_found():
    p_values, coverage, random = _p_values(Exact(0.8))
    assert (p_values < 1e-3).all()
    assert coverage.p_value < 1e-3 and random.p_value < 1e-3
    # Of a Gaussian in two dimensions the region of credibility c holds 1 − (1 − c)^0.64.
    expected = 1 - (1 - coverage.levels) ** 0.64
    assert jnp.abs(coverage.coverage - expected).max() < 0.045


def test_a_shifted_one_is_found_with_the_sign_of_the_shift():
    report = A.simulation_based_calibration(
        Exact(shift=0.3), PAIRS, key=KEY, num_samples=127, statistics={"density": _fit}
    )
    assert (report.p_values[:2] < 1e-3).all()
    assert (np.asarray(report.ranks)[:, :2].mean(axis=0) < 0.45).all()


def test_the_prior_passes_on_margins_and_fails_on_a_statistic():
    class Prior(eqx.Module):
        def sample(self, key, x, num_samples, mask=None):
            return jax.random.normal(key, (num_samples, 2))

    report = A.simulation_based_calibration(
        Prior(),
        PAIRS,
        key=KEY,
        num_samples=63,
        statistics={"fit": _fit},
    )
    assert (report.p_values[:2] > 1e-3).all() and report.p_values[2] < 1e-6


def test_ties_are_broken_at_random():
    class Point(eqx.Module):
        def sample(self, key, x, num_samples, mask=None):
            return jnp.zeros((num_samples, 2))

    theta = jnp.zeros((2000, 2))
    report = A.simulation_based_calibration(
        Point(), (theta, PAIRS[1]), key=KEY, num_samples=10
    )
    assert (report.p_values > 1e-3).all()


def test_masks_reach_the_posterior():
    class Masked(eqx.Module):
        def sample(self, key, x, num_samples, mask=None):
            return jnp.where(mask[0], 5.0, -5.0) + jnp.zeros((num_samples, 2))

    mask = jnp.arange(100)[:, None] % 2 * jnp.ones((1, 3)) > 0
    theta, x = (leaf[:100] for leaf in PAIRS)
    report = A.simulation_based_calibration(
        Masked(), A.Pairs(theta, x, mask), key=KEY, num_samples=9, num_bins=2
    )
    assert ((report.ranks[:, 0] < 0.1) == mask[:, 0]).all()


def test_p_values_of_uniform_numbers_are_uniform():
    keys = jax.random.split(KEY, 400)
    p_values = jax.vmap(lambda k: A.uniformity_p_value(jax.random.uniform(k, (500,))))(
        keys
    )
    assert 0.4 < p_values.mean() < 0.6 and 0.02 < (p_values < 0.05).mean() < 0.09
    # 10 and 30 numbers in two bins: χ² = 10, of one degree of freedom.
    uneven = jnp.concatenate([jnp.full(10, 0.1), jnp.full(30, 0.9)])
    assert np.isclose(A.uniformity_p_value(uneven, 2), 0.0015654, rtol=1e-3)


def test_predictive_checks():
    x = PAIRS[1][0]
    checks = A.posterior_predictive(
        Exact(),
        simulate,
        x,
        key=KEY,
        num_samples=4000,
        statistics={"mean": jnp.mean, "spread": jnp.std},
    )
    assert all(p > 0.02 for p, _ in checks.values())
    made = checks["mean"][1]
    below = float((made <= x.mean()).mean())
    assert np.isclose(checks["mean"][0], 2 * min(below, 1 - below))
    odd = A.posterior_predictive(
        Exact(shift=3.0), simulate, x, key=KEY, statistics={"mean": jnp.mean}
    )
    assert odd["mean"][0] < 0.01


def test_c2st_of_two_normals_is_the_best_accuracy():
    x, y = np.random.default_rng(0).normal(size=(2, 3000, 2))
    same = A.c2st(x, y, key=KEY, max_epochs=30)
    assert abs(same - 0.5) < 0.03
    # Shifted by one: Φ(1/2).
    shifted = A.c2st(x + [[1.0, 0.0]], y, key=KEY)
    assert abs(shifted - 0.6915) < 0.02


def test_c2st_without_a_key_is_scikit_learns():
    x, y = np.random.default_rng(0).normal(size=(2, 4000, 2))
    # cross_val_score of MLPClassifier(random_state=1) of scikit-learn 1.9.1, folds alike.
    assert abs(A.c2st(x + [[0.5, 0.0]], y) - 0.58725) < 0.01


def test_agreement_passes_and_says_what_is_wrong():
    x, y = np.random.default_rng(1).normal(size=(2, 3000, 2))
    report = A.assert_posterior_agreement(x, y, key=KEY, max_epochs=20)
    assert np.allclose(report.std_ratio, x.std(axis=0) / y.std(axis=0))
    with pytest.raises(AssertionError, match=r"mean shifts \[0\.\d+ 0\.\d+\]"):
        A.assert_posterior_agreement(x + 0.4, y, key=KEY, max_epochs=5)
    with pytest.raises(AssertionError, match="ratios of standard deviations"):
        A.assert_posterior_agreement(1.5 * x, y, key=KEY, max_epochs=5)


def test_pictures_hold_what_was_measured():
    levels = jnp.linspace(0.1, 0.9, 5)
    coverage = A.CoverageReport(levels, levels**2, levels, jnp.ones(()))
    lines = A.plot_coverage({"narrow": coverage}).axes[0].lines
    assert np.allclose(lines[1].get_ydata(), levels**2)
    ranks = A.RankReport(PAIRS[0], jnp.array([0.3, 0.4]), ("a", "b"))
    titles = [axes.get_title() for axes in A.plot_ranks(ranks).axes]
    assert titles == ["a, p = 0.3", "b, p = 0.4"]
    assert len(A.plot_pairs({"draws": PAIRS[0]}, jnp.zeros(2)).axes) == 4
    checks = {"mean": (jnp.ones(()), PAIRS[0][:, 0])}
    axes = A.plot_predictive(checks, {"mean": 0.5}).axes[0]
    assert axes.lines[0].get_xdata()[0] == 0.5


SMALL = jnp.zeros((20, 2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: A.simulation_based_calibration(
                Exact(), tuple(x[:99] for x in PAIRS), key=KEY
            ),
            "at least 100 pairs",
        ),
        (
            lambda: A.expected_coverage(Exact(), PAIRS, key=KEY, num_samples=0),
            "num_sam",
        ),
        (lambda: A.tarp(Exact(), PAIRS, key=KEY, levels=[1.5]), "`levels`"),
        (
            lambda: A.posterior_predictive(
                Exact(), simulate, PAIRS[1][0], key=KEY, statistics={}
            ),
            "at least one statistic",
        ),
        (lambda: A.c2st(SMALL, SMALL[:10], key=KEY), "same shape"),
        (lambda: A.c2st(SMALL, SMALL, key=KEY), "at least 50 samples"),
        (
            lambda: A.c2st(SMALL.at[0, 0].set(jnp.nan), SMALL, key=KEY, num_folds=2),
            "finite samples",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
