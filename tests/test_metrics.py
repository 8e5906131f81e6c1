"""Metrics of rollouts against numpy loops, exponax, apebench and closed forms."""

import apebench
import exponax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from trainax_pk import metrics as tm


def _pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.2, shape), rng.normal(-0.5, 0.7, shape)


def _arrays(shape, seed=0):
    return map(jnp.asarray, _pair(shape, seed))


@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 4, 2, 7), (2, 5, 3, 4, 6)])
def test_nrmse_is_the_loop(shape):
    p, r = _pair(shape)
    expected = [
        np.mean(
            [
                np.sqrt(np.mean((p[s, t] - r[s, t]) ** 2) / np.mean(r[s, t] ** 2))
                for s in range(shape[0])
            ]
        )
        for t in range(shape[1])
    ]
    value = tm.nrmse_per_lead_time(jnp.asarray(p), jnp.asarray(r))
    np.testing.assert_allclose(value, expected, rtol=1e-13)


@pytest.mark.parametrize("shape", [(3, 4, 1, 7), (3, 4, 2, 7), (2, 5, 3, 6, 6)])
def test_nrmse_is_apebench(shape):
    p, r = _arrays(shape)
    theirs = jax.vmap(
        lambda a, b: exponax.metrics.mean_metric(exponax.metrics.nRMSE, a, b),
        in_axes=1,
    )(p, r)
    ours = tm.nrmse_per_lead_time(p, r, channels="sum")
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    if shape[2] == 1:
        np.testing.assert_allclose(tm.nrmse_per_lead_time(p, r), theirs, rtol=1e-13)


def test_geometric_mean_is_apebench():
    errors = np.geomspace(1e-3, 20.0, 120) * (1 + 0.1 * np.sin(np.arange(120)))
    table = pd.DataFrame(
        {"time_step": 1 + np.arange(120), "mean_nRMSE": errors, "run": "a"}
    )
    for up_to in (1, 37, 100):
        theirs = apebench.aggregate_gmean(table, up_to=up_to, grouping_cols=["run"])
        np.testing.assert_allclose(
            tm.geometric_mean(jnp.asarray(errors), horizon=up_to),
            theirs["gmean_mean_nRMSE"][0],
            rtol=1e-12,
        )
    np.testing.assert_allclose(
        tm.geometric_mean(jnp.asarray(errors), horizon=None),
        np.exp(np.mean(np.log(errors))),
        rtol=1e-12,
    )


def test_geometric_mean_keeps_other_axes_and_zero():
    errors = jnp.array([[1.0, 0.0], [4.0, 3.0], [99.0, 99.0]])
    np.testing.assert_allclose(tm.geometric_mean(errors, horizon=2), [2.0, 0.0])


@pytest.mark.parametrize("shape", [(3, 4, 1, 7), (2, 3, 2, 4, 5)])
def test_correlation_is_exponax(shape):
    p, r = _arrays(shape)
    theirs = jax.vmap(
        lambda a, b: exponax.metrics.mean_metric(exponax.metrics.correlation, a, b),
        in_axes=1,
    )(p, r)
    ours = tm.correlation_per_lead_time(p, r)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def _rotating(angles):
    """One sample whose correlation with the reference is cos(angle)."""
    angles = jnp.asarray(angles)
    p = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None, :, None]
    r = jnp.tile(jnp.array([1.0, 0.0]), (1, len(angles), 1, 1))
    return 1.7 * p, 0.3 * r


@pytest.mark.parametrize("threshold", [0.8, 0.2, -0.4])
def test_correlation_time_is_the_crossing(threshold):
    angles = np.linspace(0, np.pi, 23)
    p, r = _rotating(angles)
    cosines = np.cos(angles)
    first = int(np.argmax(cosines < threshold))
    before, after = cosines[first - 1], cosines[first]
    crossing = first - 1 + (before - threshold) / (before - after)
    np.testing.assert_allclose(
        tm.correlation_time(p, r, threshold), crossing, rtol=1e-12
    )
    assert tm.correlation_time(p, r, threshold, interpolate=False) == first
    # Dense in time, the interpolated time is that of the continuous curve.
    fine = np.linspace(0, np.pi, 4001)
    seconds = tm.correlation_time(*_rotating(fine), threshold) * np.pi / 4000
    np.testing.assert_allclose(seconds, np.arccos(threshold), atol=1e-6)


def test_correlation_time_first_dip_counts():
    p, r = _rotating(np.arccos([1.0, 0.9, 0.5, 0.95, 0.1]))
    np.testing.assert_allclose(tm.correlation_time(p, r, 0.7), 1.5, rtol=1e-12)


def test_correlation_time_never_and_at_once():
    p, r = _rotating([0.1, 0.2, 0.3])
    assert tm.correlation_time(p, r) == jnp.inf
    assert tm.correlation_time(-p, r) == 0
    assert tm.correlation_time(-p, r, interpolate=False) == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_rollout_that_blows_up_is_uncorrelated(broken):
    p, r = _rotating([0.0, 0.0, 0.0, 0.0])
    p = p.at[:, 2:].set(broken)
    np.testing.assert_allclose(tm.correlation_time(p, r, 0.8), 1.2, rtol=1e-12)
    two = tm.correlation_time(
        jnp.concatenate([p, r]), jnp.concatenate([r, r]), threshold=0.4
    )
    assert two == jnp.inf


@hypothesis.settings(deadline=None, max_examples=12)
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_spectrum_is_the_loop_and_sums_to_the_energy(shape, seed):
    field = _pair((2, *shape), seed)[0]
    modes = np.fft.fftn(field, axes=range(1, field.ndim)) / np.prod(shape)
    spectrum = np.zeros(40)
    for index in np.ndindex(*shape):
        squared = sum(min(i, n - i) ** 2 for i, n in zip(index, shape, strict=True))
        shell = int(np.floor(np.sqrt(squared) + 0.5))
        spectrum[shell] += 0.5 * np.sum(np.abs(modes[(slice(None), *index)]) ** 2)
    ours = np.asarray(jax.jit(tm.energy_spectrum)(jnp.asarray(field)))
    np.testing.assert_allclose(ours, spectrum[: len(ours)], atol=1e-14)
    np.testing.assert_allclose(
        ours.sum(), 0.5 * np.mean(np.sum(field**2, axis=0)), rtol=1e-12
    )


def test_spectrum_knows_a_diagonal_wave():
    x = 2 * np.pi * np.arange(16) / 16
    wave = np.cos(3 * x[:, None] - 4 * x[None, :])
    spectrum = tm.energy_spectrum(jnp.asarray(wave)[None])
    np.testing.assert_allclose(spectrum[5], 0.25, rtol=1e-12)
    np.testing.assert_allclose(np.delete(spectrum, 5), 0, atol=1e-15)


def test_spectral_error_per_wavenumber():
    x = 2 * np.pi * np.arange(12) / 12
    amplitude = np.array([[1.0, 0.5], [2.0, 0.7]])  # sample, wavenumber 1 and 3
    modes = np.stack([np.sin(x), np.cos(3 * x + 0.3)])
    reference = (amplitude @ modes)[:, None, None]
    shifted = np.roll(reference, 5, axis=-1)
    factor = np.array([[1.5, 0.2], [1.5, 0.2]])
    changed = ((amplitude * factor) @ modes)[:, None, None]
    prediction = np.concatenate([shifted, changed], axis=1)
    error = tm.spectral_error(
        jnp.asarray(prediction), jnp.tile(jnp.asarray(reference), (1, 2, 1, 1))
    )
    assert error.shape == (2, 7)
    np.testing.assert_allclose(error[:, [1, 3]], [[0, 0], [1.25, 0.96]], atol=1e-12)
    # Shells without energy: rounding against rounding, neither inf nor NaN.
    assert jnp.all(error[:, [0, 2, 4, 5, 6]] < 1)


@pytest.mark.parametrize(
    "metric",
    [
        tm.nrmse_per_lead_time,
        tm.correlation_per_lead_time,
        tm.correlation_time,
        tm.spectral_error,
    ],
)
def test_metrics_jit_and_vmap_over_seeds(metric):
    p, r = _arrays((3, 2, 4, 2, 6))
    batched = jax.jit(jax.vmap(metric))(p, r)
    single = jnp.stack([metric(p[i], r[i]) for i in range(3)])
    np.testing.assert_allclose(batched, single, rtol=1e-12)
    halves = metric(p[0].astype(jnp.float32), r[0].astype(jnp.float32))
    assert halves.dtype == jnp.float32


X = jnp.ones((2, 3, 1, 4))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: tm.nrmse_per_lead_time(X, X[:1]), ValueError, "of one shape"),
        (lambda: tm.nrmse_per_lead_time(X[0, 0], X[0, 0]), ValueError, "num_samples"),
        (lambda: tm.nrmse_per_lead_time(X[:0], X[:0]), ValueError, "no empty axis"),
        (lambda: tm.nrmse_per_lead_time([1], X), TypeError, "prediction to be a real"),
        (lambda: tm.nrmse_per_lead_time(X, X + 1j), TypeError, "got complex128"),
        (
            lambda: tm.nrmse_per_lead_time(X, X, channels="mean"),
            ValueError,
            "channels='joint' or 'sum'",
        ),
        (lambda: tm.geometric_mean(X[0, :, 0, 0]), ValueError, "from 1 to the 3 lead"),
        (lambda: tm.geometric_mean(X, horizon=0), ValueError, "`horizon` from 1"),
        (lambda: tm.geometric_mean(X, horizon=1.5), TypeError, "integer `horizon`"),
        (lambda: tm.geometric_mean(jnp.ones(())), ValueError, "on the first axis"),
        (
            lambda: tm.correlation_per_lead_time(X[..., 0], X[..., 0]),
            ValueError,
            r"channels, \*space",
        ),
        (lambda: tm.correlation_time(X, X, 1.0), ValueError, "between -1 and 1"),
        (lambda: tm.correlation_time(X, X, "0.8"), TypeError, "number for `threshold`"),
        (lambda: tm.spectral_error(X[..., 0], X[..., 0]), ValueError, r"\*space"),
        (lambda: tm.energy_spectrum(jnp.ones(4)), ValueError, "one space axis"),
        (lambda: tm.energy_spectrum(X[0, 0] * 1j), ValueError, "a real field"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
