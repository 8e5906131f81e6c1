"""What does training eight seeds at once cost, next to one, and to one after another?

python -m benchmarks.ensembles [--quick] [case ...]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pdequinox as pdeqx

import trainax_pk as tx
from benchmarks._harness import (
    first_call,
    interleaved,
    medians,
    ratio,
    report,
    table,
)

MEMBERS = 8
AT_MOST_ONE = 2.5
AT_MOST_SERIAL = 1.05
EQUAL = 1e-6
DOMINATES = 0.5


class Case(NamedTuple):
    """A model to be made from a key, data, and how long to train."""

    model: Callable[[jax.Array], Any]
    data: Callable[[], jax.Array]
    batch_size: int
    num_updates: int
    program: str = "auto"


def _advection(points: int) -> Callable[[], jax.Array]:
    return lambda: tx.sample_data.advection_1d_periodic(
        num_points=points, num_samples=50, key=jax.random.key(0)
    )


def _lorenz() -> jax.Array:
    data = tx.sample_data.lorenz_rk4(20, temporal_horizon=200, key=jax.random.key(0))
    return (data - jnp.mean(data)) / jnp.std(data)


def _linear(key: jax.Array) -> Any:
    return eqx.nn.Conv1d(
        1, 1, 2, padding="SAME", padding_mode="CIRCULAR", use_bias=False, key=key
    )


def _mlp(width: int, depth: int) -> Callable[[jax.Array], Any]:
    return lambda key: eqx.nn.MLP(3, 3, width, depth, key=key)


def _conv_net(key: jax.Array) -> Any:
    return pdeqx.arch.ConvNet(
        1, 1, 1, hidden_channels=32, depth=10, activation=jax.nn.relu, key=key
    )


def _fno(key: jax.Array) -> Any:
    return pdeqx.arch.ClassicFNO(
        1, 1, 1, num_modes=12, hidden_channels=18, num_blocks=4, key=key
    )


CASES = {
    "linear conv, 30 points": Case(_linear, _advection(30), 32, 20_000),
    "MLP 32 x 3, Lorenz-63": Case(_mlp(32, 3), _lorenz, 64, 2000),
    "MLP 8 x 2, batch 8, Lorenz-63": Case(_mlp(8, 2), _lorenz, 8, 50_000),
    "linear conv, every update dispatched": Case(
        _linear, _advection(30), 32, 2000, "loop"
    ),
    "MLP 32 x 3, every update dispatched": Case(_mlp(32, 3), _lorenz, 64, 2000, "loop"),
    "MLP 160 x 8, Lorenz-63": Case(_mlp(160, 8), _lorenz, 64, 100),
    "1D conv net, 160 points": Case(_conv_net, _advection(160), 20, 10),
    "FNO;12;18;4, 160 points": Case(_fno, _advection(160), 20, 250),
}
HEADER = (
    "case",
    "updates",
    "one member, s",
    "its dispatch",
    "`ensemble=True` / one",
    "`ensemble=True` / serial",
    "`filter_vmap` / serial",
    "forced vmapped / serial",
    "first call, s: one, ensemble, serial",
    "largest difference",
    "the same vmapped",
    "vmapped, in double",
)
NOTE = f"""Wall time of whole runs of {MEMBERS} seeds: `trainer(models, key=keys,
ensemble=True)`, `eqx.filter_vmap(trainer)`, and {MEMBERS} calls one after another
("serial"), next to a single run of one seed. Second calls, interleaved, medians of the
ratios within a round; after the single run its quartiles. Each way has a trainer of its
own. "Forced vmapped" is one program for all members where the engine is not asked.
Differences are of losses and parameters from those of the serial runs, relative to the
largest entry of their array, at the end. Training amplifies rounding: in double
precision the same comparison (few updates) tells rounding from faults.

"Its dispatch": time of the single run with one sample a batch, relative to the whole
batch's. Dispatch dominates above {DOMINATES}; "every update dispatched" is the loop
family, as where a callback follows every update."""


def main() -> None:
    """Measures every case and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few updates, no report")
    parser.add_argument("cases", nargs="*", help="parts of the names of cases to run")
    args = parser.parse_args()
    wanted = args.cases or [""]
    names = [n for n in CASES if any(part in n for part in wanted)]
    rows, verdicts, choices = [], [], []
    for name in names:
        case = CASES[name]
        if args.quick:
            case = case._replace(num_updates=max(case.num_updates // 20, 4))
        row, verdict, choice = measure(name, case, rounds=2 if args.quick else 5)
        rows.append(row)
        verdicts += verdict
        choices.append(f"- {name}: {choice}")
    body = "\n\n".join([NOTE, table(HEADER, rows), "\n".join(choices)])
    question = f"What does training {MEMBERS} seeds cost, next to one?"
    if args.quick or args.cases:
        print(body, *verdicts, sep="\n")
    else:
        report("ensembles", question, body, "\n".join(verdicts))


def measure(name: str, case: Case, *, rounds: int) -> tuple[list[Any], list[str], str]:
    """A row of the table, what it means, and what the engine chose."""
    problem = Problem(case)
    # A trainer for each way, as a user has it: nothing compiled by one helps another.
    one, serial, ensemble, mapped, forced = (problem.trainer() for _ in range(5))
    thin = problem.trainer(batch_size=1)
    forced.engine.vmapped = True
    runs: dict[str, Callable[[], Any]] = {
        "one": lambda: problem.single(one, 0),
        "thin": lambda: problem.single(thin, 0),
        "serial": lambda: problem.serial(serial),
        "ensemble": lambda: problem.ensemble(ensemble),
        "vmap": lambda: problem.vmap(mapped),
        "forced": lambda: problem.ensemble(forced),
    }
    first = {kind: first_call(run) for kind, run in runs.items()}
    seconds = interleaved(runs, rounds=rounds)
    results = {kind: run() for kind, run in runs.items() if kind not in ("one", "thin")}
    differences = {
        kind: difference(results[kind], results["serial"])
        for kind in ("ensemble", "vmap", "forced")
    }
    in_double = difference_in_double(case)
    to_serial = {k: ratio(seconds, k, "serial") for k in ("ensemble", "vmap", "forced")}
    to_one, dispatch = (ratio(seconds, k, "one") for k in ("ensemble", "thin"))
    quartiles = statistics.quantiles(seconds["one"], n=4)
    worst = max(differences["ensemble"], differences["vmap"])
    row = [
        name,
        case.num_updates,
        f"{medians(seconds)['one']:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})",
        f"{dispatch:.2f}",
        f"{to_one:.2f}",
        *(f"{to_serial[kind]:.2f}" for kind in ("ensemble", "vmap", "forced")),
        ", ".join(f"{first[kind]:.1f}" for kind in ("one", "ensemble", "serial")),
        f"{worst:.0e}",
        f"{differences['forced']:.0e}",
        f"{in_double:.0e}",
    ]
    chosen = [t.engine.members for t in (ensemble, mapped)]
    error = in_double if any(c and c[0] for c in chosen) else worst
    slowest = max(to_serial["ensemble"], to_serial["vmap"])
    checks = [
        (f"at most {AT_MOST_SERIAL} x serial", slowest, AT_MOST_SERIAL),
        ("members as alone", error, EQUAL),
    ]
    if dispatch > DOMINATES:
        checks.append((f"at most {AT_MOST_ONE} x one member", to_one, AT_MOST_ONE))
    verdicts = [
        f"- {name}: {what}: {'met' if value <= limit else '**missed**'} ({value:.2g})."
        for what, value, limit in checks
    ]
    return row, verdicts, ensemble.engine.describe()


class Problem:
    """Models, keys, data of a case, and the ways to train on them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.data = case.data()
        self.keys = jax.random.split(jax.random.key(1), MEMBERS)
        self.models = eqx.filter_vmap(case.model)(self.keys)
        self.members = [
            jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, self.models)
            for i in range(MEMBERS)
        ]

    def trainer(self, batch_size: int | None = None) -> tx.trainer.Trainer:
        """A trainer that has compiled nothing yet."""
        return tx.trainer.SupervisedTrainer(
            self.data,
            optimizer=optax.adam(1e-3),
            num_training_steps=self.case.num_updates,
            batch_size=batch_size or self.case.batch_size,
            program=self.case.program,
            progress=False,
        )

    def single(self, trainer: tx.trainer.Trainer, i: int) -> Any:
        """One member alone."""
        return _arrays(trainer(self.members[i], key=self.keys[i]))

    def serial(self, trainer: tx.trainer.Trainer) -> Any:
        """One call after another."""
        results = [self.single(trainer, i) for i in range(MEMBERS)]
        return jax.tree.map(lambda *x: jnp.stack(x), *results)

    def ensemble(self, trainer: tx.trainer.Trainer) -> Any:
        """By the trainer's own argument."""
        return _arrays(trainer(self.models, key=self.keys, ensemble=True))

    def vmap(self, trainer: tx.trainer.Trainer) -> Any:
        """By `eqx.filter_vmap`."""
        train = eqx.filter_vmap(lambda m, k: trainer(m, key=k))
        return _arrays(train(self.models, self.keys))


def difference(a: Any, b: Any) -> float:
    """Largest difference of entries, relative to the largest entry of their array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def difference_in_double(case: Case) -> float:
    """That of members vmapped from members alone, in double precision."""
    jax.config.update("jax_enable_x64", True)
    problem = Problem(case._replace(num_updates=min(case.num_updates, 100)))
    trainer = problem.trainer()
    trainer.engine.vmapped = True
    found = difference(problem.ensemble(trainer), problem.serial(problem.trainer()))
    jax.config.update("jax_enable_x64", False)
    return found


def _arrays(result: tuple[Any, Any]) -> Any:
    model, history = result
    return eqx.filter((model, history.loss), eqx.is_inexact_array)


if __name__ == "__main__":
    main()
