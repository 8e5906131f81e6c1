"""The demo runs, and what it computes is right."""

import builtins
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainax_pk.demo import __main__ as demo
from trainax_pk.demo._advection import (
    UPWIND,
    amplification,
    distance_to_upwind,
    learn_stencils,
)
from trainax_pk.demo._emulator import ConvEmulator

pytestmark = pytest.mark.slow


def test_learned_stencil_is_the_least_squares_one():
    learned = learn_stencils((1,), num_training_steps=1000)[1]
    # One step of one-step training is a linear least-squares problem in two weights.
    k, cells, n = np.arange(1, 6), 0.75, 30
    theta = 2 * np.pi * k / n
    shift, exact = np.exp(1j * theta), np.exp(1j * cells * theta)
    a = np.stack([np.ones(5), shift], axis=1)
    gram, right = (a.conj().T @ a).real, (a.conj().T @ exact).real
    # The data hold random amplitudes, equal over modes on average only.
    np.testing.assert_allclose(learned, np.linalg.solve(gram, right), atol=0.02)


def test_distance_to_upwind():
    assert distance_to_upwind(UPWIND) == 0.0
    assert distance_to_upwind(UPWIND + np.array([3.0, 4.0])) == pytest.approx(5.0)


def test_amplification_is_what_the_stencil_does_to_a_mode():
    n, k, stencil = 16, 3, np.array([0.3, 0.6])
    mode = np.exp(2j * np.pi * k * np.arange(n) / n)
    stepped = stencil[0] * mode + stencil[1] * np.roll(mode, -1)
    factor = amplification(stencil, np.array(2 * np.pi * k / n))
    np.testing.assert_allclose(stepped, factor * mode, rtol=1e-12)


def test_emulator_keeps_the_mean_and_commutes_with_shifts():
    model = ConvEmulator(4, 2, key=jax.random.key(0))
    u = jax.random.normal(jax.random.key(1), (1, 24)) + 0.7
    v = model(u)
    np.testing.assert_allclose(jnp.mean(v), jnp.mean(u), rtol=1e-12)
    np.testing.assert_allclose(
        model(jnp.roll(u, 5, axis=1)), jnp.roll(v, 5, axis=1), rtol=1e-10
    )


def test_small_demo_prints_tables_and_draws_pictures(tmp_path, capsys):
    demo.main(["--small", "--output", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out
    assert "distance to upwind" in printed
    assert "nRMSE persistence" in printed
    for name in ("stencils", "rollout", "errors"):
        file = tmp_path / "pictures" / f"{name}.png"
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "trainax_pk.demo._pictures")
    with pytest.raises(ModuleNotFoundError, match=r"trainax_pk\[plot\]"):
        importlib.import_module("trainax_pk.demo._pictures")
