"""The learned solver of the Lorenz benchmark, and how it is trained."""

import functools
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import trainax_pk as tx
from benchmarks._lorenz_data import CASES, Windows, errors, windows

ADJOINTS: dict[str, Any] = {
    "direct": tx.DirectAdjoint(),
    "checkpointed": tx.RecursiveCheckpointAdjoint(),
    "k-step, k = 5": tx.KStepAdjoint(5),
    "one-step": tx.OneStepAdjoint(),
}


class Setting(NamedTuple):
    """Size of the network and of its training.

    Attributes:
        iterations: K.
        hidden: Channels of the LSTM.
        along: Axes that are convolved.
        kernel: Taps, one for each axis.
        padding: Borders, one for each axis.
        prior_weight: Weight of the dynamics before training; that of the observations
            is 1.
        batch: Windows of an update.
        updates: Number of updates.
        rate: Peak of the learning rate.
    """

    iterations: int
    hidden: int
    along: str
    kernel: Any
    padding: Any
    prior_weight: float
    batch: int
    updates: int
    rate: float


SETTINGS = {
    "l63_all": Setting(10, 16, "time", 5, "zero", 20.0, 10, 600, 6e-3),
    "l63_first": Setting(10, 16, "time", 5, "zero", 20.0, 10, 600, 8e-3),
    "l96": Setting(10, 10, "both", (5, 3), ("zero", "periodic"), 5.0, 1, 200, 8e-3),
}


class Scale(NamedTuple):
    """Mean and standard deviation of the state, from the training windows."""

    mean: jax.Array
    std: jax.Array


def scale(name: str) -> Scale:
    """Of Lorenz-63 by component, of Lorenz-96, which is homogeneous, for all."""
    truth = windows(name)[0].truth
    if CASES[name].num_dofs == 3:
        return Scale(truth.mean((0, 1)), truth.std((0, 1)))
    return Scale(jnp.full(40, truth.mean()), jnp.full(40, truth.std()))


def batches(name: str, data: Windows) -> tx.Batch1D:
    """Standardised windows that start from linear interpolation."""
    mean, std = scale(name)
    initial = interpolated(data, mean)
    return tx.Batch1D(
        jnp.where(data.mask, (data.observed - mean) / std, 0.0),
        data.mask,
        (data.truth - mean) / std,
        (initial - mean) / std,
    )


def interpolated(data: Windows, mean: jax.Array) -> jax.Array:
    """Linear interpolation of all windows; entries never observed take the mean."""
    one = lambda y, m: tx.solver.linear_interpolation(y, m, fill=mean)  # noqa: E731
    return jax.jit(jax.vmap(one))(data.observed, data.mask)


def make_solver(name: str, adjoint: Any, *, key: jax.Array) -> Any:
    """A 4DVarNet whose prior is the true model."""
    setting, case, (mean, std) = SETTINGS[name], CASES[name], scale(name)
    channels = 1 if setting.along == "both" else case.num_dofs
    modulator = tx.solver.ConvLSTMGradMod1D(
        channels,
        setting.hidden,
        along=setting.along,
        kernel_size=setting.kernel,
        padding=setting.padding,
        key=key,
    )
    # Small first steps: the start is already a good one.
    modulator = eqx.tree_at(
        lambda m: (m.out.weight, m.out.bias), modulator, replace_fn=lambda x: 0.3 * x
    )
    return tx.solver.FourDVarNet1D(
        tx.solver.DynamicalPrior(case.stepper, offset=mean, scale=std),
        modulator,
        setting.iterations,
        solver_adjoint=adjoint,
        prior_weight=setting.prior_weight,
        learn_weights=True,
    )


@functools.cache
def make_trainer(name: str, num_windows: int) -> tx.trainer.Trainer:
    """Adam on the squared error in physical units, on the first training windows.

    Kept, so that another seed compiles nothing.
    """
    setting = SETTINGS[name]
    data = Windows(*(x[:num_windows] for x in windows(name)[0]))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, setting.rate, setting.updates // 12, setting.updates
    )
    return tx.trainer.Trainer(
        batches(name, data),
        tx.configuration.Reconstruction(weights=scale(name).std ** 2),
        optimizer=optax.adam(schedule),
        num_training_steps=setting.updates,
        batch_size=setting.batch,
        max_grad_norm=1.0,
        program="loop",
        progress=False,
    )


def train(name: str, adjoint: str, seed: int, num_windows: int) -> dict[str, Any]:
    """Errors on the test windows after training, and what it took."""
    model_key, order_key = jax.random.split(jax.random.key(1000 + seed))
    solver = make_solver(name, ADJOINTS[adjoint], key=model_key)
    trainer = make_trainer(name, num_windows)
    began, cpu = time.perf_counter(), time.process_time()
    solver, history = trainer(solver, key=order_key)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    test = windows(name)[1]
    reconstruct(name, solver, Windows(*(x[:64] for x in test)))
    cpu_test = time.process_time()
    states = jax.block_until_ready(reconstruct(name, solver, test))
    cpu_test = time.process_time() - cpu_test
    whole, interior = errors(states, test.truth)
    return {
        "whole": whole,
        "interior": interior,
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "cpu_ms_per_window": 1e3 * cpu_test / test.truth.shape[0],
        "num_windows": num_windows,
        "updates": SETTINGS[name].updates,
        "last_loss": float(history.loss[-20:].mean()),
    }


def reconstruct(name: str, solver: Any, data: Windows, size: int = 64) -> jax.Array:
    """States of all windows in physical units, some windows at a time."""
    mean, std = scale(name)
    batch = batches(name, data)
    count = data.truth.shape[0]
    parts = [
        _solve(solver, jax.tree.map(lambda x, i=i: x[i : i + size], batch))
        for i in range(0, count, size)
    ]
    return jnp.concatenate(parts) * std + mean


_solve = eqx.filter_jit(lambda solver, batch: solver(batch))
