"""How many of many SIGKILLs does the generation of a cache survive bit by bit?

A source of 60 rows in 15 parts is cached by children of one process, which are killed after
a random time of at most 0.2 s, again and again; a killed cache is gone on with by the next
child. Every finished cache, and one of two writers at once, is compared file by file with
that of a generation that nobody disturbed. An open chunk has two parts: 8 rows.

Run: python -m benchmarks.data_kills [--kills 50] [--seeds 1]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import report, table

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
        report = json.loads(done.stdout)
        killed = report["killed"]
        same = {*killed.pop("digests"), report["raced"]["digest"]} == {report["whole"]}
        return {
            **killed,
            "same": same,
            "seconds": time.perf_counter() - begin,
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
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
    body = table([*header, "in open chunks", "same bytes", "s"], rows)
    report("data_kills", __doc__.splitlines()[0], body)


if __name__ == "__main__":
    main()
