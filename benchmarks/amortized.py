"""How fast are conditional flows trained, beside the tools that people use?

Two questions. Seconds per epoch against `flowjax.train.fit_to_data`, for the same flow,
pairs, batch size, optimizer and held-out share: the difference between a long and a short
run divided by their difference in epochs. `fit_to_data` gets the same optimizer and loss
objects at every call, without which it would compile anew each time: compilation counts
for neither. And seconds from the call to a held-out negative
log-likelihood, compilation included, against the trainers of sbi (PyTorch) and sbijax, for
an affine masked autoregressive flow of 5 layers of 2 × 50 units, 9000 pairs in batches of
200, Adam at 5e-4; the loss is what all that are named reach, of which compilation is most
of the seconds where it is high. These two run in environments of their own, whose Pythons
are named; sbijax 0.3.4 wants an old JAX (jax 0.4.33, flax 0.8.5, optax 0.2.3, chex
0.1.87, dm-haiku 0.0.12, lineax 0.0.5, equinox 0.11.8, matplotlib 3.9.2).

Run: python -m benchmarks.amortized [--rounds 5] [--sbi <python>] [--sbijax <python>]
     [--peers-only]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.train import fit_to_data
from flowjax.train.losses import MaximumLikelihoodLoss

import trainax_pk as tx
from benchmarks._harness import report, table

A = tx.amortized
NUM_PAIRS, NUM_HELD_OUT, SHORT, LONG = 10_000, 5000, 2, 12
RATE, MOST_EPOCHS = 5e-4, 40
OBJECTS = optax.adam(RATE), MaximumLikelihoodLoss()
MAF, COUPLING = A.masked_autoregressive_flow, A.coupling_flow
CASES = {
    "affine MAF, 2 layers, batch 50": (MAF, {"num_layers": 2, "width": 16}, 50),
    "affine MAF, 2 layers, batch 200": (MAF, {"num_layers": 2, "width": 16}, 200),
    "affine MAF, 5 layers, batch 200": (MAF, {"num_layers": 5, "width": 50}, 200),
    "autoregressive spline, 5 layers, batch 200": (
        MAF, {"num_layers": 5, "width": 50, "transformer": "spline"}, 200,
    ),
    "coupling spline, 5 layers, batch 200": (
        COUPLING, {"num_layers": 5, "width": 50}, 200,
    ),
}  # fmt: skip


def pairs(num):
    """Pairs of a nonlinear problem, θ of 4 entries and x of 8, standardised."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 8))
    theta = rng.normal(size=(num, 4))
    x = np.tanh(theta @ mixing) + 0.3 * rng.normal(size=(num, 8))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.float32(theta), np.float32(x)


def make_trainer(kept, held_out, batch_size, num_epochs, threshold=None):
    """A trainer of so many epochs, or until a held-out loss."""
    per_epoch = len(kept[0]) // batch_size
    stop = tx.evaluation.EarlyStopping(
        "validation", patience=10**6, stopping_threshold=threshold
    )
    return tx.trainer.Trainer(
        tx.data.Samples(A.Pairs(*kept)),
        tx.configuration.AmortizedNLL(),
        optimizer=optax.adam(RATE),
        num_training_steps=per_epoch * num_epochs,
        batch_size=batch_size,
        callbacks=[
            tx.callback.Validation(
                tx.configuration.AmortizedNLL(),
                tx.data.Samples(A.Pairs(*held_out)),
                every=per_epoch,
                batch_size=min(1000, len(held_out[0])),
            )
        ],
        early_stopping=None if threshold is None else stop,
        progress=False,
    )


def ours(head, data, batch_size, num_epochs):
    """Our trainer, and the model it starts from: a function that returns the loss."""
    cut = NUM_PAIRS // 10
    held_out, kept = (tuple(x[s] for x in data) for s in (slice(cut), slice(cut, None)))
    trainer = make_trainer(kept, held_out, batch_size, num_epochs)
    model = A.AmortizedPosterior(A.IdentityEncoder(8), head)

    def run():
        _, history = trainer(model, key=jax.random.key(1))
        return history.records["validation"].values[-1]

    return run


def theirs(head, data, batch_size, num_epochs):
    """flowjax's loop of so many epochs."""
    arrays = tuple(jnp.asarray(x) for x in data)
    optimizer, loss_fn = OBJECTS

    def run():
        _, losses = fit_to_data(
            jax.random.key(1), head.distribution, arrays, optimizer=optimizer,
            loss_fn=loss_fn, max_epochs=num_epochs, max_patience=num_epochs,
            batch_size=batch_size, show_progress=False,
        )  # fmt: skip
        return losses["val"][-1]

    return run


def seconds(run):
    """Seconds of a call, and what it returned."""
    began = time.perf_counter()
    value = float(run())
    return time.perf_counter() - began, value


def size_of(model):
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def beside_flowjax(rounds):
    """Rows of the first table."""
    data, rows = pairs(NUM_PAIRS), []
    for name, (build, options, batch_size) in CASES.items():
        head = build(4, 8, depth=1, key=jax.random.key(0), **options)
        runs = {
            who: [make(head, data, batch_size, n) for n in (SHORT, LONG)]
            for who, make in (("ours", ours), ("flowjax", theirs))
        }
        for short, long in runs.values():
            short(), long()
        epochs = {"ours": [], "flowjax": []}
        held_out = {}
        for _ in range(rounds):
            for who, (short, long) in runs.items():
                brief, _ = seconds(short)
                total, held_out[who] = seconds(long)
                epochs[who].append((total - brief) / (LONG - SHORT))
        ratio = np.median(np.divide(epochs["flowjax"], epochs["ours"]))
        rows.append(
            [name, size_of(head), f"{1e3 * np.median(epochs['ours']):.1f}",
             f"{1e3 * np.median(epochs['flowjax']):.1f}", f"{ratio:.2f}",
             f"{held_out['ours']:.2f}", f"{held_out['flowjax']:.2f}"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def peer(python, who, folder, *extra):
    """What the other tool's trainer needed, in an environment of its own."""
    script = Path(__file__).with_name("_amortized_peers.py")
    out = Path(folder) / f"{who}.json"
    places = [who, str(Path(folder) / "pairs.npz"), str(out), str(MOST_EPOCHS)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [python, str(script), *places, *map(str, extra)], check=True, env=environment,
        cwd=folder, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(out.read_text())


def _apart():
    """Pairs to train on, and pairs that judge all tools."""
    theta, x = pairs(NUM_PAIRS + NUM_HELD_OUT)
    parts = (slice(NUM_PAIRS), slice(NUM_PAIRS, None))
    return ((theta[part], x[part]) for part in parts)


def until(threshold):
    """Seconds of our trainer from nothing until a held-out loss; epochs; parameters.

    To be called in a process of its own: programs that are compiled already would count
    for nothing. The others hold out a tenth of their pairs: ours trains on nine, too.
    """
    given, held_out = _apart()
    kept = tuple(x[NUM_PAIRS // 10 :] for x in given)
    head = MAF(4, 8, width=50, depth=2, activation=jnp.tanh, key=jax.random.key(0))
    model = A.AmortizedPosterior(A.IdentityEncoder(8), head)
    began = time.perf_counter()
    trainer = make_trainer(kept, held_out, 200, MOST_EPOCHS, threshold)
    _, history = trainer(model, key=jax.random.key(1))
    step, loss = history.best["validation"]
    return {
        "seconds": time.perf_counter() - began, "epochs": step // (len(kept[0]) // 200),
        "loss": loss, "parameters": size_of(head),
    }  # fmt: skip


def to_a_loss(pythons, rounds):
    """Rows of the second table, and the loss that all of them reached."""
    (theta, x), held_out = _apart()
    best = until(-1e9)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            Path(folder) / "pairs.npz", theta=theta, x=x,
            held_theta=held_out[0], held_x=held_out[1],
        )  # fmt: skip
        first = {who: peer(python, who, folder) for who, python in pythons.items()}
        reached = [min(loss for _, loss in r["curve"]) for r in first.values()]
        threshold = max(best["loss"], *reached) + 0.01
        taken = {who: [] for who in ("ours", *pythons)}
        epochs, sizes = {}, {"ours": best["parameters"]}
        for _ in range(rounds):
            command = [sys.executable, "-m", "benchmarks.amortized", "--until"]
            out = subprocess.run(
                [*command, str(threshold)], check=True, capture_output=True, text=True
            )
            result = json.loads(out.stdout.splitlines()[-1])
            taken["ours"].append(result["seconds"])
            epochs["ours"] = result["epochs"]
            for who, python in pythons.items():
                result = peer(python, who, folder, threshold)
                sizes[who] = result["parameters"]
                if "seconds" in result:
                    taken[who].append(result["seconds"])
                    epochs[who] = result["epochs"]
                    continue
                there = [
                    i for i, (_, v) in enumerate(result["curve"]) if v <= threshold
                ]
                taken[who].append(result["curve"][there[0]][0])
                epochs[who] = there[0] + 1
    rows = [
        [who, sizes[who], epochs[who], f"{np.median(taken[who]):.2f}",
         f"{np.median(taken[who]) / np.median(taken['ours']):.2f}"]
        for who in taken
    ]  # fmt: skip
    return rows, threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sbi", help="a Python that has sbi")
    parser.add_argument("--sbijax", help="a Python that has sbijax")
    parser.add_argument(
        "--peers-only", action="store_true", help="without flowjax; a report of its own"
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.until is not None:
        sys.stdout.write(json.dumps(until(arguments.until)) + "\n")
        return
    pythons = {"sbi": arguments.sbi, "sbijax": arguments.sbijax}
    pythons = {who: python for who, python in pythons.items() if python}
    parts = [
        f"{NUM_PAIRS} pairs, θ of 4 entries, x of 8; medians of {arguments.rounds} "
        "rounds, interleaved."
    ]
    if not arguments.peers_only:
        parts.append(
            table(
                ["flow", "parameters", "ms per epoch", "flowjax", "ratio",
                 f"held-out NLL after {LONG} epochs", "flowjax"],
                beside_flowjax(arguments.rounds),
            )
        )  # fmt: skip
    if pythons:
        rows, threshold = to_a_loss(pythons, arguments.rounds)
        parts += [
            f"To a held-out NLL of {threshold:.3f}, from the first call:",
            table(["trainer", "parameters", "epochs", "seconds", "ratio"], rows),
        ]
    peers = ["flowjax"][arguments.peers_only :] + [*pythons]
    report(
        "amortized",
        f"Training of conditional flows beside {', '.join(peers)}",
        "\n\n".join(parts),
        part="_".join(pythons) if arguments.peers_only else "",
    )


if __name__ == "__main__":
    main()
