"""Updates per second: the trainer against trainax and against programs by hand.

For every model three programs are written by hand, with the windows stacked in advance
and the model as plain functions of arrays: a Python loop over one jitted update ("loop"),
a scan over updates in one program ("scan"), and the same scan with the model's
convolutions written channels-last ("scan, NWC"). Loops over time are written out, as
trainax does, and as a scan; the faster of the two counts. They do what the update needs
and nothing else: no check for NaN, no gradient norm, no shuffling (random indices).

The trainer is called as a user calls it: shuffling, windows by index, non-finite check,
gradient norms and history included. Steady figures are of a second call of the same
trainer; the first call compiles and chooses, and is given beside it.

    python -m benchmarks.engine [--rows NAME ...]

Every row is kept in the data beside the report, which is written anew after each: rows
may be measured in several calls.
"""

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pdequinox as pdeqx
import trainax as ta

import trainax_pk as tx
from benchmarks import _engine_by_hand as hand
from benchmarks import _harness as harness
from benchmarks._engine_by_hand import Row

KEY = jax.random.key(0)
FIGURES = harness.RESULTS / f"engine_{harness.hardware()}.json"
relu = jax.nn.relu
ASKED_OF_TRAINAX = {"linear conv 1D, 1 steps": 100, "MLP 32x3, Lorenz": 15}
# Where a progress bar would show most: updates of microseconds.
BARRED = ("linear conv 1D, 1 steps", "MLP 32x3, Lorenz")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", nargs="*", default=[])
    options = arguments.parse_args()
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for row in rows():
        if options.rows and not any(word in row.name for word in options.rows):
            continue
        found[row.name] = measure(row, rounds=5)
        if row.name in BARRED:
            found[row.name]["bar"] = progress_bar(row, rounds=9)
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    report({row.name: found[row.name] for row in rows() if row.name in found})


def report(found: dict[str, dict[str, Any]]) -> None:
    header = ["case", "trainax", "loop", "scan", "scan, NWC", "trainer"]
    header += ["trainer / best by hand", "trainer / trainax"]
    body = (
        "Milliseconds per update, medians of 5 interleaved rounds; the ratios are of "
        "speeds (above 1: the trainer is faster), medians over rounds.\n\n"
    )
    body += harness.table(header, [_speeds(n, x) for n, x in found.items()])
    body += (
        "\n\nThe choice between families, beside the same trainer with either forced: "
        "milliseconds per update, the speed of the trainer relative to the faster one, "
        "and seconds of the first call, compilation and choice included, for the number "
        "of updates given. The scan by hand has its loop over time scanned and runs at "
        "most 100,000 / rollout updates (60 / rollout in rows of at most 1500); trainax "
        "300 (60 / rollout) and the forced loop 1000 (60 / rollout), the rest at their "
        "rates.\n\n"
    )
    header = ["case", "chose", "forced loop", "forced scan", "trainer / faster"]
    header += ["updates", "first call", "of this choosing", "forced loop"]
    header += ["forced scan", "scan by hand", "trainax"]
    body += harness.table(header, [_choices(n, x) for n, x in found.items()])
    body += "\n\n"
    body += "\n".join(f"- {n}: {x['reason']}" for n, x in found.items())
    barred = {n: x["bar"] for n, x in found.items() if "bar" in x}
    body += (
        "\n\nThe progress bar: time of a whole run with it relative to one without, "
        "median of interleaved rounds and its quartiles.\n\n"
    )
    body += harness.table(
        ["case", "updates", "with / without"],
        [
            [n, found[n]["updates"], f"{x[1]:.3f} ({x[0]:.3f} to {x[2]:.3f})"]
            for n, x in barred.items()
        ],
    )
    verdicts = [line for n, x in found.items() for line in _verdicts(n, x)]
    harness.report("engine", "How fast is training?", body, "\n".join(verdicts))


def _speeds(name: str, found: dict[str, Any]) -> list[str]:
    medians = found["medians"]

    def best(family: str) -> str:
        times = [s for n, s in medians.items() if n.split(", time")[0] == family]
        return _ms(min(times)) if times else "–"

    hands = [best(family) for family in ("loop", "scan", "scan, NWC")]
    last = [
        f"{found['to_best']:.2f} ({found['fastest']})",
        f"{found['to_trainax']:.1f}",
    ]
    return [name, _ms(medians["trainax"]), *hands, _ms(medians["trainer"]), *last]


def _choices(name: str, found: dict[str, Any]) -> list[str]:
    medians, first = found["medians"], found["first"]
    return [
        name,
        found["choice"],
        _ms(medians["forced loop"]),
        _ms(medians["forced scan"]),
        f"{found['to_forced']:.2f}",
        str(found["updates"]),
        f"{first['trainer']:.2f}",
        f"{found['choosing']:.2f}",
        f"{first['forced loop']:.2f}",
        f"{first['forced scan']:.2f}",
        f"{first['scan by hand']:.2f}",
        f"{first['trainax']:.1f}",
    ]


def _verdicts(name: str, found: dict[str, Any]) -> list[str]:
    first = found["first"]
    # A family that is slower per update is right where the run is too short for more.
    total = min(first["forced loop"], first["forced scan"]) / first["trainer"]
    claims = [
        ("speed relative to the best by hand", 0.95, found["to_best"]),
        ("to trainax", ASKED_OF_TRAINAX.get(name, 1), found["to_trainax"]),
        (
            "to the faster family, per update or for the whole run",
            0.95,
            max(found["to_forced"], total),
        ),
    ]
    return [
        f"- {name}: {what} at least {asked}: "
        f"{'met' if figure >= asked else '**missed**'} ({figure:.2f})."
        for what, asked, figure in claims
    ]


def rows() -> list[Row]:
    advection = tx.sample_data.advection_1d_periodic(cfl=-0.75, key=KEY)
    lorenz = tx.sample_data.lorenz_rk4(key=KEY, temporal_horizon=200)
    ks = tx.sample_data.kuramoto_sivashinsky_1d(
        num_samples=20, temporal_horizon=51, num_points=160, key=KEY
    )
    flow = tx.sample_data.advection_diffusion_2d(
        num_samples=8, temporal_horizon=21, num_points=32, key=KEY
    )
    linear = eqx.nn.Conv1d(
        1, 1, 2, padding="SAME", padding_mode="CIRCULAR", use_bias=False, key=KEY
    )
    out = [
        Row(
            f"linear conv 1D, {r} steps",
            advection,
            linear,
            *hand.convs(linear, 1),
            r,
            32,
            n,
        )
        for r, n in ((1, 100_000), (5, 100_000), (20, 100_000))
    ]
    for width, depth, n in ((32, 3, 20_000), (160, 8, 1_000)):
        mlp = eqx.nn.MLP(3, 3, width, depth, key=KEY)
        out.append(
            Row(f"MLP {width}x{depth}, Lorenz", lorenz, mlp, hand.mlp, None, 1, 64, n)
        )
    net = functools.partial(
        pdeqx.arch.ConvNet, activation=relu, boundary_mode="periodic", key=KEY
    )
    conv = net(1, 1, 1, hidden_channels=32, depth=10)
    res = pdeqx.arch.ClassicResNet(
        1,
        1,
        1,
        hidden_channels=32,
        num_blocks=5,
        activation=relu,
        boundary_mode="periodic",
        key=KEY,
    )
    for r, n in ((1, 1500), (5, 150)):
        out.append(
            Row(f"conv net 1D, {r} steps", ks, conv, *hand.convs(conv, 1), r, 20, n)
        )
        out.append(
            Row(f"residual net 1D, {r} steps", ks, res, *hand.residual(), r, 20, n)
        )
    conv2d = net(2, 1, 1, hidden_channels=16, depth=4)
    out.append(Row("conv net 2D", flow, conv2d, *hand.convs(conv2d, 2), 1, 8, 1500))
    fno = pdeqx.arch.ClassicFNO(
        1,
        1,
        1,
        num_modes=12,
        hidden_channels=18,
        num_blocks=4,
        activation=jax.nn.gelu,
        boundary_mode="periodic",
        key=KEY,
    )
    out.append(Row("FNO 1D", ks, fno, hand.as_module(fno), None, 1, 20, 1500))
    unet = pdeqx.arch.ClassicUNet(
        1,
        1,
        1,
        hidden_channels=12,
        num_levels=2,
        activation=relu,
        boundary_mode="periodic",
        key=KEY,
    )
    out.append(Row("U-Net 1D", ks, unet, hand.as_module(unet), None, 1, 20, 1500))
    return out


def measure(row: Row, *, rounds: int) -> dict[str, Any]:
    """Medians of seconds per update, ratios, first calls, and what was chosen."""
    optimizer = optax.adam(1e-3)

    def ours(program: str, updates: int) -> tuple[Any, Callable[[], Any]]:
        trainer = tx.trainer.SupervisedTrainer(
            row.data,
            num_rollout_steps=row.rollout,
            optimizer=optimizer,
            num_training_steps=updates,
            batch_size=row.batch_size,
            program=program,
            progress=False,
        )
        return trainer, lambda: trainer(row.model, key=KEY)[1].loss

    trainer, chosen = ours("auto", row.updates)
    runs = {"trainer": chosen, "trainax": _peer(row, optimizer)}
    first = {name: harness.first_call(run) for name, run in runs.items()}
    count = {"trainer": row.updates, "trainax": row.peer_updates}
    by_hand = hand.by_hand(row, optimizer)
    for name in by_hand:
        is_loop = name.startswith("loop")
        count[name] = row.loop_updates if is_loop else row.scan_updates
    form = "written out" if row.rollout == 1 else "scanned"
    first["scan by hand"] = harness.first_call(by_hand[f"scan, time {form}"])
    # The same trainer with the choice taken from it.
    count |= {"forced loop": row.loop_updates, "forced scan": row.updates}
    for family in ("loop", "scan"):
        name = f"forced {family}"
        runs[name] = ours(family, count[name])[1]
        first[name] = harness.first_call(runs[name])
    seconds = harness.interleaved(runs | by_hand, rounds=rounds)
    per = {name: [s / count[name] for s in seconds[name]] for name in seconds}
    medians = harness.medians(per)
    # What was run for fewer updates goes on at its rate.
    whole = {
        name: first[name] + medians[name] * (row.updates - count[name])
        for name in ("trainer", "trainax", "forced loop", "forced scan")
    }
    fastest = min(by_hand, key=medians.get)
    forced = min(("forced loop", "forced scan"), key=medians.get)
    return {
        "updates": row.updates,
        "medians": medians,
        "first": whole | {"scan by hand": first["scan by hand"]},
        "fastest": fastest,
        "to_best": harness.ratio(per, fastest, "trainer"),
        "to_trainax": harness.ratio(per, "trainax", "trainer"),
        "forced": forced.removeprefix("forced "),
        "to_forced": harness.ratio(per, forced, "trainer"),
        "choice": trainer.engine.choice.family,
        "reason": trainer.engine.choice.reason,
        "choosing": trainer.engine.choice.seconds_spent,
    }


def progress_bar(row: Row, *, rounds: int) -> list[float]:
    """Quartiles of the time with a progress bar relative to that without."""
    trainers = {
        shown: tx.trainer.SupervisedTrainer(
            row.data,
            num_rollout_steps=row.rollout,
            optimizer=optax.adam(1e-3),
            num_training_steps=row.updates,
            batch_size=row.batch_size,
            progress=shown,
        )
        for shown in (True, False)
    }
    seconds = harness.interleaved(
        {
            str(shown): functools.partial(trainer, row.model, key=KEY)
            for shown, trainer in trainers.items()
        },
        rounds=rounds,
    )
    pairs = zip(seconds["True"], seconds["False"], strict=True)
    return statistics.quantiles((a / b for a, b in pairs), n=4)


def _peer(row: Row, optimizer: Any) -> Callable[[], Any]:
    trainer = ta.trainer.SupervisedTrainer(
        row.data,
        num_rollout_steps=row.rollout,
        optimizer=optimizer,
        num_training_steps=row.peer_updates,
        batch_size=row.batch_size,
    )
    # Windows are stacked and permuted once here, as they are in one long run.
    stacker = trainer.trajectory_sub_stacker
    mixer = ta.PermutationMixer(
        stacker.num_total_samples, row.peer_updates, row.batch_size, KEY
    )
    update = eqx.filter_jit(trainer.step_fn)
    opt_state = optimizer.init(eqx.filter(row.model, eqx.is_array))

    def run() -> Any:
        model, state, losses = row.model, opt_state, []
        for i in range(row.peer_updates):
            indices, _ = mixer(i, return_info=True)
            model, state, loss = update(model, state, stacker(indices))
            losses.append(loss)
        return jnp.array(losses)

    return run


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


if __name__ == "__main__":
    main()
