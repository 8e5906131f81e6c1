"""Losses against numpy, closed forms, trainax, and finite differences."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax

from trainax_pk import loss as tl

POINTWISE = {
    "mse": (tl.mse, lambda p, t: np.mean((p - t) ** 2)),
    "mae": (tl.mae, lambda p, t: np.mean(np.abs(p - t))),
    "rmse": (tl.rmse, lambda p, t: np.sqrt(np.mean((p - t) ** 2))),
    "nmse": (tl.nmse, lambda p, t: np.mean((p - t) ** 2) / np.mean(t**2)),
    "nmae": (tl.nmae, lambda p, t: np.mean(np.abs(p - t)) / np.mean(np.abs(t))),
    "nrmse": (
        tl.nrmse,
        lambda p, t: np.sqrt(np.mean((p - t) ** 2) / np.mean(t**2)),
    ),
}
NORMALISED = ["nmse", "nmae", "nrmse"]
SPECTRAL = {
    "h1": tl.h1(domain_extent=3.0, weight=0.2),
    "band": tl.spectral_band(1, 3),
}
ALL = {name: fn for name, (fn, _) in POINTWISE.items()} | SPECTRAL
ALL["weighted"] = tl.weighted([(0.3, tl.mse), (1.7, tl.rmse), (0.2, SPECTRAL["h1"])])


def _pair(shape=(2, 7, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0.4, 1.3, shape), rng.normal(-0.7, 0.8, shape)


def _tree(seed=0):
    p0, t0 = _pair((2, 6), seed)
    p1, t1 = _pair((3, 5, 4), seed + 1)
    p = {"flow": jnp.asarray(p0), "scalar": [jnp.asarray(p1)]}
    t = {"flow": jnp.asarray(t0), "scalar": [jnp.asarray(t1)]}
    p_flat = np.concatenate([p0.ravel(), p1.ravel()])
    return p, t, p_flat, np.concatenate([t0.ravel(), t1.ravel()])


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_is_the_formula(name):
    fn, oracle = POINTWISE[name]
    p, t = _pair()
    value = fn(jnp.asarray(p), jnp.asarray(t))
    assert value.shape == ()
    np.testing.assert_allclose(value, oracle(p, t), rtol=1e-13)


@pytest.mark.parametrize("name", POINTWISE)
def test_a_tree_is_one_vector_of_entries(name):
    fn, oracle = POINTWISE[name]
    p, t, p_flat, t_flat = _tree()
    np.testing.assert_allclose(fn(p, t), oracle(p_flat, t_flat), rtol=1e-13)


@pytest.mark.parametrize(
    ("fn", "theirs"),
    [
        (tl.mse, trainax.loss.MSELoss()),
        (tl.mae, trainax.loss.MAELoss()),
        (tl.nmse, trainax.loss.Normalized_MSELoss()),
        (tl.nmae, trainax.loss.Normalized_MAELoss()),
    ],
)
def test_trainax_agrees(fn, theirs):
    p, t = map(jnp.asarray, _pair((4, 2, 9)))
    expected = theirs.single_batch(p[0], t[0])
    np.testing.assert_allclose(fn(p[0], t[0]), expected, rtol=1e-14)
    np.testing.assert_allclose(tl.reduce_batch(fn, p, t), theirs(p, t), rtol=1e-14)


@pytest.mark.parametrize("name", [n for n in ALL if n not in NORMALISED])
def test_no_target_stands_for_zero(name):
    p = jnp.asarray(_pair()[0])
    np.testing.assert_allclose(
        ALL[name](p), ALL[name](p, jnp.zeros_like(p)), rtol=1e-14
    )


@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_losses_need_a_target(name):
    with pytest.raises(ValueError, match=f"target for the normalised loss `{name}`"):
        ALL[name](jnp.ones(3))
    with pytest.raises(ValueError, match="normalised loss"):
        ALL[name]({}, {})


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_the_finite_difference(name):
    p, t = map(jnp.asarray, _pair((2, 6, 5)))
    direction = jnp.asarray(_pair((2, 6, 5), seed=9)[0])
    _, slope = jax.jvp(lambda q: ALL[name](q, t), (p,), (direction,))
    reverse = jnp.sum(jax.grad(ALL[name])(p, t) * direction)
    step = 1e-6
    difference = (
        ALL[name](p + step * direction, t) - ALL[name](p - step * direction, t)
    ) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-7)
    np.testing.assert_allclose(slope, reverse, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gradient_at_zero_error_is_zero(name):
    t = jnp.asarray(_pair((2, 6, 5))[1])
    value, gradient = jax.value_and_grad(ALL[name])(t, t)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(t))


def test_nan_stays_nan():
    p = jnp.array([1.0, jnp.nan])
    assert jnp.isnan(tl.rmse(p)) and jnp.isnan(tl.mse(p))


@pytest.mark.parametrize("name", ALL)
def test_dtype_is_kept(name):
    p, t = (jnp.asarray(x, jnp.float32) for x in _pair())
    assert jax.jit(ALL[name])(p, t).dtype == jnp.float32


def test_half_precision_does_not_overflow():
    # The sum of squares is 1e6, above the largest half of 65504.
    p = jnp.full((1, 10_000), 10.0, jnp.float16)
    assert tl.mse(p) == 100.0
    np.testing.assert_allclose(tl.spectral_band(0)(p), 100.0, rtol=1e-3)


def test_complex_states_use_the_modulus():
    p = jnp.array([3.0 + 4.0j, 0.0])
    # Wirtinger convention of JAX: the conjugate of the direction of steepest ascent.
    np.testing.assert_allclose(jax.grad(tl.mae)(p), [0.3 - 0.4j, 0.0], rtol=1e-14)
    np.testing.assert_allclose(tl.mse(p), 12.5)
    np.testing.assert_allclose(tl.mae(p), 2.5)
    assert jnp.isrealobj(tl.mse(p))


@hypothesis.settings(deadline=None, max_examples=12)
@hypothesis.given(
    shape=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    cut=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_bands_sum_to_the_mean_squared_error(shape, cut, seed):
    p, t = map(jnp.asarray, _pair((2, *shape), seed))

    @jax.jit
    def parts(p, t):
        bands = (0, cut), (cut + 1, cut + 2), (cut + 3,)
        return [tl.spectral_band(*band)(p, t) for band in bands]

    np.testing.assert_allclose(sum(parts(p, t)), tl.mse(p, t), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8), (1, 9), (2, 6, 7), (1, 4, 5, 6)])
def test_band_is_the_filtered_field(shape):
    field = _pair(shape)[0]
    axes = tuple(range(1, len(shape)))
    frequencies = [np.fft.fftfreq(n, 1 / n) for n in shape[1:]]
    norm = np.sqrt(sum(k**2 for k in np.meshgrid(*frequencies, indexing="ij")))
    mask = (norm >= 1.5) & (norm < 3.5)
    filtered = np.fft.ifftn(np.fft.fftn(field, axes=axes) * mask, axes=axes)
    np.testing.assert_allclose(
        tl.spectral_band(2, 3)(jnp.asarray(field)),
        np.mean(np.abs(filtered) ** 2),
        rtol=1e-12,
    )


def test_h1_is_the_analytic_gradient():
    extent, weight = 2.5, 0.3
    x = extent * np.arange(12) / 12
    y = extent * np.arange(10) / 10
    k = 2 * np.pi / extent
    xx, yy = np.meshgrid(x, y, indexing="ij")
    u = np.sin(2 * k * xx) * np.cos(k * yy) + 0.4 * np.cos(3 * k * yy) + 0.7
    ux = 2 * k * np.cos(2 * k * xx) * np.cos(k * yy)
    uy = -k * np.sin(2 * k * xx) * np.sin(k * yy) - 1.2 * k * np.sin(3 * k * yy)
    expected = np.mean(u**2) + weight * np.mean(ux**2 + uy**2)
    h1 = tl.h1(domain_extent=extent, weight=weight)
    np.testing.assert_allclose(h1(jnp.asarray(u)[None]), expected, rtol=1e-12)


def test_h1_counts_the_grid_scale():
    saw = jnp.array([[1.0, -1.0] * 4])
    np.testing.assert_allclose(
        tl.h1(domain_extent=2 * np.pi, weight=1.0)(saw), 1 + 4**2, rtol=1e-12
    )


def test_h1_without_gradient_is_mse():
    p, t, *_ = _tree()
    h1 = tl.h1(weight=0.0)
    np.testing.assert_allclose(h1(p, t), tl.mse(p, t), rtol=1e-12)
    for a, b in zip(
        jax.tree.leaves(jax.grad(h1)(p, t)),
        jax.tree.leaves(jax.grad(tl.mse)(p, t)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15)


def test_same_arguments_do_not_trace_again():
    traces = []

    @eqx.filter_jit
    def evaluate(fn, p):
        traces.append(fn)
        return fn(p)

    p = jnp.ones((1, 8))
    for _ in range(3):
        evaluate(tl.spectral_band(1, 3), p)
        evaluate(tl.h1(domain_extent=2.0), p)
    assert len(traces) == 2


def test_weighted_is_the_sum():
    p, t = map(jnp.asarray, _pair())
    both = tl.weighted([(0.25, tl.mse), (-3.0, tl.nmae)])
    expected = 0.25 * tl.mse(p, t) - 3.0 * tl.nmae(p, t)
    np.testing.assert_allclose(both(p, t), expected, rtol=1e-14)


def _worst(prediction, target):
    return jnp.max(jax.vmap(tl.mse)(prediction, target))


@pytest.mark.parametrize("with_target", [True, False])
def test_batch_loss_sees_the_batch(with_target):
    p, t = map(jnp.asarray, _pair((5, 2, 6)))
    t = t if with_target else None
    singles = np.array(
        [tl.mse(p[i], None if t is None else t[i]) for i in range(len(p))]
    )
    batch_loss = tl.BatchLoss(_worst)
    np.testing.assert_allclose(tl.reduce_batch(tl.mse, p, t), singles.mean())
    np.testing.assert_allclose(tl.reduce_batch(batch_loss, p, t), singles.max())
    mixed = tl.weighted([(2.0, batch_loss), (0.5, tl.mse)])
    assert isinstance(mixed, tl.BatchLoss)
    np.testing.assert_allclose(
        tl.reduce_batch(mixed, p, t), 2 * singles.max() + 0.5 * singles.mean()
    )


def test_reduce_batch_of_a_tree():
    trees = [_tree(seed) for seed in (0, 5, 8)]
    p, t = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tree[i] for tree in trees])
        for i in (0, 1)
    )
    expected = np.mean([tl.nrmse(a, b) for a, b, *_ in trees])
    np.testing.assert_allclose(
        jax.jit(tl.reduce_batch, static_argnums=0)(tl.nrmse, p, t), expected, rtol=1e-13
    )


X = jnp.ones((1, 4))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: tl.mse(X, jnp.ones((1, 5))), ValueError, "prediction's shape"),
        (lambda: tl.mse(X, jnp.ones(())), ValueError, "prediction's shape"),
        (lambda: tl.mse({"a": X}, {"b": X}), ValueError, "prediction's structure"),
        (lambda: tl.mse({"a": X}, {"a": X[0]}), ValueError, r"target\['a'\]"),
        (lambda: tl.mse(X, X.astype(jnp.float32)), ValueError, "Cast one of them"),
        (lambda: tl.mse([]), ValueError, "at least one array leaf"),
        (lambda: tl.mse(X[:, :0]), ValueError, "at least one entry"),
        (lambda: tl.mse(jnp.ones(3, int)), TypeError, "floating or complex array"),
        (lambda: tl.mse("state"), TypeError, "got str"),
        (lambda: tl.h1()(X[0]), ValueError, "at least one space axis"),
        (lambda: tl.h1()(X + 1j), ValueError, "Expected a real field"),
        (lambda: tl.h1(domain_extent=0.0), ValueError, "positive `domain_extent`"),
        (lambda: tl.h1(weight=-1.0), ValueError, "`weight` of at least 0"),
        (lambda: tl.h1(weight=float("nan")), ValueError, "finite `weight`"),
        (lambda: tl.h1(weight="1e-3"), TypeError, "number for `weight`"),
        (lambda: tl.h1(weight=True), TypeError, "number for `weight`"),
        (lambda: tl.spectral_band(-1, 2), ValueError, "0 <= low <= high"),
        (lambda: tl.spectral_band(3, 2), ValueError, "0 <= low <= high"),
        (lambda: tl.spectral_band(1.5, 2), TypeError, "integer for `low`"),
        (lambda: tl.spectral_band(1, "2"), TypeError, "integer for `high`"),
        (lambda: tl.weighted([]), ValueError, "at least one pair"),
        (lambda: tl.weighted([tl.mse]), TypeError, "term 0 to be a pair"),
        (lambda: tl.weighted([(tl.mse, 1.0)]), TypeError, "weight comes first"),
        (lambda: tl.weighted([(True, tl.mse)]), TypeError, "weight comes first"),
        (
            lambda: tl.weighted([(1, tl.mse), (np.inf, tl.mae)]),
            ValueError,
            "finite weight for term 1",
        ),
        (lambda: tl.BatchLoss(3.0), TypeError, "Pass a callable"),
        (lambda: tl.reduce_batch(3.0, X), TypeError, "Expected a loss function"),
        (
            lambda: tl.reduce_batch(tl.mse, X, jnp.ones((2, 4))),
            ValueError,
            "one common batch size",
        ),
        (
            lambda: tl.reduce_batch(tl.mse, jnp.ones(())),
            ValueError,
            "one common batch size",
        ),
        (
            lambda: tl.reduce_batch(lambda p, t: p**2, X),
            ValueError,
            "scalar per sample",
        ),
        (
            lambda: tl.reduce_batch(tl.BatchLoss(lambda p, t: p), X),
            ValueError,
            "BatchLoss to return a scalar",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
