"""What follows a learned solver in the Lorenz benchmark, and what could be reached."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk as tx
from benchmarks._lorenz_classical import NUM_WINDOWS, SLAB, slabs, variational_options
from benchmarks._lorenz_data import (
    CASES,
    INTERIOR,
    NOISE_VARIANCE,
    Windows,
    errors,
    windows,
)

# Model error variances of a step, one solve after another: the cost is smooth where they
# are large, and the model, which is exact, is kept where they are small.
LADDER = (1e-2, 1e-3, 1e-4)
WINDOWS = NUM_WINDOWS | {"l96": 32}
BOUND_WINDOWS = 128


def continued(name: str, states: jax.Array) -> dict[str, Any]:
    """Errors of weak 4D-Var from the states of a learned solver, on the first windows."""
    count = WINDOWS[name]
    test = Windows(*(x[:count] for x in windows(name)[1]))
    options = variational_options(name)
    stepper = CASES[name].stepper

    def weak(variance: float, y: jax.Array, m: jax.Array, u: jax.Array) -> Any:
        return tx.solver.weak_4dvar(
            stepper, y, m, initial=u, model_err_cov=variance, **options
        )

    total = 0.0
    with jax.enable_x64(True):
        truth, observed, state = (
            jnp.asarray(np.asarray(x, np.float64))
            for x in (test.truth, test.observed, states[:count])
        )
        data = Windows(truth, observed, test.mask)
        for variance in LADDER:
            solve = functools.partial(weak, variance)
            found, cpu = slabs(SLAB[name], solve, data, state)
            state, total = found.state, total + cpu
    whole, interior = errors(state, test.truth)
    start_whole, start_interior = errors(states[:count], test.truth)
    return {
        "weak_whole": whole,
        "weak_interior": interior,
        "weak_start": (start_whole, start_interior),
        "weak_windows": count,
        "weak_converged": float(found.converged.mean()),
        "weak_ms_per_window": 1e3 * total / count,
    }


def run_bound(name: str) -> dict[str, Any]:
    """What no unbiased estimate beats: the Bayesian Cramér-Rao bound about the truth.

    With M_t the propagator of the model, linearised about the truth, and B the climate's
    covariance, the posterior covariance of the first state is
    P = (B⁻¹ + Σ_t M_tᵀ Hᵀ R⁻¹ H M_t)⁻¹ and that of time t is M_t P M_tᵀ; its mean
    diagonal is the expected squared error of the best estimate where errors are small.
    """
    case, count = CASES[name], BOUND_WINDOWS
    train, test = windows(name)
    with jax.enable_x64(True):
        climate = np.asarray(train.truth.reshape(-1, case.num_dofs)[::7], np.float64)
        root = np.linalg.cholesky(np.cov(climate, rowvar=False))
        background = jnp.asarray(np.linalg.inv(root))
        eye = jnp.eye(case.num_dofs)

        def one(u: jax.Array, m: jax.Array) -> jax.Array:
            steps = jax.vmap(jax.jacfwd(case.stepper))(u[:-1])
            _, later = jax.lax.scan(lambda p, a: (a @ p,) * 2, eye, steps)
            propagators = jnp.concatenate([eye[None], later])
            seen = m[:, :, None] * propagators / NOISE_VARIANCE**0.5
            rows = jnp.concatenate([seen.reshape(-1, case.num_dofs), background])
            factor = jnp.linalg.qr(rows, mode="r")
            solve = functools.partial(jax.scipy.linalg.solve_triangular, lower=True)
            spread = jax.vmap(lambda p: solve(factor.T, p.T))(propagators)
            return jnp.sum(spread**2, axis=(1, 2)) / case.num_dofs

        truth = jnp.asarray(np.asarray(test.truth[:count], np.float64))
        variance = jax.jit(lambda *xs: jax.lax.map(lambda x: one(*x), xs))(
            truth, test.mask[:count]
        )
    return {
        "whole": float(variance.mean()),
        "interior": float(variance[:, INTERIOR].mean()),
        "test_windows": count,
        "cpu_ms_per_window": 0.0,
    }
