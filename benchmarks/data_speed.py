"""Are simulated datasets made, stored and trained on as fast as by hand?

Generation: `SimulationDataset[:]` against a jitted, vmapped function called on blocks of
the same width, with its results copied to one array, and against a loop over single
samples. Storage: `CachedDataset` of an array in memory against zarr's own bulk write and
read of the same array with and without lz4, and against the bytes of the array in one file.
The cache is on the disk when it is written, and so is the one file; zarr leaves that to the
kernel, so its writes are timed as they are and with a sync of their files. Streaming: a
trainer on a cache through a memory budget of a tenth of the data against the same trainer
on the data in memory, whole runs of compiled programs; the perceptron is the worst case
there is, an update of 50 µs on windows of 24 bytes out of pieces of 64 KiB. On the fly:
simulations made inside the training step against the same number simulated first and
trained on then.

Run: python -m benchmarks.data_speed [--rounds 5] [--only PART]
"""

import argparse
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import zarr

import trainax_pk as tx
from benchmarks._data_cases import CASES, InMemory, lorenz
from benchmarks._harness import interleaved, medians, ratio, report, table

# Samples of 2.4 KiB that are stored: about 150 and 600 MiB.
STORED = (2**16, 2**18)


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
    rows, shown = [], []
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
        share = ratio(seconds, "by hand", "dataset")
        shown.append((f"generation, {name}, to the loop by hand", share, 0.95))
        if speed_up:
            shown.append((f"generation, {name}, to one by one", speed_up, 500))
        rows.append(
            [
                name,
                f"{num_samples} x {num_steps}",
                width,
                f"{times['dataset']:.3f}",
                f"{times['by hand']:.3f}",
                f"{share:.2f}",
                f"{speed_up:.0f}" if speed_up else "",
            ]
        )
    header = ["case", "samples x steps", "width", "dataset / s", "by hand / s"]
    return table([*header, "speed relative to by hand", "to one by one"], rows), shown


def bulk(folder, array, chunk, codec):
    shutil.rmtree(folder, ignore_errors=True)
    lz4 = zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
    stored = zarr.create_array(
        folder, shape=array.shape, dtype=array.dtype,
        compressors=[lz4] if codec == "lz4" else None,
        chunks=(chunk, *array.shape[1:]),
    )  # fmt: skip
    stored[:] = array


def sync_all(folder):
    """What a loss of power could take is on the disk afterwards."""
    for path in sorted(Path(folder).rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def bulk_synced(folder, array, chunk, codec):
    bulk(folder, array, chunk, codec)
    sync_all(folder)


def plain(path, array):
    with path.open("wb") as file:
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def storage(rounds):
    rows = [row for count in STORED for row in _stored(count, rounds)]
    header = ["", "MiB", "cache / s", "bulk zarr, best chunk / s", "and synced / s"]
    header += ["one plain file, synced / s"]
    # A cache is on the disk when it is written: so is what a write is compared with.
    shown = [
        (
            f"zarr {row[0]}, {row[1]} MiB, to bulk zarr or the disk",
            max(float(x) for x in row[-2 if row[0] == "write" else -3 :] if x != "–"),
            0.8,
        )
        for row in rows
    ]
    header += ["speed relative to bulk zarr", "to it, synced", "to the plain file"]
    return table(header, rows), shown


def _stored(num_samples, rounds):
    """Rows of the table for trajectories of so many samples."""
    model, prior, _, _ = lorenz()
    dataset = tx.data.SimulationDataset(model, prior, num_samples, num_steps=200)
    # Of JAX, as simulations are; what its source could write to is copied first.
    array = np.asarray(jnp.asarray(dataset[:][1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cached = tx.data.CachedDataset(InMemory(array), folder / "cache")

        def write():
            cached.invalidate()
            cached.generate()

        # About 1 and 8 MiB, compressed and not: the fastest is what a careful user would
        # have found.
        forms = list(itertools.product((512, 4096), ("lz4", "raw")))
        runs = {"cache": write, "plain": lambda: plain(folder / "plain", array)}
        for form in forms:
            runs["bulk {} {}".format(*form)] = lambda f=form: bulk(
                folder / "bulk{}{}".format(*f), array, *f
            )
            runs["synced {} {}".format(*form)] = lambda f=form: bulk_synced(
                folder / "synced{}{}".format(*f), array, *f
            )
        # What one leaves to be written later must not slow the next one down.
        seconds = interleaved(runs, rounds=rounds, before=os.sync)
        yield _row("write", array, seconds)
        runs = {
            "cache": lambda: cached[:],
            "plain": lambda: np.fromfile(folder / "plain", np.float32),
        }
        for form in forms:
            opened = zarr.open_array(folder / "bulk{}{}".format(*form), mode="r")
            runs["bulk {} {}".format(*form)] = lambda z=opened: z[:]
        yield _row("read", array, interleaved(runs, rounds=rounds))


def _row(name, array, seconds):
    times = medians(seconds)
    forms = {
        kind: min((n for n in times if n.startswith(kind)), key=times.get, default=None)
        for kind in ("bulk", "synced", "plain")
    }
    cells = [f"{times['cache']:.3f}"]
    cells += [f"{times[n]:.3f} ({n})" if n else "–" for n in forms.values()]
    shares = [f"{ratio(seconds, n, 'cache'):.2f}" if n else "–" for n in forms.values()]
    return [name, array.nbytes // 2**20, *cells, *shares]


class Net(eqx.Module):
    """A small convolutional net that adds to the state."""

    layers: list

    def __init__(self, num_space_axes, width, *, key):
        conv = [None, eqx.nn.Conv1d, eqx.nn.Conv2d][num_space_axes]
        widths = (1, width, width, width, 1)
        self.layers = [
            conv(a, b, 5, padding="SAME", padding_mode="CIRCULAR", key=k)
            for a, b, k in zip(
                widths[:-1], widths[1:], jax.random.split(key, 4), strict=True
            )
        ]

    def __call__(self, u):
        x = u
        for layer in self.layers[:-1]:
            x = jax.nn.gelu(layer(x))
        return u + self.layers[-1](x)


class Step(eqx.Module):
    """A multilayer perceptron that adds to the state."""

    mlp: eqx.nn.MLP

    def __call__(self, u):
        return u + self.mlp(u)


def perceptron():
    return Step(eqx.nn.MLP(3, 3, 32, 3, key=jax.random.key(0)))


def trainer_of(data, num_updates, batch_size, **options):
    return tx.trainer.SupervisedTrainer(
        data, optimizer=optax.adam(1e-3), num_training_steps=num_updates,
        batch_size=batch_size, progress=False, **options,
    )  # fmt: skip


def streams():
    """Name, data, model, updates, batch size, program."""
    build = CASES["2D PDE"]
    model, prior, _, num_steps = build()
    fields = tx.data.SimulationDataset(model, prior, 2048, num_steps=num_steps)
    yield (
        "2D conv net, 32 x 32",
        fields[:][1],
        Net(2, 16, key=jax.random.key(0)),
        30,
        32,
    )
    stepper = tx.sample_data.make_kuramoto_sivashinsky_1d_stepper(num_points=160)
    waves = tx.data.SimulationDataset(
        tx.data.StepperModel(stepper, dt=1.0), tx.data.FourierField(160), 512,
        num_steps=200,
    )  # fmt: skip
    yield "1D conv net, 160", waves[:][1], Net(1, 56, key=jax.random.key(0)), 150, 20
    model, prior, _, _ = lorenz()
    states = tx.data.SimulationDataset(model, prior, 32768, num_steps=100)
    yield "Lorenz 63, perceptron", states[:][1], perceptron(), 8000, 64


def streaming(rounds):
    rows, shown = [], []
    for name, array, model, num_updates, batch_size in streams():
        with tempfile.TemporaryDirectory() as folder:
            cached = tx.data.CachedDataset(
                InMemory(array, array.shape[1]),
                folder,
                memory_budget=array.nbytes // 10,
            )
            cached.generate()
            runs, programs = {}, {}
            for residency in ("device", "disk"):
                trainer = trainer_of(
                    cached, num_updates, batch_size, residency=residency,
                    program="scan" if "Lorenz" in name else "loop",
                )  # fmt: skip

                def run(trainer=trainer, residency=residency):
                    _, history = trainer(model, key=jax.random.key(1))
                    programs[residency] = history.program.split(":")[0]
                    return history.loss

                runs[residency] = run
            seconds = interleaved(runs, rounds=rounds)
        times = medians(seconds)
        share = ratio(seconds, "device", "disk")
        if "conv" in name:
            shown.append((f"streamed, {name}, to data in memory", share, 0.9))
        rows.append(
            [
                name,
                f"{array.nbytes / 2**20:.0f} / {array.nbytes / 10 / 2**20:.0f}",
                f"{num_updates} x {batch_size}",
                programs["disk"],
                f"{1e3 * times['device'] / num_updates:.3f}",
                f"{1e3 * times['disk'] / num_updates:.3f}",
                f"{share:.2f}",
            ]
        )
    header = ["case", "data / budget, MiB", "updates x batch", "program"]
    header += ["in memory, ms/update", "streamed, ms/update", "relative speed"]
    return table(header, rows), shown


def on_the_fly(rounds, num_updates=4000, batch_size=64):
    model, prior, _, _ = lorenz()
    options = {"num_steps": 1, "num_warmup_steps": 50}
    fresh = tx.data.SimulationDataset(model, prior, on_the_fly=True, **options)
    stored = tx.data.SimulationDataset(
        model, prior, num_updates * batch_size, **options
    )
    made_in_step = trainer_of(fresh, num_updates, batch_size)
    trained = trainer_of(tx.data.Trajectories(stored[:][1]), num_updates, batch_size)
    net = perceptron()
    runs = {
        "on the fly": lambda: made_in_step(net, key=jax.random.key(1))[1].loss,
        "simulate": lambda: jax.device_put(stored[:][1]),
        "train": lambda: trained(net, key=jax.random.key(1))[1].loss,
    }
    seconds = interleaved(runs, rounds=rounds)
    pairs = zip(seconds["simulate"], seconds["train"], strict=True)
    seconds["separately"] = [a + b for a, b in pairs]
    times = {n: 1e6 * t / num_updates for n, t in medians(seconds).items()}
    share = ratio(seconds, "separately", "on the fly")
    row = [
        f"{num_updates} x {batch_size}",
        f"{times['simulate']:.0f} + {times['train']:.0f}",
        f"{times['on the fly']:.0f}",
        f"{share:.2f}",
    ]
    header = ["updates x batch", "simulate + train, µs/update"]
    header += ["on the fly, µs/update", "relative speed"]
    return table(header, [row]), [("on the fly, Lorenz 63 emulator", share, 0.9)]


PARTS = {
    "Generation": generation,
    "Storage (zarr)": storage,
    "Streaming (full shuffle)": streaming,
    "On the fly": on_the_fly,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(PARTS), help="one part, no report")
    options = parser.parse_args()
    names = [options.only] if options.only else list(PARTS)
    bodies, verdicts = [], []
    for name in names:
        text, shown = PARTS[name](options.rounds)
        bodies.append(f"## {name}\n\n{text}")
        for what, value, needed in shown:
            met = "met" if value >= needed else "**missed**"
            verdicts.append(f"- {what}: {value:.3g} of at least {needed}: {met}.")
    body, conclusion = "\n\n".join(bodies), "\n".join(verdicts)
    if options.only:
        print(f"{body}\n\n{conclusion}")
    else:
        report("data_speed", __doc__.splitlines()[0], body, conclusion)


if __name__ == "__main__":
    main()
