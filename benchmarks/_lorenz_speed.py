"""Seconds of a training update by adjoint, interleaved."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks._harness import interleaved, medians, ratio
from benchmarks._lorenz_data import Windows, windows
from benchmarks._lorenz_learned import METHODS, batches, make_solver

ROUNDS = 15


def compare_speed(name: str, kind: str = "") -> dict[str, Any]:
    """Gradient of one batch's loss: milliseconds, and direct's over each adjoint's.

    Of the methods whose names begin with `kind`.
    """
    settings = METHODS[f"{kind}direct"][0]
    methods = [m for m, (s, _) in METHODS.items() if s is settings]
    data = Windows(*(x[: settings[name].stages[-1].batch] for x in windows(name)[0]))
    batch = batches(name, data)

    def gradient(method: str) -> Any:
        solver = make_solver(name, method, key=jax.random.key(0))
        loss = lambda m: jnp.mean((m(batch) - batch.target) ** 2)  # noqa: E731
        run = eqx.filter_jit(lambda m: eqx.filter_grad(loss)(m))
        return lambda: run(solver)

    seconds = interleaved({METHODS[m][1]: gradient(m) for m in methods}, rounds=ROUNDS)
    return {
        "ms": {n: 1e3 * s for n, s in medians(seconds).items()},
        "direct_over": {n: ratio(seconds, "direct", n) for n in seconds},
        "rounds": ROUNDS,
    }
