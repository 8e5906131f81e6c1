"""How close do amortized posteriors come on the sbibm tasks?

For every task, budget and seed: simulations from the prior, densities trained on nine
tenths of them until the loss of the last tenth stops to fall, the best candidate of heads
by that loss kept, 10,000 draws for each observation, C2ST against the public reference
draws. Cells whose results lie there are not run again. Whether a posterior (NPE) or a
likelihood and chains (NLE) is learned, which heads are tried and how many members are
averaged is fixed for each task in `_sbibm_recipes`.

Run: python -m benchmarks.sbibm [--tasks two_moons ...] [--budgets 1000 10000] [--seeds 3]
     [--references <folder of the public benchmark's observations>]
"""

import argparse
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
from benchmarks._sbibm_recipes import RECIPES, HeadEnsemble
from benchmarks._sbibm_tasks import TASKS, references

A = tx.amortized
NUM_DRAWS = 10_000
NOTE = (
    "C2ST: mean over the observations at hand (two per task), then over seeds; 0.5 is "
    "agreement. Published: means over ten observations (Lueckmann et al. 2021, results "
    "repository). Cells that are not listed were not run. Heads are chosen by held-out "
    "loss; where a linear one is, on the two Gaussian tasks, it contains the simulator, "
    "and the published methods had no such candidate. Training times are those of a "
    "machine in use, with compilation.\n\n"
)


# Updates, batch size and evaluations on the way, by number of simulations.
TRAINING = {1000: (3000, 50), 10_000: (6000, 200), 100_000: (20_000, 500)}
NUM_EVALUATIONS, PATIENCE = 60, 20


def make_trainer(pairs, held_out, budget, rate):
    """Ends when the held-out loss no longer falls; returns the best model on the way."""
    num_steps, batch_size = TRAINING[budget]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 50, num_steps)
    return tx.trainer.Trainer(
        tx.data.Samples(A.Pairs(*pairs)),
        tx.configuration.AmortizedNLL(),
        optimizer=optax.adam(schedule),
        num_training_steps=num_steps,
        batch_size=batch_size,
        max_grad_norm=5.0,
        callbacks=[
            tx.callback.Validation(
                tx.configuration.AmortizedNLL(),
                tx.data.Samples(A.Pairs(*held_out)),
                every=num_steps // NUM_EVALUATIONS,
                batch_size=1000,
            )
        ],
        early_stopping=tx.evaluation.EarlyStopping("validation", patience=PATIENCE),
        program="scan",
        progress=False,
    )


def fit(task, budget, seed):
    """A model of the best candidate, its name, held-out losses by name, and seconds."""
    recipe = RECIPES[task]
    keys = jax.random.split(jax.random.key(seed), 3)
    data = TASKS[task].simulate(keys[0], budget)
    cut = budget // 10
    held_out, pairs = (
        tuple(x[s] for x in data) for s in (slice(cut), slice(cut, None))
    )
    began = time.perf_counter()
    trained, losses, trainers = {}, {}, {}

    def train(name, key):
        model_key, train_key = jax.random.split(key)
        model = recipe.candidates[name].build(task, model_key, pairs)
        model, history = trainers[name](model, key=train_key)
        return model, history.best["validation"][1]

    for name, candidate in recipe.candidates.items():
        trainers[name] = make_trainer(pairs, held_out, budget, candidate.rate)
        trained[name], losses[name] = train(name, keys[1])
    name = min(losses, key=lambda n: losses[n])
    members = [trained[name]]
    for i in range(1, recipe.members[budget]):
        members.append(train(name, jax.random.fold_in(keys[2], i))[0])
    return _ensemble(members), name, losses, time.perf_counter() - began


def _ensemble(members):
    """One model, whose density is the mean of the members'."""
    if len(members) == 1:
        return members[0]
    arrays = [eqx.partition(m.head, eqx.is_array)[0] for m in members]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    static = eqx.partition(members[0].head, eqx.is_array)[1]
    heads = HeadEnsemble(eqx.combine(stacked, static))
    return eqx.tree_at(lambda m: m.head, members[0], heads)


def draw(task, model, x, key):
    """10,000 draws of the posterior, `(n, d)`."""
    if RECIPES[task].family == "NPE":
        return np.asarray(_sample(model, key, x, NUM_DRAWS))
    chains = A.sample_posterior(
        model, TASKS[task].prior, x, NUM_DRAWS, key=key,
        num_chains=250, num_warmup=100, num_candidates=2_000_000,
    )  # fmt: skip
    return np.asarray(chains.samples)


@eqx.filter_jit
def _sample(model, key, x, num):
    return model.sample(key, x, num)


def cell(task, budget, seed, observed):
    """Results of one task, budget and seed."""
    model, head, losses, seconds = fit(task, budget, seed)
    scores = []
    began = time.perf_counter()
    for i, (x, reference) in enumerate(observed):
        key = jax.random.fold_in(jax.random.key(1000 + seed), i)
        samples = draw(task, model, jnp.asarray(x), key)
        scores.append(float(A.c2st(samples, reference)))
    return {
        "task": task, "budget": budget, "seed": seed, "method": RECIPES[task].family,
        "members": RECIPES[task].members[budget], "head": head, "held_out": losses,
        "c2st": scores, "seconds_training": seconds,
        "seconds_judging": time.perf_counter() - began,
    }  # fmt: skip


def calibrate(task, budget, seed):
    """Where no reference draws are at hand: coverage on fresh simulations."""
    model, head, losses, seconds = fit(task, budget, seed)
    pairs = TASKS[task].simulate(jax.random.key(999), 500)
    coverage = A.expected_coverage(
        model, tuple(map(jnp.asarray, pairs)), key=jax.random.key(2),
        levels=[0.5, 0.8, 0.95],
    )  # fmt: skip
    return {
        "task": task, "budget": budget, "seed": seed, "method": RECIPES[task].family,
        "members": RECIPES[task].members[budget], "head": head, "held_out": losses,
        "coverage": coverage.coverage.tolist(),
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
                if (task, budget, seed) in {
                    (r["task"], r["budget"], r["seed"]) for r in rows
                }:
                    continue
                make = cell if observed else calibrate
                extra = (observed,) if observed else ()
                row = make(task, budget, seed, *extra)
                rows.append(row)
                path.write_text(json.dumps(rows, indent=1))
                print(row, flush=True)
    _report(rows)


def _report(rows) -> None:
    lines, others = [], []
    for task in TASKS:
        for budget in sorted({r["budget"] for r in rows}):
            mine = [r for r in rows if (r["task"], r["budget"]) == (task, budget)]
            mine = sorted(mine, key=lambda r: r["seed"])
            if scored := [r for r in mine if "c2st" in r]:
                lines.append(_line(task, budget, scored))
            others += [
                [task, budget, r["seed"], *(f"{c:.3f}" for c in r["coverage"])]
                for r in mine
                if "coverage" in r
            ]
    body = table(
        ["task", "simulations", "C2ST", "at most", "by seed", "method", "members",
         "head by held-out loss", "NPE published", "NLE", "NRE", "training, s"],
        lines,
    )  # fmt: skip
    if others:
        body += (
            "\n\nCoverage of regions of 50, 80 and 95 % on 500 fresh simulations:\n\n"
        )
        body += table(["task", "simulations", "seed", "50 %", "80 %", "95 %"], others)
    report("sbibm", "Amortized posteriors on the sbibm tasks", NOTE + body)


def _line(task, budget, rows):
    means = [np.mean(r["c2st"]) for r in rows]
    bar = TASKS[task].targets.get(budget, TASKS[task].published[budget][0])
    score = f"{np.mean(means):.3f}"
    return [
        task, budget, score if float(score) <= bar else f"**{score}, misses**",
        f"{bar:.3f}", " ".join(f"{m:.3f}" for m in means), rows[0]["method"],
        rows[0]["members"], "; ".join(sorted({r["head"] for r in rows})),
        *(p or "–" for p in TASKS[task].published[budget]),
        f"{np.mean([r['seconds_training'] for r in rows]):.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
