"""Trains in children of this process and kills them; run as a script.

`python _run_driver.py FOLDER KILLS SEED [CASE ...]` prints a JSON report. A child is a
fork away: the libraries are loaded here, and no program is run here.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from trainax_pk import _files
from trainax_pk.checkpoint import Policy, _store
from trainax_pk.engine import Engine
from trainax_pk.trainer import _loop

TOTAL = 40
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]


class Network(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, u, *, key=None):
        return self.dropout(self.linear(u), key=key)


# name -> (dropout, seconds of a callback, its cadence, policy, options of the trainer)
CASES = {
    "often": (0.0, 0.01, 2, Policy(None, every_steps=3), {}),
    "by time": (0.0, 0.02, 5, Policy(0.05, keep_last=1), {"program": "loop"}),
    "dropout, average": (
        0.3,
        0.02,
        4,
        Policy(None, every_steps=1, keep_last=1),
        {"ema_decay": 0.9},
    ),
    "accumulation, host": (
        0.3,
        0.02,
        4,
        Policy(0.0, every_steps=7, keep_last=3, keep_epochs="::2"),
        {"accumulate": 2, "residency": "host", "max_grad_norm": 0.1},
    ),
    "streamed": (0.3, 0.02, 4, Policy(None, every_steps=3), {"residency": "disk"}),
}


def make_data(case, folder):
    if case != "streamed":
        return np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)
    source = tx.data.SimulationDataset(
        tx.data.StepperModel(lambda u: 0.9 * jnp.roll(u, 1), dt=1.0),
        tx.data.Normal(jnp.zeros(3), 1.0),
        4,
        num_steps=6,
    )
    return tx.data.CachedDataset(source, folder)


def make(case, wait, folder):
    rate, _, every, policy, options = CASES[case]
    data = make_data(case, folder)
    linear = eqx.nn.Linear(3, 3, key=jax.random.key(1))
    model = tx.Stepper(Network(linear, eqx.nn.Dropout(rate)), stochastic=True)
    trainer = tx.trainer.SupervisedTrainer(
        data,
        optimizer=optax.adam(1e-2),
        num_training_steps=TOTAL,
        batch_size=10,
        callbacks=[tx.callback.Function(wait, every, "wait")],
        checkpoints=policy,
        log_every=4,
        progress=False,
        **options,
    )
    return trainer, model


def train(case, folder, cache, point=None, nth=1, number=signal.SIGKILL):
    """One process' part of a run; leaves its digest behind if it gets to the end."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    keep_ledger(folder / "ledger")
    if point is not None:
        POINTS[point](bomb(nth, number))
    seconds = CASES[case][1]

    def wait(step, model, batch):
        time.sleep(seconds)
        validate(step)
        return jnp.zeros(())

    # Made by the first of all processes; those that are killed find it there.
    trainer, model = make(case, wait, Path(cache).with_name("data"))
    _, history = trainer(model, key=jax.random.key(5), run_dir=folder / "run")
    state = eqx.tree_at(lambda s: s.key, history.state, None)
    leaves = jax.tree.leaves((state, history.loss, history.records))
    sha = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves))
    sha.update((folder / "run" / "metrics.jsonl").read_bytes())
    (folder / "digest").write_text(sha.hexdigest())


def validate(step):
    """Stands for an evaluation, to be killed in."""
    del step


def keep_ledger(path):
    """Notes where a process took a run up, and the samples of each update."""
    run, thaw = Engine.run, _loop.thaw

    def note(line):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def noting_run(self, state, order, start, count, size):
        out = run(self, state, order, start, count, size)
        note([start, np.asarray(order.indices(start, count)).tolist()])
        return out

    def noting_thaw(found, history):
        note([found.step, []])
        return thaw(found, history)

    Engine.run, _loop.thaw = noting_run, noting_thaw


def read_ledger(path):
    """Samples of each update of the run that survived; every update exactly once."""
    updates = []
    for line in path.read_text().splitlines():
        start, rows = json.loads(line)
        assert start <= len(updates), f"update {len(updates)} was left out"
        updates[start:] = rows
    return updates


def bomb(nth, number):
    """Sends this process a signal when it is called for the nth time, after some work."""
    calls = []

    def go_off(work=lambda: None):
        calls.append(work)
        if len(calls) == nth:
            # What is half done by a process that goes on would not be a kill.
            if number == signal.SIGKILL:
                work()
            os.kill(os.getpid(), number)

    return go_off


def before(owner, name, when=lambda *args: True):
    """A failpoint in front of a function."""

    def arm(kill):
        inner = getattr(owner, name)

        def wrapped(*args, **options):
            if when(*args):
                kill()
            return inner(*args, **options)

        setattr(owner, name, wrapped)

    return arm


def mid_write(kill):
    inner = _store.write_arrays

    def wrapped(folder, leaves):
        inner(folder, leaves)

        def truncate():
            for path in sorted(p for p in folder.rglob("*") if p.is_file())[::2]:
                path.write_bytes(path.read_bytes()[:-7])

        kill(truncate)

    _store.write_arrays = wrapped


def mid_removal(kill):
    inner = shutil.rmtree

    def wrapped(path, *args, **options):
        if str(path).endswith(".removing"):
            kill(min(p for p in Path(path).rglob("*") if p.is_file()).unlink)
        inner(path, *args, **options)

    _store.shutil.rmtree = wrapped


def mid_compile(kill):
    inner = Engine.run

    def wrapped(self, *args):
        threading.Timer(0.1, kill).start()
        return inner(self, *args)

    Engine.run = wrapped


def is_final(source, *unused):
    return str(source).endswith(".writing")


POINTS = {
    "before arrays": before(_store, "write_arrays"),
    "mid-write": mid_write,
    "before manifest": before(_store, "seal"),
    "temporary manifest": before(_files.os, "replace"),
    "verification": before(_store, "read_arrays"),
    "before rename": before(_store.os, "rename", is_final),
    "after rename": before(_store, "sync_folder"),
    "during removal": mid_removal,
    "evaluation": before(sys.modules[__name__], "validate"),
    "first compile": mid_compile,
}


def child(work):
    """Runs work in a fork; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_often(case, folder, cache, kills, chance, seconds):
    """Runs killed at random times and points and gone on with, until enough were."""
    report = {"kills": 0, "points": {}, "runs": 0, "digests": [], "ledgers": []}
    while True:
        point = chance.choice([None, None, *POINTS])
        nth = chance.randint(1, 3)
        number = chance.choice(SIGNALS)
        enough = report["kills"] >= kills
        if enough:
            point = None
        folder.mkdir(exist_ok=True)
        pid = child(
            lambda p=point, n=nth, s=number: train(case, folder, cache, p, n, s)
        )
        if point is None and not enough:
            time.sleep(chance.uniform(0.0, seconds))
            os.kill(pid, number)
        code = finish(pid)
        if code != 0:
            assert code in (-9, -15, -2, 130, 143), code
            report["kills"] += 1
            names = [signal.Signals(number).name, point or "at a random time"]
            for name in names:
                report["points"][name] = report["points"].get(name, 0) + 1
            continue
        report["runs"] += 1
        report["digests"].append((folder / "digest").read_text())
        report["ledgers"].append(read_ledger(folder / "ledger"))
        shutil.rmtree(folder)
        if enough:
            return report


def one_case(case, folder, kills, chance):
    """The run alone, and the same run killed again and again."""
    cache = str(folder / "cache")
    alone = folder / "alone"
    alone.mkdir(parents=True)
    for _ in range(2):
        # The second time the programs are there, as they are for those killed later.
        shutil.rmtree(alone)
        alone.mkdir()
        began = time.monotonic()
        assert finish(child(lambda: train(case, alone, cache))) == 0
        seconds = time.monotonic() - began
    report = kill_often(case, folder / "killed", cache, kills, chance, seconds)
    digest, ledger = (alone / "digest").read_text(), read_ledger(alone / "ledger")
    report["same"] = set(report.pop("digests")) == {digest}
    ledgers = report.pop("ledgers")
    report["once"] = len(ledger) == TOTAL and all(x == ledger for x in ledgers)
    return report


def main():
    warnings.filterwarnings("ignore", message=".*fork.*")
    folder, kills, seed, *cases = sys.argv[1:]
    chance = random.Random(int(seed))
    report = {
        case: one_case(case, Path(folder) / case.replace(" ", "-"), int(kills), chance)
        for case in cases or CASES
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
