"""The learned solver of the Lorenz benchmark, and how it is trained."""

import functools
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from benchmarks._lorenz_data import CASES, Windows, errors, shortened, windows

ADJOINTS: dict[str, Any] = {
    "direct": tx.DirectAdjoint(),
    "checkpointed": tx.RecursiveCheckpointAdjoint(),
    "k-step, k = 5": tx.KStepAdjoint(5),
    "one-step": tx.OneStepAdjoint(),
}


class Stage(NamedTuple):
    """A part of training.

    Attributes:
        num_times: Length of its windows; below 200, the windows cut into pieces.
        batch: Windows of an update.
        updates: Number of updates.
        rate: Peak of the learning rate, which ends at 0.
    """

    num_times: int
    batch: int
    updates: int
    rate: float


class Setting(NamedTuple):
    """Size of the network and of its training.

    With a `damping` the network sees directions of Gauss and Newton and prior weights
    rise from step to step; without one gradients and one weight.

    Attributes:
        iterations: K.
        hidden: Channels of the LSTM.
        along: Axes that are convolved.
        kernel: Taps, one for each axis.
        padding: Borders, one for each axis.
        patch: Neighbours along each axis that are one point of the network.
        normalise: Which gradient's size they are divided by.
        prior_weight: Weight of the dynamics before training, or the first and the last
            of them; that of the observations is 1.
        stages: Of training, one after another.
        damping: λ of the directions before training, or None.
    """

    iterations: int
    hidden: int
    along: str
    kernel: Any
    padding: Any
    patch: Any
    normalise: str
    prior_weight: Any
    stages: tuple[Stage, ...]
    damping: float | None = None

    @property
    def updates(self) -> int:
        """Of all stages."""
        return sum(stage.updates for stage in self.stages)


# One point of the network for each observed time: it sees the same pattern everywhere.
SETTINGS = {
    "l63_all": Setting(
        10, 48, "time", 3, "zero", 8, "first", 20.0, (Stage(200, 10, 1_500, 2e-3),)
    ),
    "l63_first": Setting(
        10, 48, "time", 3, "zero", 8, "first", 20.0, (Stage(200, 10, 2_500, 2e-3),)
    ),
    "l96": Setting(
        20, 20, "both", (3, 3), ("zero", "periodic"), (4, 1), "each", 5.0,
        (Stage(60, 2, 1_500, 5e-3), Stage(200, 1, 300, 1e-3)),
    ),
}  # fmt: skip
NEWTON = {
    "l63_all": Setting(
        10, 24, "time", 3, "zero", 8, "none", (2.0, 2e4),
        (Stage(200, 10, 500, 2e-3),), 0.04,
    ),
    "l63_first": Setting(
        10, 24, "time", 3, "zero", 8, "none", (2.0, 2e4),
        (Stage(200, 10, 500, 2e-3),), 0.04,
    ),
    "l96": Setting(
        12, 24, "both", (3, 3), ("zero", "periodic"), (4, 1), "none", (2.0, 2e3),
        (Stage(60, 4, 900, 2e-3), Stage(200, 2, 300, 1e-3)), 0.04,
    ),
}  # fmt: skip
# What is trained, by its name in the table.
METHODS = {a: (SETTINGS, a) for a in ADJOINTS} | {
    f"Gauss-Newton, {a}": (NEWTON, a) for a in ADJOINTS
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


def make_solver(name: str, method: str, *, key: jax.Array) -> Any:
    """A 4DVarNet whose prior is the true model."""
    settings, adjoint = METHODS[method]
    setting, case, (mean, std) = settings[name], CASES[name], scale(name)
    channels = 1 if setting.along == "both" else case.num_dofs
    newton = setting.damping is not None
    modulator = tx.solver.ConvLSTMGradMod1D(
        channels,
        setting.hidden,
        along=setting.along,
        kernel_size=setting.kernel,
        padding=setting.padding,
        patch=setting.patch,
        normalise=setting.normalise,
        direct=1.0 if newton else None,
        key=key,
    )
    # Small first steps: the start is already a good one. Beside directions it is 0.
    modulator = eqx.tree_at(
        lambda m: (m.out.weight, m.out.bias), modulator, replace_fn=lambda x: 0.3 * x
    )
    options: dict[str, Any] = {"prior_weight": setting.prior_weight}
    if newton:
        weights = np.geomspace(*setting.prior_weight, setting.iterations)
        options = {
            "prior_weight": weights,
            "preconditioner": tx.solver.GaussNewton(
                setting.damping,
                learned=True,
                linear_solver=tx.solver.BlockTridiagonal(),
            ),
        }
    return tx.solver.FourDVarNet1D(
        tx.solver.DynamicalPrior(case.stepper, offset=mean, scale=std),
        modulator,
        setting.iterations,
        solver_adjoint=ADJOINTS[adjoint],
        learn_weights=True,
        **options,
    )


@functools.cache
def make_trainer(name: str, stage: Stage) -> tx.trainer.Trainer:
    """Adam on the squared error in physical units, on the training windows.

    Kept, so that another seed compiles nothing.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.rate, stage.updates // 12, stage.updates
    )
    return tx.trainer.Trainer(
        batches(name, shortened(windows(name)[0], stage.num_times)),
        tx.configuration.Reconstruction(weights=scale(name).std ** 2),
        optimizer=optax.adam(schedule),
        num_training_steps=stage.updates,
        batch_size=stage.batch,
        max_grad_norm=1.0,
        # A window may blow up on the way, above all early.
        nonfinite="skip",
        program="loop",
        progress=False,
    )


def train(
    name: str, method: str, seed: int, share: float = 1.0
) -> tuple[dict[str, Any], jax.Array]:
    """Errors on the test windows after a share of the updates, and the states."""
    model_key, order_key = jax.random.split(jax.random.key(1000 + seed))
    solver = make_solver(name, method, key=model_key)
    stages = [
        stage._replace(updates=round(share * stage.updates))
        for stage in METHODS[method][0][name].stages
    ]
    seconds = cpu_seconds = 0.0
    for stage in stages:
        trainer = make_trainer(name, stage)
        began, cpu = time.perf_counter(), time.process_time()
        solver, history = trainer(solver, key=order_key)
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu
    row, states = tested(name, solver)
    row |= {
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "num_windows": CASES[name].num_train,
        "updates": sum(stage.updates for stage in stages),
        "last_loss": float(history.loss[-20:].mean()),
    }
    return row, states


def run_unlearned(name: str) -> dict[str, Any]:
    """Errors of the steps of Gauss and Newton without training or a network."""
    solver = make_solver(name, "Gauss-Newton, direct", key=jax.random.key(0))
    return tested(name, solver)[0]


def tested(name: str, solver: Any) -> tuple[dict[str, Any], jax.Array]:
    """Errors on the test windows and milliseconds of a second call, and the states."""
    test = windows(name)[1]
    reconstruct(name, solver, Windows(*(x[:64] for x in test)))
    cpu = time.process_time()
    states = jax.block_until_ready(reconstruct(name, solver, test))
    cpu = time.process_time() - cpu
    whole, interior = errors(states, test.truth)
    row = {
        "whole": whole,
        "interior": interior,
        "cpu_ms_per_window": 1e3 * cpu / test.truth.shape[0],
    }
    return row, states


def reconstruct(name: str, solver: Any, data: Windows) -> jax.Array:
    """States of all windows in physical units."""
    mean, std = scale(name)
    return solve_all(solver, batches(name, data)) * std + mean


def solve_all(solver: Any, batch: tx.Batch1D, size: int = 64) -> jax.Array:
    """Standardised states of all windows, some windows at a time."""
    parts = [
        _solve(solver, jax.tree.map(lambda x, i=i: x[i : i + size], batch))
        for i in range(0, batch.batch_size, size)
    ]
    return jnp.concatenate(parts)


_solve = eqx.filter_jit(lambda solver, batch: solver(batch))
