"""How many of many SIGKILLs does the generation of a cache survive bit by bit?

A source of 60 rows in 15 chunks is cached by children of one process, which are killed
after a random time between nothing and a whole generation, again and again; a killed
cache is gone on with by the next child. In the end every file is compared with that of
a generation that nobody disturbed.

Run: python -m benchmarks.data_kills [--kills 50] [--seeds 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    print("| format | kills | finished | chunks made | made again | same bytes | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for format in ("zarr", "parquet", "tfrecord"):
        for seed in range(options.seeds):
            row = one(format, options.kills, seed)
            print(
                f"| {format} | {row['kills']} | {row['generations']} | {row['made']} | "
                f"{row['again']} | {'yes' if row['same'] else 'NO'} | "
                f"{row['seconds']:.0f} |"
            )


if __name__ == "__main__":
    main()
