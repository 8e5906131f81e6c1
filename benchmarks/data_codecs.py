"""Which codec and which size of pieces should a cache have?

Codecs: blosc with lz4 and zstd at level 1, with bytes or bits shuffled, and none, on pieces
of 64 KiB of three simulations in single precision, one thread. Pieces: the whole store,
written, read in bulk and read at random, windows of two times out of trajectories of 2D
fields, for several sizes of pieces. The file system's cache is warm.

Run: python -m benchmarks.data_codecs [--rounds 5]
"""

import argparse
import tempfile

import numcodecs.blosc
import numpy as np

import trainax_pk as tx
from benchmarks._data_cases import CASES, InMemory
from benchmarks._harness import interleaved, medians, report, table
from trainax_pk.data import _zarr_store

PIECE = 2**16
CODECS = {
    "lz4, bytes shuffled": ("lz4", 1),
    "lz4, bits shuffled": ("lz4", 2),
    "zstd, bytes shuffled": ("zstd", 1),
    "zstd, bits shuffled": ("zstd", 2),
    "none": None,
}
SIZES = [2**14, 2**16, 2**18, 2**20]


def outputs():
    """Trajectories of each case, about 32 MiB."""
    for name, build in CASES.items():
        model, prior, num_samples, num_steps = build()
        dataset = tx.data.SimulationDataset(
            model, prior, num_samples, num_steps=num_steps
        )
        output = dataset[:][1]
        yield name, output[: max(1, 2**25 // output[0].nbytes)]


def codecs(rounds):
    rows = []
    for name, output in outputs():
        flat = output.reshape(-1)
        pieces = [flat[i : i + PIECE // 4] for i in range(0, len(flat), PIECE // 4)]
        coders = {
            codec: options and numcodecs.blosc.Blosc(options[0], 1, options[1])
            for codec, options in CODECS.items()
        }
        encoded = {
            codec: [p.tobytes() if coder is None else coder.encode(p) for p in pieces]
            for codec, coder in coders.items()
        }

        def encode(codec, coders=coders, pieces=pieces):
            coder = coders[codec]
            for piece in pieces:
                piece.tobytes() if coder is None else coder.encode(piece)

        def decode(codec, coders=coders, encoded=encoded):
            coder = coders[codec]
            for piece in encoded[codec]:
                np.frombuffer(piece if coder is None else coder.decode(piece), "f4")

        write = medians(
            interleaved({c: lambda c=c: encode(c) for c in CODECS}, rounds=rounds)
        )
        read = medians(
            interleaved({c: lambda c=c: decode(c) for c in CODECS}, rounds=rounds)
        )
        for codec in CODECS:
            stored = sum(map(len, encoded[codec]))
            rows.append(
                [
                    name,
                    codec,
                    f"{stored / flat.nbytes:.3f}",
                    f"{flat.nbytes / write[codec] / 1e6:.0f}",
                    f"{flat.nbytes / read[codec] / 1e6:.0f}" if coders[codec] else "",
                ]
            )
    header = ["case", "codec", "stored / raw", "encode, MB/s", "decode, MB/s"]
    return table(header, rows)


def pieces(rounds):
    """Bulk and random access of 2D fields, by size of a piece."""
    model, prior, _, num_steps = CASES["2D PDE"]()
    dataset = tx.data.SimulationDataset(model, prior, 1024, num_steps=num_steps)
    array = dataset[:][1]
    indices = np.random.default_rng(0).permutation(len(array) * (num_steps - 1))[:2048]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        caches, windows = {}, {}
        for size in SIZES:
            _zarr_store._PIECE_BYTES = size
            # The layout is that of the moment when the store is first asked.
            source = InMemory(array, num_steps + 1)
            # A small budget: pieces that were read before are not kept.
            caches[size] = tx.data.CachedDataset(
                source, f"{folder}/{size}", chunk_size=512, memory_budget=2**20
            )
            windows[size] = tx.data.StoredWindows(caches[size], lambda _: 1)

        def use(size, act):
            def run():
                _zarr_store._PIECE_BYTES = size
                act(caches[size], windows[size])

            return run

        def write(cached, _):
            cached.invalidate()
            cached.generate()

        acts = {
            "write": write,
            "bulk": lambda cached, _: cached[:],
            "random": lambda _, windows: windows.gather_host(indices),
            "single": lambda _, windows: [
                windows.gather_host(indices[i : i + 1]) for i in range(256)
            ],
        }
        for name, act in acts.items():
            runs = {size: use(size, act) for size in SIZES}
            seconds[name] = medians(interleaved(runs, rounds=rounds))
    window_bytes = 2 * array[0, 0].nbytes
    rows = [
        [
            f"{size // 2**10} KiB",
            f"{array.nbytes / seconds['write'][size] / 1e6:.0f}",
            f"{array.nbytes / seconds['bulk'][size] / 1e6:.0f}",
            f"{len(indices) * window_bytes / seconds['random'][size] / 1e6:.0f}",
            f"{1e6 * seconds['single'][size] / 256:.0f}",
        ]
        for size in SIZES
    ]
    header = ["piece", "write, MB/s", "bulk read, MB/s"]
    return table(
        [*header, "2048 random windows together, MB/s of windows", "one window, µs"],
        rows,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    body = "\n\n".join(
        ["## Codecs", codecs(rounds), "## Pieces (zarr, lz4)", pieces(rounds)]
    )
    report("data_codecs", __doc__.splitlines()[0], body)


if __name__ == "__main__":
    main()
