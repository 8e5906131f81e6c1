"""Are simulated datasets made, written and read as fast as by hand?

Generation: `SimulationDataset[:]` against a jitted, vmapped function called on blocks of
the same width, with its results copied to one array, and against a loop over single
samples. Storage: `CachedDataset` of an array in memory against zarr's own bulk write and
read of the same array with the same codec.

Run: python -m benchmarks.data_speed [--rounds 5]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import zarr

import trainax_pk as tx
from benchmarks._harness import interleaved, medians, ratio, report, table

DT = 0.01


def lorenz():
    stepper = tx.sample_data.make_lorenz_63_stepper(DT)
    prior = tx.data.Normal(jnp.array([0.0, 0.0, 25.0]), 5.0)
    return tx.data.StepperModel(stepper, dt=DT), prior, 16384, 100


def oscillator():
    def field(t, y, args):
        x, v = y
        return jnp.stack([v, (1 - x**2) * v - x])

    controller = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    model = tx.data.DiffraxModel(
        field, diffrax.Tsit5(), dt=0.5, stepsize_controller=controller
    )
    return model, tx.data.BoxUniform([-2.0, -2.0], [2.0, 2.0]), 4096, 10


def diffusion():
    stepper = tx.sample_data.make_advection_diffusion_2d_stepper(num_points=32)
    prior = tx.data.FourierField(32, num_space_axes=2)
    return tx.data.StepperModel(stepper, dt=1.0), prior, 256, 20


CASES = {"Lorenz 63": lorenz, "diffrax, Van der Pol": oscillator, "2D PDE": diffusion}


def by_hand(model, prior, num_samples, num_steps, width):
    """What one would write: a scan under vmap under jit, block after block."""

    @jax.jit
    def block(keys):
        def one(key):
            u = prior.sample(key)
            step = lambda u, _: (model.step(u, model.dt), u)  # noqa: E731
            return u, jax.lax.scan(step, u, None, length=num_steps + 1)[1]

        return jax.vmap(one)(keys)

    def run():
        keys = jax.random.split(jax.random.key(0), num_samples)
        blocks = [block(keys[i : i + width]) for i in range(0, num_samples, width)]
        return jax.tree.map(lambda *x: np.concatenate(x), *blocks)

    return run


def one_by_one(model, prior, num_steps):
    """Sample by sample and step by step, the step compiled."""
    step = jax.jit(lambda u: model.step(u, model.dt))

    def run():
        for i in range(2):
            u = prior.sample(jax.random.key(i))
            states = [u]
            for _ in range(num_steps):
                states.append(step(states[-1]))
            np.stack(states)

    return run


def generation(rounds):
    rows = []
    for name, build in CASES.items():
        model, prior, num_samples, num_steps = build()
        dataset = tx.data.SimulationDataset(
            model, prior, num_samples, num_steps=num_steps
        )
        width = dataset.block_size
        runs = {
            "dataset": lambda d=dataset: d[:],
            "by hand": by_hand(model, prior, num_samples, num_steps, width),
        }
        if name == "Lorenz 63":
            runs["one by one"] = one_by_one(model, prior, num_steps)
        seconds = interleaved(runs, rounds=rounds)
        times = medians(seconds)
        single = times.get("one by one")
        speed_up = single / 2 / (times["dataset"] / num_samples) if single else None
        rows.append(
            [
                name,
                f"{num_samples} x {num_steps}",
                width,
                f"{times['dataset']:.3f}",
                f"{times['by hand']:.3f}",
                f"{ratio(seconds, 'by hand', 'dataset'):.2f}",
                f"{speed_up:.0f}" if speed_up else "",
            ]
        )
    header = ["case", "samples x steps", "width", "dataset / s", "by hand / s"]
    return table([*header, "speed relative to by hand", "to one by one"], rows)


class InMemory:
    """An array as a source."""

    block_size = 1

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return self.array[rows]

    def with_split(self, split):
        return self

    def content_hash(self):
        return "benchmark" + 60 * "0"


def bulk(folder, array, chunk):
    shutil.rmtree(folder, ignore_errors=True)
    codec = zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
    stored = zarr.create_array(
        folder, shape=array.shape, dtype=array.dtype, compressors=[codec],
        chunks=(chunk, *array.shape[1:]),
    )  # fmt: skip
    stored[:] = array


def storage(rounds):
    model, prior, _, _ = lorenz()
    dataset = tx.data.SimulationDataset(model, prior, 65536, num_steps=200)
    array = dataset[:][1]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cached = tx.data.CachedDataset(InMemory(array), folder / "cache")

        def write():
            cached.invalidate()
            cached.generate()

        # About 1 and 8 MiB: the faster is what a careful user would have found.
        chunks = (512, 4096)
        runs = {"cache": write}
        for chunk in chunks:
            runs[f"bulk {chunk}"] = lambda c=chunk: bulk(folder / f"bulk{c}", array, c)
        seconds = interleaved(runs, rounds=rounds)
        rows.append(_row("write", array, seconds))
        runs = {"cache": lambda: cached[:]}
        for chunk in chunks:
            opened = zarr.open_array(folder / f"bulk{chunk}", mode="r")
            runs[f"bulk {chunk}"] = lambda z=opened: z[:]
        rows.append(_row("read", array, interleaved(runs, rounds=rounds)))
    header = ["", "MiB", "cache / s", "bulk zarr, best chunk / s", "relative speed"]
    return table(header, rows)


def _row(name, array, seconds):
    times = medians(seconds)
    best = min((n for n in times if n != "cache"), key=times.get)
    return [
        name,
        array.nbytes // 2**20,
        f"{times['cache']:.2f}",
        f"{times[best]:.2f} ({best})",
        f"{ratio(seconds, best, 'cache'):.2f}",
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    body = "\n\n".join(
        ["## Generation", generation(rounds), "## Storage (zarr)", storage(rounds)]
    )
    report("data_speed", __doc__.splitlines()[0], body)


if __name__ == "__main__":
    main()
