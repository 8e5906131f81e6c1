"""Weak scaling: what does an update cost on n devices with n times the batch?

Processes of one core each (JAX's distributed runtime, gloo over loopback) train networks
of two sizes; each adds its batch to that of the others. Beside the measured time stands
what docs/scale.md expects of it: the time of one process, and 2 (n - 1) / n · G / b for
the sum of the gradients, with G their bytes and b the speed of the link as measured in
the same processes by summing an array of that size. Losses are compared with those of
one process on the same batches.

Run: python -m benchmarks.scaling [--rounds 3]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

from benchmarks._harness import report, table

CASES = {"MLP 64 x 3": (64, 3, 256), "MLP 512 x 3": (512, 3, 256)}
# The same for all: how long a chunk is must not depend on their number.
UPDATES = {"MLP 64 x 3": 100, "MLP 512 x 3": 20}
_REPEATS = 3


def launch(count, case):
    """Reports of `count` processes, each on a core of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.scaling", "--child"]
    children = [
        subprocess.Popen(
            [*command, str(i), str(count), str(port), case], stdout=subprocess.PIPE
        )
        for i in range(count)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a process has failed")
    # Gloo says on the same stream that it has connected.
    return [json.loads(out.splitlines()[-1]) for out in outputs]


def child(index, count, port, case):
    """One process: times of an update and of a sum, and the losses."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    # After the choice of the core, which its threads inherit.
    import jax  # noqa: PLC0415

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    sys.stdout.write(json.dumps(measure(jax, case)))


def measure(jax, case):
    """What one process sees."""
    import equinox as eqx  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    import optax  # noqa: PLC0415

    import trainax_pk as tx  # noqa: PLC0415

    width, depth, batch = CASES[case]
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",))
    data = np.random.default_rng(0).normal(size=(64, 101, 16)).astype(np.float32)

    def train(mesh, batch, updates):
        trainer = tx.trainer.SupervisedTrainer(
            data,
            optimizer=optax.adam(1e-3),
            num_training_steps=updates,
            batch_size=batch,
            mesh=mesh,
            program="scan",
            progress=False,
        )
        model = eqx.nn.MLP(16, 16, width, depth, key=jax.random.key(1))
        return lambda: trainer(model, key=jax.random.key(2))[1]

    run = train(mesh, batch * count, UPDATES[case])
    history = run()
    params = jax.tree.leaves(history.state.params)
    size = sum(x.size for x in params)
    alone = train(None, batch * count, 20)().loss
    difference = np.max(np.abs(np.asarray(history.loss)[:20] / np.asarray(alone) - 1))
    return {
        "update": repeat(lambda: jax.block_until_ready(run().loss)) / UPDATES[case],
        "sum": repeat(summing(jax, mesh, size)) if count > 1 else 0.0,
        "bytes": 4 * size,
        "difference": float(difference),
    }


def summing(jax, mesh, size):
    """Sums as many float32 as the gradient has over the devices of a mesh."""
    import jax.numpy as jnp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    spec = jax.sharding.PartitionSpec
    split = jax.sharding.NamedSharding(mesh, spec("data"))
    shape = (mesh.size, size)
    x = jax.make_array_from_callback(
        shape, split, lambda i: np.ones((1, size), np.float32)
    )
    whole = jax.sharding.NamedSharding(mesh, spec())
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    return lambda: jax.block_until_ready(total(x))


def repeat(work):
    """Median seconds, after a first time."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rows_of(case, counts, rounds):
    """Medians over rounds in which the numbers of processes take turns."""
    found = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            found[count].append(launch(count, case))

    def middle(count, name):
        # The slowest process is what all wait for.
        return statistics.median(max(r[name] for r in rs) for rs in found[count])

    one, rows = middle(1, "update"), []
    for count in counts:
        update, total = middle(count, "update"), middle(count, "sum")
        gradient = found[count][0][0]["bytes"]
        moved = 2 * (count - 1) / count * gradient
        rows.append(
            [
                case,
                count,
                CASES[case][2] * count,
                f"{1e3 * update:.3f}",
                f"{one / update:.2f}",
                f"{gradient / 1e6:.2f}",
                f"{moved / total / 1e9:.2f}" if total else "",
                f"{1e3 * (one + total):.3f}",
                f"{middle(count, 'difference'):.1e}",
            ]
        )
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        index, count, port, case = options.child
        child(int(index), int(count), port, case)
        return
    counts = list(range(1, len(os.sched_getaffinity(0)) + 1))
    rows = [row for case in CASES for row in rows_of(case, counts, options.rounds)]
    titles = [
        "network",
        "processes",
        "batch",
        "update, ms",
        "efficiency",
        "gradient, MB",
        "link, GB/s",
        "expected, ms",
        "loss, relative difference",
    ]
    body = [
        f"One core for each process; medians of {options.rounds} rounds of {_REPEATS} "
        "runs. Efficiency is the time of one process over that of n.",
        table(titles, rows),
    ]
    question = "Weak scaling: what does an update cost on n devices with n batches?"
    report("scaling", question, "\n\n".join(body))


if __name__ == "__main__":
    main()
