"""What does a sweep of 16 learning rates and 4 seeds cost, next to one run?

python -m benchmarks.sweeps [--quick]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._harness import interleaved, medians, ratio, report, table
from trainax_pk import experiment
from trainax_pk.experiment._members import Members
from trainax_pk.experiment._run import make_data

RATES, SEEDS = 16, 4
AT_MOST = 4.0
EQUAL = 1e-6
TEXT = """
data: {{kind: {data}}}
model: {{kind: {model}}}
configuration: supervised
optimizer: {{kind: adam, learning_rate: 1e-3}}
training:
  {{num_steps: {steps}, batch_size: {batch}, program: {program}, log_every: 1000}}
"""
LORENZ = "lorenz_63, num_samples: 20, temporal_horizon: 100"
ADVECTION = "advection_1d, num_points: 30"
# Data, model, batch size, program, updates.
CASES: dict[str, tuple[str, str, int, str, int]] = {
    "MLP 8 x 2, batch 8, every update dispatched": (
        LORENZ, "mlp, width: 8, depth: 2", 8, "loop", 10_000,
    ),
    "conv 2 x 1, 30 points, batch 8, every update dispatched": (
        ADVECTION, "conv, hidden_channels: 2, depth: 1", 8, "loop", 10_000,
    ),
    "MLP 8 x 2, batch 8": (LORENZ, "mlp, width: 8, depth: 2", 8, "auto", 10_000),
    "MLP 32 x 3, batch 64": (LORENZ, "mlp, width: 32, depth: 3", 64, "auto", 2000),
}  # fmt: skip
HEADER = (
    "case", "updates", "one run, s", "64 trials / one run", "training alone, one, s",
    "64 trials / one, training alone", "trials a second, whole", "chosen",
    "largest difference, in double",
)  # fmt: skip
NOTE = f"""`experiment.sweep` of {RATES} learning rates and {SEEDS} seeds against
`experiment.train` of one trial, interleaved in one process, medians of the ratios within
a round. A whole run makes its data, compiles, trains and writes its artifact; a whole
sweep does that for {RATES * SEEDS} trials. "Training alone" is compiled before and
writes nothing. "Every update dispatched" is the family `loop`, the dispatch-bound case;
elsewhere many updates are one dispatch and an update costs its arithmetic. The
difference is of the losses of all updates and the final parameters, trained together and
one by one, relative to the largest entry of their array, over 200 updates in double
precision."""


def main() -> None:
    """Measures every case and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few updates, no report")
    parser.add_argument("cases", nargs="*", help="parts of the names of cases to run")
    args = parser.parse_args()
    rows, verdicts = [], []
    for name, case in CASES.items():
        if args.cases and not any(part in name for part in args.cases):
            continue
        steps = case[-1] // 10 if args.quick else case[-1]
        row, verdict = measure(name, (*case[:-1], steps), rounds=2 if args.quick else 5)
        rows.append(row)
        verdicts += verdict
    body = "\n\n".join([NOTE, table(HEADER, rows)])
    if args.quick or args.cases:
        print(body, *verdicts, sep="\n")
        return
    question = f"What does a sweep of {RATES * SEEDS} trials cost, next to one run?"
    report("sweeps", question, body, "\n".join(verdicts))


def measure(
    name: str, case: tuple[str, str, int, str, int], *, rounds: int
) -> tuple[list[Any], list[str]]:
    """A row of the table, and what it means."""
    spec = make_sweep(case)
    one = spec.trials([])[5].run
    whole = interleaved(
        {"one": lambda: _train(one), "sweep": lambda: _sweep(spec)}, rounds=rounds
    )
    members, built = _members(spec), experiment.build(one)
    alone = interleaved(
        {"one": lambda: built.train()[0], "sweep": lambda: _again(members)},
        rounds=rounds,
    )
    error = difference(case)
    ratios = [ratio(seconds, "sweep", "one") for seconds in (whole, alone)]
    num = RATES * SEEDS
    row = [
        name,
        case[-1],
        f"{medians(whole)['one']:.2f}",
        f"{ratios[0]:.2f}",
        f"{medians(alone)['one']:.3f}",
        f"{ratios[1]:.2f}",
        f"{num / medians(whole)['sweep']:.1f}",
        members._engine.describe(),
        f"{error:.0e}",
    ]
    checks = [("together as one by one", error, EQUAL)]
    if case[3] == "loop":
        checks += [
            (f"whole sweep at most {AT_MOST:g} x one run", ratios[0], AT_MOST),
            (f"its training at most {AT_MOST:g} x one run's", ratios[1], AT_MOST),
        ]
    return row, [
        f"- {name}: {what}: {'met' if value <= limit else '**missed**'} ({value:.2g})."
        for what, value, limit in checks
    ]


def make_sweep(
    case: tuple[str, str, int, str, int], extra: str = ""
) -> experiment.HyperSweep:
    """The sweep of a case."""
    data, model, batch, program, steps = case
    text = TEXT.format(
        data=data, model=model, batch=batch, program=program, steps=steps
    )
    rates = {"kind": "log_uniform", "low": 1e-4, "high": 1e-2, "num": RATES}
    fields = {"optimizer.learning_rate": rates, "seed": list(range(SEEDS))}
    run = experiment.read_run(text + extra).to_data()
    return experiment.read_sweep(json.dumps({"run": run, "fields": fields}))


def difference(case: tuple[str, str, int, str, int]) -> float:
    """Of eight trials trained together from the same one by one, in double precision."""
    jax.config.update("jax_enable_x64", True)
    spec = make_sweep((*case[:-1], 200), "precision: float64\n")
    members = _members(spec)
    members._engine.vmapped = True
    members.advance(members.total)
    found = 0.0
    for i, trial in list(enumerate(members.trials))[::8]:
        model, history = experiment.build(trial.run).train()
        loss = np.concatenate([s["loss"][i] for s in members._series])
        pairs = [(loss, np.asarray(history.loss))]
        own = jax.tree.map(lambda x, i=i: x[i], members._state.params)
        alone = history.state.params
        pairs += zip(jax.tree.leaves(own), jax.tree.leaves(alone), strict=True)
        found = max(
            found, *(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        )
    jax.config.update("jax_enable_x64", False)
    return found


def _members(spec: experiment.HyperSweep) -> Members:
    trials = spec.trials([])
    folder = Path(tempfile.mkdtemp())
    made = make_data(trials[0].run)
    return Members(spec, trials, made, folder / "state", jax.devices()[:1])


def _again(members: Members) -> Any:
    members.done, members._series = 0, []
    members._begin()
    while members.done < members.total:
        members._chunk_of(
            min(members._chunk(), members.total - members.done), members._chunk()
        )
    return members._state.params


def _train(run: experiment.Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        experiment.train(run, folder)


def _sweep(spec: experiment.HyperSweep) -> None:
    with tempfile.TemporaryDirectory() as folder:
        experiment.sweep(spec, folder)


if __name__ == "__main__":
    main()
