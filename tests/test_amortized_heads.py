"""Densities of heads against closed forms, integrals and their own samples."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk import _extras
from trainax_pk.amortized._gaussian import unpack
from trainax_pk.amortized._head import positive

A = tx.amortized
KEY = jax.random.key(3)
FEATURES = jnp.array([0.4, -1.1, 0.7])
HEADS = {
    "diagonal": functools.partial(A.DiagonalGaussian, 2, 3, width=8),
    "full": functools.partial(A.FullGaussian, 2, 3, width=8),
    "low rank": functools.partial(A.LowRankGaussian, 2, 3, rank=1, width=8),
    "mixture": functools.partial(A.GaussianMixture, 2, 3, num_components=3, width=8),
    "affine autoregressive": functools.partial(
        A.masked_autoregressive_flow, 2, 3, num_layers=3, width=8, depth=1
    ),
    "spline autoregressive": functools.partial(
        A.masked_autoregressive_flow, 2, 3, num_layers=2, width=8, depth=1,
        transformer="spline", interval=3.0,
    ),
    "spline coupling": functools.partial(
        A.coupling_flow, 2, 3, num_layers=3, width=8, depth=1, interval=3.0
    ),
}  # fmt: skip
heads = pytest.mark.parametrize("name", HEADS)

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def _head(name):
    """A head whose weights are large enough that it is no standard normal."""
    head = HEADS[name](key=KEY)
    params, static = eqx.partition(head, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: 1.5 * x, params), static)


@functools.cache
def _moments(name):
    """Integral, mean and covariance of a density on a grid."""
    head = _head(name)
    line = np.linspace(-12, 12, 481)
    z = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(_jit(jax.vmap(lambda z: head.log_prob(z, FEATURES)))(z))
    mass = density * (line[1] - line[0]) ** 2
    mean = mass @ z
    return mass.sum(), mean, (z - mean).T @ (mass[:, None] * (z - mean))


@heads
def test_density_integrates_to_one(name):
    assert abs(_moments(name)[0] - 1) < 0.01


@heads
def test_samples_are_those_of_the_density(name):
    head = _head(name)
    keys = jax.random.split(jax.random.key(5), 40_000)
    draws = np.asarray(_jit(jax.vmap(lambda k: head.sample(k, FEATURES)))(keys))
    _, mean, covariance = _moments(name)
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(axis=0) - mean) < 0.03 * spread).all()
    apart = np.abs(np.cov(draws.T) - covariance) / np.outer(spread, spread)
    assert (apart < 0.05).all()


@heads
def test_features_matter_and_gradients_are_finite(name):
    params, static = eqx.partition(_head(name), eqx.is_inexact_array)
    z = np.array([0.3, -0.6])
    loss = _jit(
        jax.value_and_grad(
            lambda p, f: eqx.combine(p, static).log_prob(z, f), argnums=(0, 1)
        )
    )
    value, grads = loss(params, FEATURES)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads[1]).min() > 0


def _normal(zs, mean, covariance):
    r = zs - np.asarray(mean)
    square = np.einsum("ni,ij,nj->n", r, np.linalg.inv(covariance), r)
    return -0.5 * (square + np.linalg.slogdet(2 * np.pi * np.asarray(covariance))[1])


@pytest.mark.parametrize("name", ["diagonal", "full", "low rank"])
def test_gaussian_log_density_is_the_closed_form(name):
    head = _head(name)
    zs = np.random.default_rng(0).normal(size=(20, 2))
    mean, covariance = _jit(lambda: head.mean_and_covariance(FEATURES))()
    values = _jit(jax.vmap(lambda z: head.log_prob(z, FEATURES)))(zs)
    assert np.abs(values - _normal(zs, mean, covariance)).max() < 1e-5


def test_scales_and_correlations_of_a_full_gaussian_are_apart():
    raw = jnp.array([0.3, -0.2, -6.0, 2.0, 1.5])
    mean, factor = unpack(raw, 2)
    std = np.asarray(positive(raw[2:4]))
    assert np.allclose(mean, raw[:2])
    # The same correlation whatever the scales, which may be tiny.
    other = np.asarray(unpack(raw.at[2].set(0.0), 2)[1])
    correlations = []
    for p in (np.asarray(factor), other):
        covariance = np.linalg.inv(p.T @ p)
        deviations = np.sqrt(np.diag(covariance))
        correlations.append(covariance[0, 1] / deviations.prod())
    assert std[0] < 0.005
    assert np.allclose(np.diag(factor), 1 / std)
    assert np.isclose(*correlations) and np.isclose(
        correlations[0], -1.5 / np.sqrt(3.25)
    )


def test_low_rank_closed_form_in_many_dimensions():
    head = A.LowRankGaussian(12, 3, rank=3, key=KEY)
    zs = np.random.default_rng(1).normal(size=(5, 12))
    mean, covariance = _jit(lambda: head.mean_and_covariance(FEATURES))()
    values = _jit(jax.vmap(lambda z: head.log_prob(z, FEATURES)))(zs)
    assert np.abs(values - _normal(zs, mean, covariance)).max() < 1e-5


def test_low_rank_density_is_never_above_the_truth_for_rounding():
    head = A.LowRankGaussian(12, 3, rank=3, key=KEY)
    last = head.network.layers[-1]
    # σ near 1e-5 beside columns of U near 1: the square of z / σ is near 1e10.
    bias = last.bias.at[12:24].set(-11.0).astype(jnp.float32)
    head = eqx.tree_at(lambda h: h.network.layers[-1].bias, head, bias)
    head = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, head
    )
    zs = np.random.default_rng(1).normal(size=(50, 12))
    single = jax.vmap(lambda z: head.log_prob(z, FEATURES.astype(jnp.float32)))(
        zs.astype(np.float32)
    )
    exact = jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, head
    )
    double = jax.vmap(lambda z: exact.log_prob(z, FEATURES))(zs)
    assert np.all(single <= double + 1e-4 * np.abs(double))


def test_a_mixture_of_equal_components_is_one_gaussian():
    mixture = A.GaussianMixture(2, 3, num_components=4, width=8, key=KEY)
    weights, means, factors = mixture.components(FEATURES)
    last = mixture.network.layers[-1]
    repeat = lambda x: jnp.concatenate([x.reshape(4, -1, *x.shape[1:])[0]] * 4)  # noqa: E731
    same = eqx.tree_at(
        lambda m: (m.network.layers[-1].weight, m.network.layers[-1].bias),
        mixture,
        (repeat(last.weight), repeat(last.bias)),
    )
    z = jnp.array([0.2, 0.9])
    white = factors[0] @ (z - means[0])
    expected = (
        -0.5 * jnp.sum(white**2)
        + jnp.sum(jnp.log(jnp.diagonal(factors[0])))
        - jnp.log(2 * jnp.pi)
    )
    assert weights.shape == (4,)
    assert abs(same.log_prob(z, FEATURES) - expected) < 1e-10


@pytest.mark.parametrize(
    "name", [n for n in HEADS if "autoregressive" in n or "coupling" in n]
)
def test_flows_invert(name):
    bijection = _head(name).distribution.bijection
    z = np.random.default_rng(2).normal(size=(64, 2))

    @_jit
    @jax.vmap
    def there_and_back(z):
        y = bijection.transform(z, FEATURES)
        return y, bijection.inverse(y, FEATURES)

    with jax.numpy_rank_promotion("allow"):
        y, back = there_and_back(z)
    assert np.abs(back - z).max() < 1e-4 and np.abs(y - z).max() > 0.1


def test_a_flow_of_one_parameter_and_a_key_of_the_old_style():
    head = A.coupling_flow(1, 3, num_layers=2, width=4, key=jax.random.PRNGKey(0))
    sample = eqx.filter_eval_shape(head.sample, jax.random.PRNGKey(1), FEATURES)
    assert sample.shape == (1,) and head.dim == 1


def test_scales_are_kept_from_optimizers():
    scale = A.Standardisation(jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5]))
    assert not jax.tree.leaves(eqx.filter(scale, eqx.is_inexact_array))
    x = jnp.array([4.0, 7.0])
    assert scale(x).tolist() == [1.0, 18.0]
    assert jnp.allclose(scale.inverse(scale(x)), x)
    jacobian = jax.jacfwd(scale)(x)
    assert np.isclose(scale.log_det((2,)), np.linalg.slogdet(jacobian)[1])


def test_standardisation_skips_what_was_not_seen_and_shares_axes():
    x = np.array([[[1.0, np.nan], [3.0, 8.0]], [[5.0, 6.0], [7.0, 2.0]]])
    mask = np.isfinite(x)
    plain = A.fit_standardisation(x, mask)
    assert np.allclose(plain.mean.value, [[3.0, 6.0], [5.0, 5.0]])
    assert np.allclose(plain.std.value, [[2.0, 1.0], [2.0, 3.0]])  # One value: 1.
    shared = A.fit_standardisation(x, mask, shared_axes=(0,))
    assert np.allclose(shared.mean.value, [[4.0, 16 / 3]])
    with pytest.raises(ValueError, match="`shared_axes` among the 2 axes"):
        A.fit_standardisation(x, mask, shared_axes=(2,))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: A.FullGaussian(0, 3, key=KEY), "`dim` to be an integer >= 1"),
        (lambda: A.FullGaussian(2, 0, key=KEY), "`num_features`"),
        (lambda: A.LowRankGaussian(2, 3, rank=0, key=KEY), "`rank`"),
        (lambda: A.GaussianMixture(2, 3, num_components=0, key=KEY), "`num_comp"),
        (lambda: A.coupling_flow(2, 3, transformer="rq", key=KEY), "'affine' or 'spl"),
        (lambda: A.masked_autoregressive_flow(9, 3, width=8, key=KEY), "`width`"),
        (lambda: A.Flow(None), "distribution of flowjax"),
    ],
)
def test_bad_numbers_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_missing_library_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"trainax_pk\[amortized\]"):
        HEADS["spline coupling"](key=KEY)
