"""Does an amortized posterior smooth Lorenz-63 windows, and is it calibrated?

The task of vardax's notebook 17: windows of ten states 0.05 apart on the attractor, x and
y observed at every other one with noise of standard deviation 0.5, z never. Two posteriors
are trained on simulated windows by their negative log-likelihood: a diagonal Gaussian of
the whole window (30 numbers), and a flow of its first state, whose draws the true model
carries through the window. Beside them: linear interpolation, and strong 4D-Var with the
true model and the climate as background, from one start.

RMSE is that of the posteriors' means on fresh windows, coverage how often a central
interval of a margin holds the truth.

Run: python -m benchmarks.amortized_lorenz [--pairs 200000] [--updates 8000]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from benchmarks._harness import report, table

A = tx.amortized
NUM_TIMES, SUBSTEPS, DT, NOISE = 10, 5, 0.01, 0.5
NUM_TEST, NUM_DRAWS = 4000, 400
LEVELS = (0.5, 0.8, 0.95)
PUBLISHED = "0.256 / 0.355 / 0.703"
PRIOR = tx.data.Normal(jnp.zeros(3), 1.0)
FINE = tx.sample_data.make_lorenz_63_stepper(DT)


def windows(key, num):
    """Noisy windows and their true states, `(num, 10, 3)`."""
    data_key, noise_key = jax.random.split(key)
    fine = tx.sample_data.lorenz_63(
        num, temporal_horizon=SUBSTEPS * (NUM_TIMES - 1) + 1, dt=DT,
        num_warmup_steps=1500, init_std=10.0, key=data_key,
    )  # fmt: skip
    truth = fine[:, ::SUBSTEPS]
    mask = jnp.zeros(truth.shape, bool).at[:, ::2, :2].set(True)
    noise = NOISE * jax.random.normal(noise_key, truth.shape)
    return tx.Batch1D(jnp.where(mask, truth + noise, jnp.nan), mask, truth)


def stepper(u):
    """From one time of a window to the next."""
    return jax.lax.fori_loop(0, SUBSTEPS, lambda _, u: FINE(u), u)


def carried(u):
    """States of a window from its first one."""
    return tx.rollout(stepper, u, NUM_TIMES - 1, include_initial=True)


def train(model, pairs, held_out, num_updates, key):
    """The best model on the way by held-out loss, and seconds."""
    trainer = tx.trainer.Trainer(
        tx.data.Samples(pairs),
        tx.configuration.AmortizedNLL(),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, num_updates)),
        num_training_steps=num_updates,
        batch_size=256,
        max_grad_norm=10.0,
        callbacks=[
            tx.callback.Validation(
                tx.configuration.AmortizedNLL(),
                tx.data.Samples(held_out),
                every=max(1, num_updates // 20),
                batch_size=1000,
            )
        ],
        early_stopping=tx.evaluation.EarlyStopping("validation", patience=8),
        progress=False,
    )
    began = time.perf_counter()
    model, history = trainer(model, key=key)
    return model, history.best["validation"], time.perf_counter() - began


def gaussian(data, held_out, num_updates):
    """A Gaussian of whole windows: function of draws, the best evaluation, seconds."""
    keys = jax.random.split(jax.random.key(5), 3)
    encoder = A.MLPEncoder(
        (NUM_TIMES, 3), 128, masked=True, width=256, depth=2, key=keys[0]
    )
    head = A.DiagonalGaussian(3 * NUM_TIMES, 128, width=256, depth=1, key=keys[1])
    prior = tx.data.Normal(jnp.zeros((NUM_TIMES, 3)), 1.0)
    model = A.AmortizedPosterior(encoder, head, prior=prior).standardised(data)
    pairs = [A.Pairs(b.target, b.input, b.mask) for b in (data, held_out)]
    model, *rest = train(model, *pairs, num_updates, keys[2])
    return lambda key, y, mask: model.sample(key, y, NUM_DRAWS, mask), *rest


def flow(data, held_out, num_updates):
    """A flow of first states, carried on: as `gaussian`."""
    keys = jax.random.split(jax.random.key(6), 3)
    encoder = A.MLPEncoder(
        (NUM_TIMES, 3), 64, masked=True, width=256, depth=2, key=keys[0]
    )
    head = A.masked_autoregressive_flow(
        3, 64, transformer="spline", num_layers=4, width=64, key=keys[1]
    )
    pairs = [A.Pairs(b.target[:, 0], b.input, b.mask) for b in (data, held_out)]
    model = A.AmortizedPosterior(encoder, head, prior=PRIOR).standardised(pairs[0])
    model, *rest = train(model, *pairs, num_updates, keys[2])
    draw = lambda key, y, mask: jax.vmap(carried)(  # noqa: E731
        model.sample(key, y, NUM_DRAWS, mask)
    )
    return draw, *rest


@functools.partial(jax.jit, static_argnums=0)
def margins(draw, keys, y, mask):
    """Means and central intervals `(2 levels, n, 10, 3)` of margins."""
    tails = jnp.array([side for level in LEVELS for side in (-level, level)])

    def one(args):
        draws = draw(*args)
        return draws.mean(axis=0), jnp.quantile(draws, 0.5 + tails / 2, axis=0)

    return jax.lax.map(one, (keys, y, mask), batch_size=50)


def judge(draw, test):
    """RMSE, coverage by level and component, and milliseconds of 120 windows."""
    keys = jax.random.split(jax.random.key(7), NUM_TEST)
    y = test.observed()
    mean, ends = jax.block_until_ready(margins(draw, keys, y, test.mask))
    low, high = ends[:, ::2], ends[:, 1::2]
    truth = np.asarray(test.target)[:, None]
    inside = (np.asarray(low) <= truth) & (truth <= np.asarray(high))
    few = (keys[:120], y[:120], test.mask[:120])
    jax.block_until_ready(margins(draw, *few))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(margins(draw, *few))
        seconds.append(time.perf_counter() - began)
    return mean, inside.mean(axis=(0, 2)), 1e3 * np.median(seconds)


def classical(data, test):
    """Linear interpolation, and strong 4D-Var with the true model."""
    climate = np.asarray(data.target).reshape(-1, 3)
    mean, covariance = jnp.asarray(climate.mean(axis=0)), jnp.cov(climate.T)
    line = jax.vmap(lambda y, m: tx.solver.linear_interpolation(y, m, fill=mean))
    start = line(test.input, test.mask)
    solve = jax.jit(jax.vmap(lambda y, m, u: tx.solver.strong_4dvar(
        stepper, y, m, initial=u[0], obs_err_cov=NOISE**2, max_steps=60,
        background=mean, background_cov=covariance,
    ).state))  # fmt: skip
    return start, solve(test.input, test.mask, start)


def errors(states, test):
    """RMSE by component, with the standard error of its estimate over windows."""
    squares = ((np.asarray(states) - np.asarray(test.target)) ** 2).mean(axis=1)
    rmse = np.sqrt(squares.mean(axis=0))
    spread = squares.std(axis=0) / np.sqrt(len(squares)) / (2 * rmse)
    return [
        " / ".join(f"{e:.3f}" for e in rmse),
        " / ".join(f"{s:.3f}" for s in spread),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--updates", type=int, default=8000)
    arguments = parser.parse_args()
    data = windows(jax.random.key(0), arguments.pairs)
    held_out = windows(jax.random.key(2), 5000)
    test = windows(jax.random.key(1), NUM_TEST)
    rows, covered = [["vardax, amortized (120 windows)", PUBLISHED, "–"]], []
    rows.append(["vardax, 4D-Var (120 windows)", "0.255 / 0.314 / 0.749", "–"])
    names = ("linear interpolation", "strong 4D-Var, one start")
    for name, states in zip(names, classical(data, test), strict=True):
        rows.append([name, *errors(states, test)])
    for name, fit in (("Gaussian of windows", gaussian), ("flow of states", flow)):
        draw, (step, loss), seconds = fit(data, held_out, arguments.updates)
        mean, coverage, warm = judge(draw, test)
        rows.append([name, *errors(mean, test)])
        parts = [
            f"{c.mean():.3f} ({' / '.join(f'{x:.3f}' for x in c)})" for c in coverage
        ]
        covered.append(
            [name, *parts, f"{loss:.3f}", step, f"{seconds:.0f}", f"{warm:.0f}"]
        )
        print(rows[-1], covered[-1], flush=True)
    body = table(["method", "RMSE of x / y / z", "its standard error"], rows)
    body += "\n\nCoverage of central intervals (x / y / z), and what it costs:\n\n"
    body += table(
        ["posterior", *(f"{100 * level:.0f} %" for level in LEVELS), "held-out NLL",
         "best update", "training, s", f"120 windows, {NUM_DRAWS} draws each, ms"],
        covered,
    )  # fmt: skip
    report(
        "amortized_lorenz",
        "Amortized smoothing of Lorenz-63 windows",
        f"{arguments.pairs} simulated windows, at most {arguments.updates} updates of "
        f"256; {NUM_TEST} fresh windows. vardax's figures are those of its notebook, which "
        "trains on 9600 overlapping windows of one trajectory.\n\n" + body,
    )


if __name__ == "__main__":
    main()
