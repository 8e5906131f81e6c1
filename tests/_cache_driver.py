"""Generates a cache in children of this process and kills them; run as a script.

`python _cache_driver.py FOLDER FORMAT KILLS SEED` prints a JSON report. The rows are made
without JAX, so that a child is a fork away.
"""

import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from trainax_pk.data import CachedDataset

ROWS, CHUNK = 60, 8


class Slow:
    """Rows from a formula, slowly; keeps a diary of what it made."""

    def __init__(self, diary):
        self.diary = diary
        self.element_spec = (
            jax.ShapeDtypeStruct((2,), np.float32),
            {"y": jax.ShapeDtypeStruct((3, 5), np.float64)},
        )

    def __len__(self):
        return ROWS

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(ROWS)
        with open(self.diary, "a") as file:
            file.write(f"{start} {stop}\n")
        time.sleep(0.004)
        i = np.arange(start, stop, dtype=float)[:, None]
        theta = np.sin(i + np.arange(2)).astype(np.float32)
        return theta, {"y": np.cos(i[..., None] * np.arange(15).reshape(3, 5))}

    def with_split(self, split):
        return self

    def content_hash(self):
        return "0123456789abcdef" * 4


def child(work):
    """Runs work in a fork; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def generate(folder, format, diary, **options):
    CachedDataset(Slow(diary), folder, format, chunk_size=CHUNK, **options).generate()


def rows_in(diary):
    """Every row that was begun, as often as it was."""
    with open(diary) as file:
        spans = [line.split() for line in file]
    return [i for start, stop in spans for i in range(int(start), int(stop))]


def digest(folder):
    """SHA-256 of names and bytes of all files but locks."""
    sha = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        if path.suffix != ".lock" and path.name != "diary":
            sha.update(path.relative_to(folder).as_posix().encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()


def kill_often(folder, format, kills, chance, longest):
    """Generations killed at random points and gone on with, until enough were killed."""
    diary = os.path.join(folder, "diary")
    report = {"kills": 0, "generations": 0, "made": 0, "again": 0, "digests": []}
    while True:
        pid = child(lambda: generate(folder, format, diary))
        if report["kills"] < kills:
            time.sleep(chance.uniform(0.0, longest))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            report["kills"] += 1
            continue
        assert status == 0, status
        CachedDataset(Slow(os.devnull), folder, format).verify(full=True)
        made = rows_in(diary)
        report["generations"] += 1
        report["made"] += len(made)
        report["again"] += len(made) - len(set(made))
        report["digests"].append(digest(folder))
        if report["kills"] >= kills:
            os.remove(diary)
            return report
        CachedDataset(Slow(os.devnull), folder, format).invalidate()
        os.remove(diary)


def race(folder, format):
    """Two writers of one cache at a time."""
    diary = os.path.join(folder, "diary")
    writers = [
        child(lambda: generate(folder, format, diary, lock_timeout=60.0))
        for _ in range(2)
    ]
    codes = [os.waitpid(pid, 0)[1] for pid in writers]
    made = rows_in(diary)
    os.remove(diary)
    return {"codes": codes, "made": len(made)}


def main():
    warnings.filterwarnings("ignore", message=".*fork.*")
    folder, format, kills, seed = sys.argv[1:]
    # Loaded before the first fork, so that kills fall into the work, not into imports.
    for name in ("zarr.codecs", "numcodecs.blosc", "pyarrow.parquet"):
        importlib.import_module(name)
    report = {}
    for name in ("killed", "raced", "whole"):
        os.makedirs(os.path.join(folder, name))
    whole = os.path.join(folder, "whole")
    began = time.perf_counter()
    _, status = os.waitpid(child(lambda: generate(whole, format, os.devnull)), 0)
    assert status == 0, status
    report["killed"] = kill_often(
        os.path.join(folder, "killed"), format, int(kills), random.Random(int(seed)),
        time.perf_counter() - began,
    )  # fmt: skip
    report["raced"] = race(os.path.join(folder, "raced"), format)
    report["whole"] = digest(whole)
    report["raced"]["digest"] = digest(os.path.join(folder, "raced"))
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
