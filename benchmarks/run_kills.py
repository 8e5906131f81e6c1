"""Do training runs that are killed again and again end in the bits of the run alone?

Each case (cadence of checkpoints, length of chunks, program family, dropout, average,
accumulation, data on the host or streamed) is trained by children of one process. Most
are ended: four of six with SIGKILL, the others with SIGTERM or SIGINT, at a random time
or at one of ten points inside of saving, evaluating and compiling. The next child goes
on. In the end
parameters, optimizer, averages, losses, callbacks' records and the metric log are
compared with those of a run that nobody disturbed, and a ledger is read: which samples
each update was given, following every time a run was taken up.

Run: python -m benchmarks.run_kills [--kills 65] [--seed 7]
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import report, table

DRIVER = Path(__file__).parent.parent / "tests" / "_run_driver.py"


def measure(kills, seed):
    """The driver's report, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(DRIVER), folder, str(kills), str(seed)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout), time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=65)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    found, seconds = measure(options.kills, options.seed)
    points, signals = collections.Counter(), collections.Counter()
    rows = []
    for case, row in found.items():
        for name, number in row["points"].items():
            (signals if name.startswith("SIG") else points)[name] += number
        verdicts = ["yes" if row[name] else "NO" for name in ("same", "once")]
        rows.append([case, row["kills"], row["runs"], *verdicts])
    titles = ["case", "kills", "finished runs", "same bits", "every update once"]
    body = [
        table(titles, rows),
        f"{points.total()} kills in {seconds:.0f} s:",
        table(["signal", "kills"], signals.most_common()),
        "By where they came:",
        table(["where", "kills"], points.most_common()),
    ]
    question = (
        "Do runs that are killed again and again end in the bits of the run alone?"
    )
    report("run_kills", question, "\n\n".join(body))


if __name__ == "__main__":
    main()
