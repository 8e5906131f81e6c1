"""How close do amortized posteriors come on the sbibm tasks?

For every task, budget and seed: simulations from the prior, densities trained on nine
tenths of them, the best by held-out likelihood kept (weights on the way, and candidates of
heads), 10,000 draws for each observation, C2ST against the public reference draws. Whether
a posterior (NPE) or a likelihood and chains (NLE) is learned is fixed for each task below.

Run: python -m benchmarks.sbibm [--tasks two_moons ...] [--budgets 1000 10000] [--seeds 3]
     [--references <folder of the public benchmark's observations>]
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from benchmarks._harness import RESULTS, hardware, report, table
from benchmarks._sbibm_tasks import TASKS, references

A = tx.amortized
NUM_DRAWS = 10_000


def npe(head, encoder=None, shared_axes=()):
    """A builder of posteriors."""

    def build(task, key, pairs):
        keys = jax.random.split(key)
        size = TASKS[task].shape
        inner = A.IdentityEncoder(size) if encoder is None else encoder(size, keys[0])
        dim = pairs[0].shape[1]
        model = A.AmortizedPosterior(
            inner, head(dim, inner.num_features, key=keys[1]), prior=TASKS[task].prior
        )
        return model.standardised(pairs, shared_axes=shared_axes)

    return build


def nle(head, *, independent=False):
    """A builder of likelihoods."""

    def build(task, key, pairs):
        shape = TASKS[task].shape[1:] if independent else TASKS[task].shape
        model = A.AmortizedLikelihood(
            head(int(np.prod(shape)), pairs[0].shape[1], key=key),
            prior=TASKS[task].prior,
            shape=shape,
            independent=independent,
        )
        return model.standardised(pairs)

    return build


SPLINE = functools.partial(
    A.masked_autoregressive_flow, transformer="spline", num_layers=5, width=64
)
COUPLING = functools.partial(A.coupling_flow, num_layers=5, width=64)
AFFINE = functools.partial(A.masked_autoregressive_flow, num_layers=5, width=64)
GAUSSIAN = functools.partial(A.FullGaussian, width=64, depth=2)
LINEAR = functools.partial(A.FullGaussian, depth=0)
MIXTURE = functools.partial(A.GaussianMixture, num_components=4, width=64, depth=2)

# The family, how many members of the best head are averaged, and the candidates.
RECIPES = {
    "two_moons": ("NPE", 1, {"spline": npe(SPLINE)}),
    "gaussian_mixture": (
        "NLE",
        1,
        {"Gaussian": nle(GAUSSIAN), "mixture": nle(MIXTURE)},
    ),
    "slcp": (
        "NLE",
        1,
        {
            "Gaussian": nle(GAUSSIAN, independent=True),
            "mixture": nle(MIXTURE, independent=True),
        },
    ),
    "gaussian_linear_uniform": (
        "NLE",
        1,
        {"Gaussian": nle(GAUSSIAN), "linear": nle(LINEAR)},
    ),
    "lotka_volterra": ("NPE", 1, {"spline": npe(SPLINE), "affine": npe(AFFINE)}),
}


def train(model, pairs, held_out, key, budget):
    """The weights of the best held-out likelihood on the way, and that value."""
    batch_size = 50 if budget <= 1000 else 200
    per_epoch = max(1, len(pairs[0]) // batch_size)
    epochs = {1000: 150, 10_000: 100, 100_000: 40}[budget]
    num_steps = per_epoch * epochs
    every = max(1, num_steps // 40)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, num_steps // 50, num_steps)
    trainer = tx.trainer.Trainer(
        tx.data.Samples(A.Pairs(*pairs)),
        tx.configuration.AmortizedNLL(),
        optimizer=optax.adam(rate),
        num_training_steps=num_steps,
        batch_size=batch_size,
        max_grad_norm=5.0,
        callbacks=[
            tx.callback.Validation(
                tx.configuration.AmortizedNLL(),
                tx.data.Samples(A.Pairs(*held_out)),
                every=every,
                batch_size=1000,
            ),
            tx.callback.GetNetwork(every=every),
        ],
        progress=False,
    )
    _, history = trainer(model, key=key)
    losses = np.asarray(history.records["validation"].values)
    best = int(np.nanargmin(losses))
    return history.records["network"].at(best), float(losses[best])


def fit(task, budget, seed):
    """Members of the best candidate, its name, its held-out loss, and seconds."""
    _, num_members, candidates = RECIPES[task]
    keys = jax.random.split(jax.random.key(seed), 3)
    data = TASKS[task].simulate(keys[0], budget)
    cut = budget // 10
    held_out, pairs = (
        tuple(x[s] for x in data) for s in (slice(cut), slice(cut, None))
    )
    began = time.perf_counter()
    tried = {}
    for name, build in candidates.items():
        model_key, train_key = jax.random.split(keys[1])
        model = build(task, model_key, pairs)
        tried[name] = train(model, pairs, held_out, train_key, budget)
    name = min(tried, key=lambda n: tried[n][1])
    members = [tried[name][0]]
    for i in range(1, num_members):
        model_key, train_key = jax.random.split(jax.random.fold_in(keys[2], i))
        model = candidates[name](task, model_key, pairs)
        members.append(train(model, pairs, held_out, train_key, budget)[0])
    return members, name, tried[name][1], time.perf_counter() - began


def draw(task, members, x, key):
    """10,000 draws of the posterior, `(n, d)`."""
    if RECIPES[task][0] == "NPE":
        share = -(-NUM_DRAWS // len(members))
        keys = jax.random.split(key, len(members))
        draws = [_sample(m, k, x, share) for m, k in zip(members, keys, strict=True)]
        return np.concatenate(draws)[:NUM_DRAWS]
    chains = A.sample_posterior(
        members[0], TASKS[task].prior, x, NUM_DRAWS, key=key,
        num_chains=250, num_warmup=150, num_candidates=200_000,
    )  # fmt: skip
    return np.asarray(chains.samples)


@eqx.filter_jit
def _sample(model, key, x, num):
    return model.sample(key, x, num)


def cell(task, budget, seed, observed):
    """Results of one task, budget and seed."""
    members, head, loss, seconds = fit(task, budget, seed)
    scores = []
    began = time.perf_counter()
    for i, (x, reference) in enumerate(observed):
        key = jax.random.fold_in(jax.random.key(1000 + seed), i)
        samples = draw(task, members, jnp.asarray(x), key)
        scores.append(float(A.c2st(samples, reference)))
    return {
        "task": task, "budget": budget, "seed": seed, "method": RECIPES[task][0],
        "head": head, "held_out": loss, "c2st": scores, "seconds_training": seconds,
        "seconds_judging": time.perf_counter() - began,
    }  # fmt: skip


def calibrate(task, budget, seed):
    """Where no reference draws are at hand: coverage on fresh simulations."""
    members, head, loss, seconds = fit(task, budget, seed)
    pairs = TASKS[task].simulate(jax.random.key(999), 500)
    coverage = A.expected_coverage(
        members[0], tuple(map(jnp.asarray, pairs)), key=jax.random.key(2),
        levels=[0.5, 0.8, 0.95],
    )  # fmt: skip
    return {
        "task": task, "budget": budget, "seed": seed, "method": RECIPES[task][0],
        "head": head, "held_out": loss, "coverage": coverage.coverage.tolist(),
        "seconds_training": seconds,
    }  # fmt: skip


def main() -> None:
    root = Path(__file__).parent.parent
    folder = os.environ.get("TRAINAX_PK_DATA", root.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=Path, default=Path(folder) / "sbibm")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[1000, 10_000],
        choices=[1000, 10_000, 100_000],
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--report", action="store_true", help="only print what is there"
    )
    arguments = parser.parse_args()
    path = RESULTS / f"sbibm_{hardware()}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for task in [] if arguments.report else arguments.tasks:
        observed = references(arguments.references, task)
        for budget in arguments.budgets:
            for seed in range(arguments.seeds):
                same = lambda r: (r["task"], r["budget"], r["seed"]) == (  # noqa: E731
                    task, budget, seed,
                )  # fmt: skip
                make = cell if observed else calibrate
                extra = (observed,) if observed else ()
                row = make(task, budget, seed, *extra)
                rows = [r for r in rows if not same(r)] + [row]
                path.write_text(json.dumps(rows, indent=1))
                print(row, flush=True)
    _report(rows)


def _report(rows) -> None:
    lines, others = [], []
    for task in TASKS:
        for budget in sorted({r["budget"] for r in rows}):
            mine = [r for r in rows if (r["task"], r["budget"]) == (task, budget)]
            scored = [r for r in mine if "c2st" in r]
            published = [p or "–" for p in TASKS[task].published[budget]]
            if scored:
                means = [np.mean(r["c2st"]) for r in scored]
                seconds = np.mean([r["seconds_training"] for r in scored])
                heads = "/".join(sorted({r["head"] for r in scored}))
                each = " ".join(f"{m:.3f}" for m in means)
                lines.append(
                    [task, budget, f"{np.mean(means):.3f}", each,
                     f"{scored[0]['method']}, {heads}", *published, f"{seconds:.0f}"]
                )  # fmt: skip
            others += [
                [task, budget, r["seed"], *(f"{c:.3f}" for c in r["coverage"])]
                for r in mine
                if "coverage" in r
            ]
    body = table(
        ["task", "simulations", "C2ST", "by seed", "method, head by held-out loss",
         "NPE published", "NLE", "NRE", "training, s"],
        lines,
    )  # fmt: skip
    if others:
        body += (
            "\n\nCoverage of regions of 50, 80 and 95 % on 500 fresh simulations:\n\n"
        )
        body += table(["task", "simulations", "seed", "50 %", "80 %", "95 %"], others)
    note = (
        "C2ST: mean over the observations at hand (two per task), then over seeds. "
        "Published: means over ten observations (Lueckmann et al. 2021, results "
        "repository). Cells that are not listed were not run.\n\n"
    )
    report("sbibm", "Amortized posteriors on the sbibm tasks", note + body)


if __name__ == "__main__":
    main()
