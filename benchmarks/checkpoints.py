"""What does it cost to train in a folder?

The case where it costs most, a small network whose update is dispatch: the same run bare,
in a folder with the default cadence, and in a folder saved every two seconds, taken in
turns. Blocked is the time that training waited for saves and logs, as the run itself
notes it; the rest of the difference is what the thread that writes takes from training.

Run: python -m benchmarks.checkpoints [--updates 600000] [--rounds 5]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import optax

import trainax_pk as tx
from benchmarks._harness import interleaved, medians, ratio, report, table

POLICIES = {
    "default": tx.checkpoint.Policy(),
    "every 2 s": tx.checkpoint.Policy(every_seconds=2.0),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = tx.sample_data.lorenz_rk4(20, temporal_horizon=100, key=jax.random.key(0))
    model = eqx.nn.MLP(3, 3, 32, 3, key=jax.random.key(1))

    def trainer(policy):
        return tx.trainer.SupervisedTrainer(
            data,
            optimizer=optax.adam(1e-3),
            num_training_steps=options.updates,
            batch_size=64,
            ema_decay=0.999,
            checkpoints=policy,
            progress=False,
        )

    folder = Path(tempfile.mkdtemp())
    shares = {name: [] for name in POLICIES}

    def bare(trainer=trainer(None)):
        return trainer(model, key=jax.random.key(2))[1].loss

    def saved(name, trainer):
        shutil.rmtree(folder / "run", ignore_errors=True)
        loss = trainer(model, key=jax.random.key(2), run_dir=folder / "run")[1].loss
        events = (folder / "run" / "events.jsonl").read_text().splitlines()
        shares[name].append(json.loads(events[-1])["blocked_seconds"])
        return loss

    runs = {"bare": bare}
    for name, policy in POLICIES.items():
        runs[name] = lambda n=name, t=trainer(policy): saved(n, t)
    seconds = interleaved(runs, rounds=options.rounds)
    shutil.rmtree(folder)
    middle = medians(seconds)
    rows = [["bare", f"{middle['bare']:.2f}", "", ""]]
    for name in POLICIES:
        blocked = sorted(shares[name][1:])[options.rounds // 2]
        rows.append(
            [
                name,
                f"{middle[name]:.2f}",
                f"{ratio(seconds, 'bare', name):.3f}",
                f"{100 * blocked / middle[name]:.2f} %",
            ]
        )
    titles = ["saved", "run, s", "updates per second, of bare", "blocked"]
    body = (
        f"MLP 32 x 3 on Lorenz-63, batch 64, Adam, moving average, {options.updates} "
        f"updates; medians of {options.rounds} rounds.\n\n{table(titles, rows)}"
    )
    report("checkpoints", "What does it cost to train in a folder?", body)


if __name__ == "__main__":
    main()
