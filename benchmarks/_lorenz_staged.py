"""A 4DVarNet between two networks: the start that it is given, and what it leaves."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from benchmarks._lorenz_data import CASES, Windows, observed_anew, windows
from benchmarks._lorenz_learned import ADJOINTS, batches, scale, solve_all, tested

CASE = "l96"
METHODS = {f"between networks, {adjoint}": adjoint for adjoint in ADJOINTS}
# Channels, layers, updates, windows of an update, peak of the learning rate.
GUESS = (64, 10, 1_600, 8, 2e-3)
CORRECTION = (32, 4, 800, 8, 2e-3)
# Of the solver: K, updates, windows of an update, peak of the learning rate.
SOLVE = (12, 100, 2, 2e-2)
# Before training; that of the observations is 1.
PRIOR_WEIGHTS, BACKGROUND_WEIGHT, DAMPING = (70.0, 3e4), 0.4, 0.03
OFFSETS = (0, 50, 100, 150)


def make_solver(adjoint: str) -> tx.solver.FourDVarNet1D:
    """Steps of Gauss and Newton whose weights, damping and length are learned."""
    mean, std = scale(CASE)
    return tx.solver.FourDVarNet1D(
        tx.solver.DynamicalPrior(CASES[CASE].stepper, offset=mean, scale=std),
        tx.solver.GradientDescent(1.0, learned=True),
        SOLVE[0],
        solver_adjoint=ADJOINTS[adjoint],
        preconditioner=tx.solver.GaussNewton(
            DAMPING, learned=True, linear_solver=tx.solver.BlockTridiagonal()
        ),
        prior_weight=np.geomspace(*PRIOR_WEIGHTS, SOLVE[0]),
        background_weight=BACKGROUND_WEIGHT,
        learn_weights=True,
    )


def train_staged(method: str, seed: int) -> tuple[dict[str, Any], jax.Array]:
    """Errors on the test windows, and the states there."""
    train, test = windows(CASE)
    guess, guess_seconds = _guess(seed)
    began = _clock()
    batch = _started(train, guess)
    solver = _fitted(make_solver(METHODS[method]), batch, SOLVE[1:], seed)
    batch = _with_initial(batch, solve_all(solver, batch))
    correction = _fitted(
        _network(CORRECTION, seed + 100, refine=True), batch, CORRECTION[2:], seed
    )
    whole = tx.solver.Sequential([guess, solver, correction])
    seconds = tuple(
        a + b - c for a, b, c in zip(guess_seconds, _clock(), began, strict=True)
    )
    row, states = tested(CASE, whole)
    partly = {
        name: tested(CASE, stages)[0]
        for name, stages in (
            ("guess", guess),
            ("solve", tx.solver.Sequential([guess, solver])),
        )
    }
    return row | {
        "stages": {
            name: {key: found[key] for key in ("whole", "interior")}
            for name, found in partly.items()
        },
        "train_seconds": seconds[0],
        "train_cpu_seconds": seconds[1],
        "num_windows": train.truth.shape[0],
        "updates": GUESS[2] + SOLVE[1] + CORRECTION[2],
    }, states


@functools.cache
def _guess(seed: int) -> tuple[Any, tuple[float, float]]:
    """The first network and the seconds it took; adjoints of a seed share it."""
    began = _clock()
    # The training run, cut at other places too and observed anew.
    batch = batches(CASE, observed_anew(CASE, OFFSETS, jax.random.key(2000 + seed)))
    found = _fitted(_network(GUESS, seed, refine=False), batch, GUESS[2:], seed)
    return found, tuple(b - a for a, b in zip(began, _clock(), strict=True))


def _network(size: tuple, seed: int, *, refine: bool) -> tx.solver.ConvInversion1D:
    return tx.solver.ConvInversion1D(
        1,
        *size[:2],
        along="both",
        kernel_size=(3, 5),
        padding=("zero", "periodic"),
        patch=(4, 1),
        refine=refine,
        key=jax.random.key(3000 + seed),
    )


def _fitted(model: Any, batch: tx.Batch1D, how: tuple, seed: int) -> Any:
    updates, size, rate = how
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, updates // 12, updates)
    trainer = tx.trainer.Trainer(
        batch,
        tx.configuration.Reconstruction(weights=scale(CASE).std ** 2),
        optimizer=optax.adam(schedule),
        num_training_steps=updates,
        batch_size=size,
        max_grad_norm=5.0,
        nonfinite="skip",
        program="loop",
        progress=False,
    )
    return trainer(model, key=jax.random.key(4000 + seed))[0]


def _started(data: Windows, guess: Any) -> tx.Batch1D:
    batch = batches(CASE, data)
    return _with_initial(batch, solve_all(guess, batch))


def _with_initial(batch: tx.Batch1D, states: jax.Array) -> tx.Batch1D:
    return tx.Batch1D(batch.input, batch.mask, batch.target, jnp.asarray(states))


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
