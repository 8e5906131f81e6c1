"""How many of many SIGKILLs does the generation of a cache survive bit by bit?

A source of 60 rows in 15 parts is cached by children of one process, which are killed after
a random time of at most that of a generation, again and again; a killed cache is gone on
with by the next child. Every finished cache, and one of two writers at once, is compared
file by file with that of a generation that nobody disturbed. An open chunk has two parts:
8 rows. Then bytes of a finished cache are changed one at a time, and the cache is opened
and verified.

Run: python -m benchmarks.data_kills [--kills 50] [--seeds 1] [--every 1]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import report, table
from tests._cache_driver import Slow, generate
from trainax_pk.data import CacheDamaged, CachedDataset

DRIVER = Path(__file__).parent.parent / "tests" / "_cache_driver.py"


def one(format, kills, seed):
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(DRIVER), name, format, str(kills), str(seed)],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        killed = found["killed"]
        same = {*killed.pop("digests"), found["raced"]["digest"]} == {found["whole"]}
        return {
            **killed,
            "same": same,
            "seconds": time.perf_counter() - begin,
        }


def flip_all(format, every):
    """How many bytes were changed, and how many changes named the file."""
    count = found = 0
    with tempfile.TemporaryDirectory() as name:
        generate(name, format, os.devnull)
        files = [
            p for p in Path(name).rglob("*") if p.is_file() and p.suffix != ".lock"
        ]
        for path in files:
            good = path.read_bytes()
            for at in range(0, len(good), every):
                changed = bytearray(good)
                changed[at] ^= 1 + at % 255
                path.write_bytes(changed)
                count += 1
                try:
                    cached = CachedDataset(Slow(os.devnull), name, format)
                    cached.verify(full=True)
                except CacheDamaged as error:
                    found += path.name in str(error)
            path.write_bytes(good)
    return count, found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="change each n-th byte")
    options = parser.parse_args()
    rows = []
    for format in ("zarr", "parquet", "tfrecord"):
        for seed in range(options.seeds):
            row = one(format, options.kills, seed)
            rows.append(
                [
                    format,
                    row["kills"],
                    row["generations"],
                    row["made"],
                    row["again"],
                    8 * row["kills"],
                    "yes" if row["same"] else "**NO**",
                    f"{row['seconds']:.0f}",
                ]
            )
    header = ["format", "kills", "finished", "rows made", "rows made again"]
    kills = table([*header, "in open chunks", "same bytes", "s"], rows)
    rows = [[f, *flip_all(f, options.every)] for f in ("zarr", "parquet", "tfrecord")]
    flips = table(["format", "bytes changed", "found and named"], rows)
    body = f"{kills}\n\n{flips}"
    report("data_kills", __doc__.splitlines()[0], body)


if __name__ == "__main__":
    main()
