"""What do rollout windows cost in memory?

python -m benchmarks.windows_memory [--quick]
"""

import argparse
import math
from typing import Any

import equinox as eqx
import jax
import optax
import trainax

import trainax_pk as tx
from benchmarks._harness import chunk_program, report, table

SHAPE = (50, 201, 1, 160)
BATCH_SIZE = 20
NUM_UPDATES = 1000
# Counters, losses and parameters.
SLACK = 0.02


def main() -> None:
    """Measures windows of several lengths and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small data, no report")
    args = parser.parse_args()
    shape = (8, 41, 1, 160) if args.quick else SHAPE
    lengths = (6, 21) if args.quick else (6, 21, 51)
    data = jax.random.normal(jax.random.key(0), shape)
    rows, verdicts = [], []
    for length in lengths:
        row, verdict = measure(data, length)
        rows.append(row)
        verdicts.append(verdict)
    header = (
        "times per window",
        "chunk: arguments / raw",
        "one batch, MiB",
        "update given its batch: temporaries, MiB",
        f"chunk of {NUM_UPDATES}: temporaries, MiB",
        "chunk: all / (raw + batch)",
        "chunk: all / (raw + batch + update + plan)",
        "trainax: stacked / raw",
    )
    note = (
        f"Data {shape}, single precision: {_mib(data.nbytes)} MiB raw. Batch of "
        f"{BATCH_SIZE}, linear convolution, Adam. The chunk is the trainer's program of "
        f"{NUM_UPDATES} updates, which shuffles, gathers and trains; arguments and "
        "temporaries are those of XLA's `memory_analysis()`. trainax: `nbytes` of what "
        "its `TrajectorySubStacker` keeps."
    )
    body = "\n\n".join([note, table(header, rows)])
    if args.quick:
        print(body, *verdicts, sep="\n")
    else:
        question = "Rollout windows: memory of gathering by index, and of stacking"
        report("windows_memory", question, body, "\n".join(verdicts))


def measure(data: jax.Array, length: int) -> tuple[list[Any], str]:
    """A row of the table, and what it means."""
    model = eqx.nn.Conv1d(
        1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=jax.random.key(1)
    )
    optimizer = optax.adam(1e-3)
    trainer = tx.trainer.SupervisedTrainer(
        data,
        num_rollout_steps=length - 1,
        optimizer=optimizer,
        num_training_steps=NUM_UPDATES,
        batch_size=BATCH_SIZE,
        progress=False,
    )
    chunk = chunk_program(trainer, model, NUM_UPDATES).compile().memory_analysis()
    state = tx.TrainState.create(model, optimizer, key=jax.random.key(2))
    batch = trainer.windows[:BATCH_SIZE]
    update = jax.jit(trainer.step_fn).lower(state, batch).compile().memory_analysis()
    batch_bytes = BATCH_SIZE * length * math.prod(data.shape[2:]) * data.itemsize
    everything = chunk.argument_size_in_bytes + chunk.temp_size_in_bytes
    plan_bytes = 4 * NUM_UPDATES * BATCH_SIZE
    expected = data.nbytes + batch_bytes + update.temp_size_in_bytes + plan_bytes
    stacked = trainax.TrajectorySubStacker(data, length).data_sub_trajectories.nbytes
    row = [
        length,
        f"{chunk.argument_size_in_bytes / data.nbytes:.4f}",
        _mib(batch_bytes),
        _mib(update.temp_size_in_bytes),
        _mib(chunk.temp_size_in_bytes),
        f"{everything / (data.nbytes + batch_bytes):.3f}",
        f"{everything / expected:.3f}",
        f"{stacked / data.nbytes:.1f}",
    ]
    met = "met" if everything <= (1 + SLACK) * expected else "**missed**"
    verdict = (
        f"- {length} times: raw data, one batch, what an update given its batch needs "
        f"(the states that backpropagation keeps), and the plan, to {SLACK:.0%}: {met}."
    )
    return row, verdict


def _mib(size: int) -> str:
    return f"{size / 2**20:.3f}"


if __name__ == "__main__":
    main()
