"""What does it cost to train in a folder, and how soon does SIGTERM end it?

The case where it costs most, a small network whose update is dispatch: the same run bare,
in a folder with the default cadence, and in a folder saved every two seconds, taken in
turns. Blocked is the time that training waited for saves and logs, as the run itself
notes it; the rest of the difference is what the thread that writes takes from training.

Then the same run in a process of its own is sent SIGTERM while its program compiles,
while it trains, and while a program compiles that takes much longer than a run should
take to end.

Run: python -m benchmarks.checkpoints [--updates 600000] [--rounds 5]
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import trainax_pk as tx
from benchmarks._harness import interleaved, medians, ratio, report, table

POLICIES = {
    "default": tx.checkpoint.Policy(),
    "every 2 s": tx.checkpoint.Policy(every_seconds=2.0),
}


def make(updates, policy=None, callbacks=()):
    data = tx.sample_data.lorenz_rk4(20, temporal_horizon=100, key=jax.random.key(0))
    trainer = tx.trainer.SupervisedTrainer(
        data,
        optimizer=optax.adam(1e-3),
        num_training_steps=updates,
        batch_size=64,
        ema_decay=0.999,
        checkpoints=policy,
        callbacks=callbacks,
        progress=False,
    )
    return trainer, eqx.nn.MLP(3, 3, 32, 3, key=jax.random.key(1))


def cost(updates, rounds):
    """Seconds of the runs, and what they waited."""
    folder = Path(tempfile.mkdtemp())
    shares = {name: [] for name in POLICIES}

    def bare(trainer, model):
        return trainer(model, key=jax.random.key(2))[1].loss

    def saved(name, trainer, model):
        shutil.rmtree(folder / "run", ignore_errors=True)
        loss = trainer(model, key=jax.random.key(2), run_dir=folder / "run")[1].loss
        events = (folder / "run" / "events.jsonl").read_text().splitlines()
        shares[name].append(json.loads(events[-1])["blocked_seconds"])
        return loss

    runs = {"bare": lambda made=make(updates): bare(*made)}
    for name, policy in POLICIES.items():
        runs[name] = lambda n=name, made=make(updates, policy): saved(n, *made)
    seconds = interleaved(runs, rounds=rounds)
    shutil.rmtree(folder)
    middle = medians(seconds)
    rows = [["bare", f"{middle['bare']:.2f}", "", "", ""]]
    for name in POLICIES:
        blocked = sorted(shares[name][1:])[rounds // 2]
        rows.append(
            [
                name,
                f"{middle[name]:.2f}",
                f"{ratio(seconds, 'bare', name):.3f}",
                f"{blocked:.3f}",
                f"{100 * blocked / middle[name]:.2f} %",
            ]
        )
    titles = ["saved", "run, s", "updates per second, of bare", "blocked, s", "blocked"]
    return table(titles, rows)


def endless(folder, phase):
    """The child: a run without an end to speak of."""

    @jax.jit
    def long_to_compile(u):
        for i in range(3000):
            u = jnp.sin(u @ jnp.eye(3) * (1 + i)) + u
        return u

    def call(step, model, batch):
        if phase == "a callback compiles" and step:
            Path(folder, "compiling").touch()
            return long_to_compile(jnp.ones((3, 3))).sum()
        return jnp.zeros(())

    callback = tx.callback.Function(call, 50_000, "call")
    trainer, model = make(10**9, tx.checkpoint.Policy(), [callback])
    trainer(model, key=jax.random.key(2), run_dir=folder)


def begun(folder, phase):
    """Whether the child is where the signal shall meet it."""
    if phase == "the first program compiles":
        return (folder / "events.jsonl").exists()
    if phase == "it trains":
        log = folder / "metrics.jsonl"
        return log.exists() and log.stat().st_size > 10_000
    return (folder / "compiling").exists()


def time_to_exit(phase):
    """Seconds from SIGTERM to the end of the child, and its status and last step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            sys.executable,
            "-m",
            "benchmarks.checkpoints",
            "--child",
            name,
            phase,
        ]
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not begun(folder, phase):
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.perf_counter()
        child.send_signal(signal.SIGTERM)
        code = child.wait()
        seconds = time.perf_counter() - began
        steps = sorted(p.name for p in (folder / "checkpoints").glob("0*"))
        return [phase, f"{seconds:.2f}", code, int(steps[-1]) if steps else "none"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        endless(*options.child)
        return
    phases = ("the first program compiles", "it trains", "a callback compiles")
    exits = [time_to_exit(phase) for phase in phases]
    costs = cost(options.updates, options.rounds)
    body = [
        f"MLP 32 x 3 on Lorenz-63, batch 64, Adam, moving average, {options.updates} "
        f"updates; medians of {options.rounds} rounds.",
        costs,
        "From SIGTERM to the end of the process:",
        table(["while", "s", "status", "saved step"], exits),
    ]
    question = (
        "What does it cost to train in a folder, and how soon does SIGTERM end it?"
    )
    report("checkpoints", question, "\n\n".join(body))


if __name__ == "__main__":
    main()
