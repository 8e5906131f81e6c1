"""Does a cache ten times larger than the memory of its process get made and trained on?

A process of its own may hold 512 MiB, Python, JAX and compiled programs included. It
simulates 5 GiB of 2D fields into a cache (zarr), then trains a convolution on windows of
all of them in a full shuffle. Peaks are those of the kernel (VmHWM).

Run: python -m benchmarks.data_memory [--limit 512] [--factor 10] [--updates 1000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import optax

import trainax_pk as tx
from benchmarks._data_cases import CASES
from benchmarks._harness import report, table

# What a simulation and a stream may hold of the data; the rest is the program's.
SIMULATION, STREAM = 2**25, 2**26
BATCH_SIZE = 256


def peak():
    """Most bytes that this process ever held."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return 1024 * int(lines["VmHWM"].split()[0])


def measure(folder, nbytes, num_updates):
    """In a process of its own: peaks and seconds after each stage."""
    stages = []

    def stage(name, began):
        stages.append([name, peak(), time.perf_counter() - began])

    began = time.perf_counter()
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    stage("Python, JAX", began)
    model, prior, _, num_steps = CASES["2D PDE"]()
    row_bytes = 4 * 32 * 32 * (num_steps + 1)
    source = tx.data.SimulationDataset(
        model, prior, nbytes // row_bytes, num_steps=num_steps, block_size=32,
        memory_budget=SIMULATION,
    )  # fmt: skip
    cached = tx.data.CachedDataset(source, folder, memory_budget=STREAM)
    began = time.perf_counter()
    cached.generate()
    stage("generated", began)
    net = eqx.nn.Conv2d(
        1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=jax.random.key(0)
    )
    trainer = tx.trainer.SupervisedTrainer(
        cached, optimizer=optax.adam(1e-2), num_training_steps=num_updates,
        batch_size=BATCH_SIZE, progress=False,
    )  # fmt: skip
    began = time.perf_counter()
    _, history = trainer(net, key=jax.random.key(1))
    loss = history.loss
    share = num_updates * BATCH_SIZE / len(trainer.windows)
    stage(f"trained, {num_updates} updates, {share:.2f} epochs", began)
    return {
        "nbytes": cached.nbytes,
        "residency": trainer.windows.residency,
        "stages": stages,
        "loss": [float(loss[0]), float(loss[-1])],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=512, help="MiB of the process")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--child", help="folder of the cache; prints JSON")
    options = parser.parse_args()
    nbytes = int(options.factor * options.limit * 2**20)
    if options.child:
        print(json.dumps(measure(options.child, nbytes, options.updates)))
        return
    arguments = ["--limit", str(options.limit), "--factor", str(options.factor)]
    arguments += ["--updates", str(options.updates)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.data_memory",
                "--child",
                folder,
                *arguments,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    rows = [
        [name, f"{size / 2**20:.0f}", f"{seconds:.0f}"]
        for name, size, seconds in found["stages"]
    ]
    most = max(size for _, size, _ in found["stages"])
    met = most <= options.limit * 2**20 and found["residency"] == "disk"
    note = (
        f"Data: {found['nbytes'] / 2**20:.0f} MiB. Memory budget of the simulation "
        f"{SIMULATION // 2**20} MiB, of the cache {STREAM // 2**20} MiB. Loss of the first "
        f"and the last update: {found['loss'][0]:.3g}, {found['loss'][1]:.3g}."
    )
    body = "\n\n".join([note, table(["stage", "peak so far, MiB", "s"], rows)])
    verdict = (
        f"Peak {most / 2**20:.0f} of {options.limit} MiB: {'met' if met else 'MISSED'}."
    )
    report("data_memory", __doc__.splitlines()[0], body, verdict)


if __name__ == "__main__":
    main()
