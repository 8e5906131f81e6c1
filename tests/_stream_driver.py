"""Makes and trains on a cache ten times its memory budget; run as a script.

`python _stream_driver.py FOLDER BUDGET` prints a JSON report of peak memory. The rows are
made without JAX, so that they cost little time.
"""

import json
import sys

import equinox as eqx
import jax
import numpy as np
import optax

import trainax_pk as tx

TIMES, POINTS = 16, 256


class Waves:
    """Trajectories from a formula, of a size that is asked for."""

    num_times = TIMES
    is_parametric = False

    def __init__(self, num_rows):
        self.num_rows = num_rows
        self.element_spec = (
            jax.ShapeDtypeStruct((2,), np.float32),
            jax.ShapeDtypeStruct((TIMES, POINTS), np.float32),
        )

    def __len__(self):
        return self.num_rows

    def __getitem__(self, rows):
        i = np.arange(*rows.indices(self.num_rows), dtype=np.float32)[:, None]
        angle = i + np.arange(TIMES * POINTS, dtype=np.float32) / 100
        return np.hstack([i, i]), np.sin(angle).reshape(-1, TIMES, POINTS)

    def with_split(self, split):
        return self

    def content_hash(self):
        return "89abcdef01234567" * 4


def peak():
    """Most bytes of memory that this process ever had, and those it has now."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return [1024 * int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS")]


def train(data, num_steps, **options):
    model = eqx.nn.Linear(POINTS, POINTS, key=jax.random.key(0))
    trainer = tx.trainer.SupervisedTrainer(
        data, optimizer=optax.sgd(1e-3), num_training_steps=num_steps, batch_size=16,
        progress=False, **options,
    )  # fmt: skip
    return trainer, trainer(model, key=jax.random.key(1))[1]


def main():
    folder, budget = sys.argv[1], int(sys.argv[2])
    # What libraries and programs take is there before the large cache is begun.
    small = tx.data.CachedDataset(Waves(64), f"{folder}/small", memory_budget=budget)
    train(small, 200, residency="disk")
    source = Waves(10 * budget // (4 * TIMES * POINTS))
    before = peak()[1]
    cached = tx.data.CachedDataset(source, folder, memory_budget=budget)
    cached.generate()
    generated = peak()[0]
    trainer, history = train(cached, 200)
    report = {
        "nbytes": cached.nbytes,
        "residency": trainer.windows.residency,
        "generation": generated - before,
        "training": peak()[0] - before,
        "loss": [float(history.loss[0]), float(history.loss[-1])],
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
