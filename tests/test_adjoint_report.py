"""Reports and gates of adjoints against gradients known in closed form."""

import builtins
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk.adjoint import _report_plot, adjoint_report, assert_adjoint_calibrated
from trainax_pk.adjoint._agreement import agreement

DIRECT, K2 = tx.DirectAdjoint(), tx.KStepAdjoint(2)


def _loss(params, adjoint):
    """Product of four steps: gradient 4 a³ b, of which two steps give 2 a³ b."""
    u = tx.rollout(lambda u: params["a"] * u, 1.0, 4, adjoint=adjoint)
    return u[-1] * params["b"][0] + 0.0 * params["n"]


def _params():
    return {"a": jnp.array(1.5), "b": jnp.array([2.0, 5.0]), "n": 3}


def test_measures_are_those_of_the_formula():
    report = adjoint_report(_loss, _params(), {"exact": DIRECT, "k = 2": K2}, rounds=3)
    a, b = 1.5, 2.0
    exact = np.array([4 * a**3 * b, a**4, 0.0])
    found = np.array([2 * a**3 * b, a**4, 0.0])
    row = report.rows["k = 2"]
    size = np.linalg.norm(exact)
    cosine = found @ exact / np.linalg.norm(found) / size
    assert row.total.cosine == pytest.approx(cosine, rel=1e-12)
    assert row.total.norm_ratio == pytest.approx(np.linalg.norm(found) / size)
    assert row.total.relative_error == pytest.approx(
        np.linalg.norm(found - exact) / size
    )
    assert set(row.leaves) == {"['a']", "['b']"}
    assert row.leaves["['a']"].norm_ratio == pytest.approx(0.5, rel=1e-12)
    assert row.leaves["['a']"].cosine == pytest.approx(1)
    assert row.leaves["['b']"].relative_error == 0
    same = report.rows["exact"].total
    assert (same.norm_ratio, same.relative_error) == (1, 0)
    assert same.cosine == pytest.approx(1, abs=1e-12)
    assert report.rows["exact"].cost.relative_time == 1
    assert row.cost.seconds > 0 and row.cost.compile_seconds > 0


def _agree(g, r):
    found = agreement({"x": jnp.asarray(g)}, {"x": jnp.asarray(r)})
    return found.cosine, found.norm_ratio, found.relative_error


@pytest.mark.parametrize(
    ("g", "r", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], (1, 1, 0)),
        ([0.0, 0.0], [3.0, 4.0], (0, 0, 1)),
        ([1.0, 0.0], [0.0, 0.0], (0, np.inf, np.inf)),
        ([3.0, 4.0], [-3.0, -4.0], (-1, 1, 2)),
        ([3e200, 4e200], [3e200, 4e200], (1, 1, 0)),
        ([1j, 0j], [1 + 0j, 0j], (0, 1, np.sqrt(2))),
        ([np.nan, 1.0], [1.0, 1.0], (np.nan,) * 3),
        ([1.0, 1.0], [np.inf, 1.0], (np.nan,) * 3),
    ],
)
def test_agreement_of_two_vectors(g, r, expected):
    np.testing.assert_allclose(_agree(g, r), expected, rtol=1e-12, atol=1e-15)


def test_a_report_prints_plots_and_is_data():
    adjoints = {"direct": DIRECT, "k = 2": K2}
    report = adjoint_report(_loss, _params(), adjoints, reference="k = 2", rounds=0)
    text = str(report)
    lines = text.splitlines()
    assert len(lines) == 4 and lines[1].startswith("direct") and "k = 2" in lines[-1]
    assert report.markdown().count("\n") == 3
    data = json.loads(json.dumps(report.data()))
    assert [row["adjoint"] for row in data] == ["direct", "k = 2"]
    assert data[0]["relative_time"] is None and data[0]["temporary_bytes"] >= 0
    assert data[1]["leaves"]["['a']"]["relative_error"] == 0
    assert len(report.plot().axes) == 2
    timed = adjoint_report(_loss, _params(), {"direct": DIRECT}, rounds=1)
    assert len(timed.plot().axes) == 3


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return import_module(name, *args, **kwargs)

    report = adjoint_report(_loss, _params(), {"direct": DIRECT}, rounds=0)
    assert report.plot().axes
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        importlib.reload(_report_plot)
    try:
        with pytest.raises(ImportError, match=r"got none.*trainax_pk\[plot\]"):
            _report_plot.plot_report(report.data(), "direct")
    finally:
        importlib.reload(_report_plot)


@pytest.mark.parametrize(
    ("loss", "params", "adjoints", "options", "message"),
    [
        (_loss, {"a": 1}, {"direct": DIRECT}, {}, "parameters with inexact arrays"),
        (_loss, _params(), {}, {}, "at least one adjoint"),
        (_loss, _params(), {"direct": DIRECT}, {"reference": "x"}, "one of.*'direct'"),
        (_loss, _params(), {"direct": DIRECT}, {"rounds": -1}, "`rounds` to be"),
        (lambda p, a: p["b"], _params(), {"d": DIRECT}, {}, "real scalar"),
        (lambda p, a: (p["a"], 1), _params(), {"d": DIRECT}, {}, "real scalar"),
    ],
)
def test_bad_reports_are_refused(loss, params, adjoints, options, message):
    with pytest.raises(ValueError, match=message):
        adjoint_report(loss, params, adjoints, **options)


# The gate.


def _of_inputs(params, inputs, adjoint):
    """d/du0 is a⁴: all of it crosses the first cut only if k > 2; d/da of k = 2 half."""
    step = lambda u: params * u  # noqa: E731
    return tx.rollout(step, inputs, 4, adjoint=adjoint)[-1]


def test_thresholds_are_met():
    found = assert_adjoint_calibrated(
        _loss, _params(), tx.RecursiveCheckpointAdjoint(), max_relative_error=1e-12
    )
    assert found.total.relative_error <= 1e-12
    found = assert_adjoint_calibrated(_loss, _params(), K2, every_leaf=True)
    assert found.leaves["['a']"].norm_ratio == pytest.approx(0.5)
    assert str(found).splitlines()[1].startswith("['a']: cosine 1.0000, norm ratio 0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_relative_error": 0.1}, "all leaves: relative error .* > 0.1"),
        (
            {"norm_ratio": (0.9, 1.1)},
            "all leaves: norm ratio 0.* outside of .0.9, 1.1.",
        ),
        ({"min_cosine": 0.99}, "all leaves: cosine 0.9.* < 0.99"),
        (
            {"norm_ratio": (0.51, 2.0), "every_leaf": True},
            r"got \['a'\]: norm ratio 0.5",
        ),
    ],
)
def test_each_threshold_can_fail_alone(options, message):
    with pytest.raises(AssertionError, match=message):
        assert_adjoint_calibrated(_loss, _params(), K2, **options)


def test_parameters_and_inputs_are_judged_apart():
    operands = jnp.array(1.5), K2
    inputs = jnp.array(0.7)
    assert_adjoint_calibrated(_of_inputs, *operands, inputs=inputs)
    with pytest.raises(AssertionError, match="with respect to inputs.*cosine 0 < 0.9"):
        assert_adjoint_calibrated(_of_inputs, *operands, inputs=inputs, wrt="inputs")


def test_not_finite_fails_whatever_the_thresholds():
    def loss(a, adjoint):
        u = tx.rollout(lambda u: jnp.sqrt(a * u), 0.0, 4, adjoint=adjoint)
        return u[-1]

    none = {"min_cosine": None, "norm_ratio": None, "max_relative_error": None}
    with pytest.raises(AssertionError, match="not finite"):
        assert_adjoint_calibrated(loss, jnp.array(1.0), K2, **none)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrt": "targets"}, "'params' or 'inputs', got 'targets'"),
        ({"wrt": "inputs"}, "`inputs` for wrt='inputs', got None"),
        ({"min_cosine": 1.1}, "`min_cosine` between -1 and 1, got 1.1"),
        ({"norm_ratio": (2.0, 1.0)}, "0 <= least <= greatest"),
        ({"max_relative_error": -1.0}, "`max_relative_error` >= 0"),
        ({"max_relative_error": float("nan")}, "`max_relative_error` >= 0"),
    ],
)
def test_bad_thresholds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        assert_adjoint_calibrated(_loss, _params(), K2, **options)


def test_gradients_of_reverse_only_adjoints():
    """k-step loops have no forward mode; the report asks for none."""
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda a: _loss({"a": a, "b": jnp.ones(1), "n": 0}, K2), (1.5,), (1.0,))
    adjoint_report(_loss, _params(), {"k = 2": K2}, rounds=0)
