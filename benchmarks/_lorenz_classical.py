"""Classical methods of the Lorenz benchmark, tuned on training windows alone."""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import trainax_pk as tx
from benchmarks._lorenz_data import (
    CASES,
    NOISE_VARIANCE,
    NUM_TIMES,
    Windows,
    errors,
    windows,
)
from benchmarks._lorenz_learned import batches, interpolated, scale

# Windows that the iterative methods are run on, and how many at once.
NUM_WINDOWS = {"l63_all": 100, "l63_first": 100, "l96": 8}
# Gradient descent, whose steps are many.
NUM_DESCENT = {"l63_all": 2_000, "l63_first": 2_000, "l96": 32}
SLAB = {"l63_all": 50, "l63_first": 50, "l96": 4}
MODEL_ERR = 0.01
MAX_STEPS = 40
DESCENT_STEPS = 500
MEMBERS = {"l63_all": 50, "l63_first": 50, "l96": 120}
INFLATION = 1.02


def run_classical(name: str, method: str) -> dict[str, Any]:
    """Errors on the test windows, convergence, and processor seconds per window."""
    test = windows(name)[1]
    if method in _COSTLY:
        test = Windows(*(x[: NUM_WINDOWS[name]] for x in test))
    elif method == "gradient descent":
        test = Windows(*(x[: NUM_DESCENT[name]] for x in test))
    state, extra, cpu = METHODS[method](name, test)
    whole, interior = errors(state, test.truth)
    count = int(test.truth.shape[0])
    return {
        "whole": whole,
        "interior": interior,
        "test_windows": count,
        "cpu_ms_per_window": 1e3 * cpu / count,
        **extra,
    }


def _linear(name: str, test: Windows) -> Any:
    run = lambda data: interpolated(data, scale(name).mean)  # noqa: E731
    state, cpu = _timed(run, test)
    return state, {}, cpu


def _timed(run: Callable[[Windows], Any], data: Windows) -> tuple[Any, float]:
    """Result of a second call, and its processor seconds."""
    jax.block_until_ready(run(data))
    began = time.process_time()
    out = jax.block_until_ready(run(data))
    return out, time.process_time() - began


def _optimal(name: str, test: Windows) -> Any:
    truth = windows(name)[0].truth
    if CASES[name].num_dofs == 3:
        flat = truth.reshape(truth.shape[0], -1)
        mean, covariance = truth.mean(0), jnp.cov(flat, rowvar=False)
        shared: int | None = None
        mask = test.mask[0]
    else:
        mean, covariance = scale(name).mean, _homogeneous(truth - scale(name).mean)
        shared, mask = 0, test.mask

    def one(y: jax.Array, m: jax.Array) -> Any:
        return tx.solver.optimal_interpolation(
            y, m, mean=mean, covariance=covariance, obs_err_var=NOISE_VARIANCE
        )

    solve = jax.jit(jax.vmap(one, in_axes=(0, shared)))
    found, cpu = _timed(lambda data: solve(data.observed, mask), test)
    return found.state, {"converged": float(found.converged.mean())}, cpu


def _homogeneous(anomalies: jax.Array) -> lx.AbstractLinearOperator:
    """Covariance that is stationary in time and on the ring, applied by FFT.

    The spectrum is the mean periodogram of windows padded with as many zeros, which is
    not negative, so that the covariance has no negative eigenvalue.
    """
    pads = ((0, 0), (0, NUM_TIMES), (0, 0))
    spectrum = jnp.abs(jnp.fft.fft2(jnp.pad(anomalies, pads))) ** 2
    spectrum = spectrum.mean(0) / (NUM_TIMES * anomalies.shape[2])

    def product(w: jax.Array) -> jax.Array:
        wide = jnp.pad(w, pads[1:])
        return jnp.fft.ifft2(spectrum * jnp.fft.fft2(wide)).real[:NUM_TIMES]

    return lx.FunctionLinearOperator(
        product,
        jax.ShapeDtypeStruct(anomalies.shape[1:], anomalies.dtype),
        lx.positive_semidefinite_tag,
    )


def _descent(name: str, test: Windows) -> Any:
    """Plain gradient descent on the weak-constraint cost with the true model."""
    train = Windows(*(x[:32] for x in windows(name)[0]))
    scores = {
        weight: errors(_descend(name, train, weight), train.truth)[0]
        for weight in (3.0, 30.0, 300.0)
    }
    weight = min(scores, key=scores.__getitem__)
    run = functools.partial(_descend, name, weight=weight)
    state, cpu = _timed(lambda data: run(data), test)
    return state, {"prior_weight": weight, "steps": DESCENT_STEPS}, cpu


def _descend(name: str, data: Windows, weight: float) -> jax.Array:
    mean, std = scale(name)
    # The largest eigenvalue of the cost's Hessian is about 2 + 2 · 4.5 w.
    solver = tx.solver.FourDVarNet1D(
        tx.solver.DynamicalPrior(CASES[name].stepper, offset=mean, scale=std),
        tx.solver.GradientDescent(0.9 / (1 + 4.5 * weight)),
        DESCENT_STEPS,
        prior_weight=weight,
    )
    return _run_solver(solver, batches(name, data)) * std + mean


_run_solver = eqx.filter_jit(lambda solver, batch: solver(batch))


def _weak(name: str, test: Windows) -> Any:
    found, cpu = _variational(name, test)["weak"]
    return found.state, _convergence(found), cpu


def _strong(name: str, test: Windows) -> Any:
    found, cpu = _variational(name, test)["strong"]
    return found.state, _convergence(found), cpu


def _strong_from_weak(name: str, test: Windows) -> Any:
    found, cpu = _variational(name, test)["strong from weak"]
    return found.state, _convergence(found), cpu


def _convergence(found: tx.solver.Analysis) -> dict[str, float]:
    return {
        "converged": float(found.converged.mean()),
        "steps": float(found.num_steps.mean()),
        "median_cost": float(np.median(found.cost)),
    }


_MEMORY: dict[str, Any] = {}


def variational_options(name: str) -> dict[str, Any]:
    """Errors of observations, background (the climate) and steps of 4D-Var."""
    train = windows(name)[0].truth.reshape(-1, CASES[name].num_dofs)[::7]
    states = np.asarray(train, np.float64)
    return {
        "obs_err_cov": NOISE_VARIANCE,
        "background": states.mean(0),
        "background_cov": np.cov(states, rowvar=False),
        "max_steps": MAX_STEPS,
    }


def _variational(name: str, test: Windows) -> dict[str, Any]:
    """Both constraints in double precision; weak first, since strong starts there too."""
    if name in _MEMORY:
        return _MEMORY[name]
    options = variational_options(name)
    with jax.enable_x64(True):
        stepper = CASES[name].stepper
        truth, observed = (
            jnp.asarray(np.asarray(x, np.float64)) for x in (test.truth, test.observed)
        )
        data = Windows(truth, observed, test.mask)
        line = interpolated(data, options["background"])

        def weak(y: jax.Array, m: jax.Array, u: jax.Array) -> Any:
            return tx.solver.weak_4dvar(
                stepper, y, m, initial=u, model_err_cov=MODEL_ERR, **options
            )

        def strong(y: jax.Array, m: jax.Array, u: jax.Array) -> Any:
            return tx.solver.strong_4dvar(stepper, y, m, initial=u[0], **options)

        found = {"weak": slabs(SLAB[name], weak, data, line)}
        found["strong"] = slabs(SLAB[name], strong, data, line)
        found["strong from weak"] = slabs(
            SLAB[name], strong, data, found["weak"][0].state
        )
    return _MEMORY.setdefault(name, found)


def slabs(size: int, one: Callable, data: Windows, start: jax.Array) -> Any:
    """Results of all windows, so many at once, and processor seconds of the solves."""
    solve = jax.jit(jax.vmap(one))
    parts, cpu = [], 0.0
    for i in range(0, data.truth.shape[0], size):
        slab = [x[i : i + size] for x in (data.observed, data.mask, start)]
        if i == 0:
            solve = solve.lower(*slab).compile()
        began = time.process_time()
        parts.append(jax.block_until_ready(solve(*slab)))
        cpu += time.process_time() - began
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts), cpu


def _ensemble(name: str, test: Windows) -> Any:
    """Ensemble Kalman smoother (square root form), started from the climate."""
    case, members = CASES[name], MEMBERS[name]
    climate = windows(name)[0].truth.reshape(-1, case.num_dofs)

    def one(y: jax.Array, m: jax.Array, key: jax.Array) -> jax.Array:
        picks = jax.random.choice(key, climate.shape[0], (members,), replace=False)
        history = jnp.zeros((members, NUM_TIMES, case.num_dofs))
        return _smooth(case.stepper, climate[picks], history, y, m)

    keys = jax.random.split(jax.random.key(5), test.truth.shape[0])
    solve = jax.jit(lambda *xs: jax.lax.map(lambda x: one(*x), xs))
    state, cpu = _timed(lambda data: solve(data.observed, data.mask, keys), test)
    return state, {"members": members}, cpu


def _smooth(
    stepper: Callable, ensemble: jax.Array, history: jax.Array, y: Any, m: Any
) -> jax.Array:
    """Mean of the smoothed ensemble, `(T, D)`.

    The square root transform of a time's analysis (Bishop et al. 2001) is applied to all
    states before it as well (Evensen and van Leeuwen 2000).
    """
    count = ensemble.shape[0]

    def update(history: jax.Array, now: jax.Array, y: Any, m: Any) -> jax.Array:
        mean = now.mean(0)
        spread = jnp.where(m, now - mean, 0.0) / jnp.sqrt(NOISE_VARIANCE)
        misfit = jnp.where(m, y - mean, 0.0) / jnp.sqrt(NOISE_VARIANCE)
        values, vectors = jnp.linalg.eigh(
            (count - 1) * jnp.eye(count) + spread @ spread.T
        )
        weights = vectors @ ((vectors.T @ (spread @ misfit)) / values)
        root = (vectors * jnp.sqrt((count - 1) / values)) @ vectors.T
        centre = history.mean(0)
        anomalies = history - centre
        moved = jnp.tensordot(INFLATION * root + weights[None], anomalies, 1)
        return centre + moved

    def advance(carry: Any, row: Any) -> Any:
        history, now = carry
        t, y, m = row
        history = history.at[:, t].set(now)
        history = jax.lax.cond(
            m.any(), lambda h: update(h, h[:, t], y, m), lambda h: h, history
        )
        return (history, jax.vmap(stepper)(history[:, t])), None

    rows = (jnp.arange(NUM_TIMES), y, m)
    (history, _), _ = jax.lax.scan(advance, (history, ensemble), rows)
    return history.mean(0)


METHODS: dict[str, Callable] = {
    "linear interpolation": _linear,
    "optimal interpolation": _optimal,
    "gradient descent": _descent,
    "strong 4D-Var": _strong,
    "strong 4D-Var, from weak": _strong_from_weak,
    "weak 4D-Var": _weak,
    "ensemble Kalman smoother": _ensemble,
}
_COSTLY = {
    "strong 4D-Var", "strong 4D-Var, from weak", "weak 4D-Var",
    "ensemble Kalman smoother",
}  # fmt: skip
