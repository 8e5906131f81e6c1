"""One of several processes that train one model.

`python -m tests._processes_driver INDEX COUNT PORT WHAT FOLDER`. WHAT are names of cases,
whose curves come in a JSON report, with those of one device from the first process; or the
name of a signal that the last process sends to itself half-way.
"""

import json
import os
import signal
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx

TOTAL = 24
DATA = np.random.default_rng(0).normal(size=(4, 9, 12))


def network():
    return eqx.nn.MLP(12, 12, 128, 1, key=jax.random.key(1))


def make(mesh, data=DATA, **options):
    return tx.trainer.SupervisedTrainer(
        data,
        num_rollout_steps=2,
        optimizer=optax.adam(1e-2),
        num_training_steps=TOTAL,
        batch_size=8,
        ema_decay=0.9,
        mesh=mesh,
        progress=False,
        **options,
    )


def train(trainer, **options):
    return trainer(network(), key=jax.random.key(5), **options)[1]


def curves(history):
    """Losses and records of a run, as lists."""
    records = {k: r.values for k, r in history.records.items()}
    return {
        k: np.ravel(x).tolist() for k, x in {"loss": history.loss, **records}.items()
    }


def cached(folder):
    """Trajectories on disk, made by whichever process comes first."""
    source = tx.data.SimulationDataset(
        tx.data.StepperModel(lambda u: 0.9 * jnp.roll(u, 1), dt=1.0),
        tx.data.Normal(jnp.zeros(12), 1.0),
        4,
        num_steps=8,
    )
    return tx.data.CachedDataset(source, folder, lock_timeout=60.0)


def several(mesh, folder, names):
    """Curves of runs on all devices, and of those on one, by name."""
    half = tx.checkpoint.Segment(epochs=2.5)
    evaluations = [
        tx.callback.Validation(tx.configuration.Supervised(2), DATA[:2], every=8),
        tx.callback.WeightNorm(6),
    ]
    stored = cached(os.path.join(folder, "cached"))
    cases = {
        "replicated": ({"callbacks": evaluations}, {}),
        "host": ({"residency": "host", "program": "loop", "accumulate": 2}, {}),
        "sharded": ({"callbacks": evaluations}, {"parameters": "sharded"}),
        "streamed": ({"data": stored, "residency": "disk"}, {}),
    }
    report = {}
    for name in names:
        options, on_mesh = cases[name]
        run_dir = os.path.join(folder, name)
        trainer = make(mesh, **options, **on_mesh)
        part = train(trainer, run_dir=run_dir, segment=half)
        whole = train(trainer, run_dir=run_dir)
        leaf = whole.state.params.layers[0].weight
        report[name] = {
            "stopped": len(part.loss),
            "part": leaf.addressable_shards[0].data.size / leaf.size,
            "curves": curves(whole),
        }
        if jax.process_index() == 0:
            report[name]["alone"] = curves(train(make(None, **options)))
    return report


def signalled(mesh, folder, number):
    """A run that the last process is sent a signal in."""

    def send(step, model, batch):
        last = jax.process_index() == jax.process_count() - 1
        if step == TOTAL // 2 and last:
            os.kill(os.getpid(), number)
        return jnp.zeros(())

    callback = tx.callback.Function(send, TOTAL // 2, "signal")
    policy = tx.checkpoint.Policy(None, every_steps=4)
    trainer = make(mesh, callbacks=[callback], checkpoints=policy)
    train(trainer, run_dir=os.path.join(folder, "run"))


def main():
    index, count, port, what, folder = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", int(count), int(index), heartbeat_timeout_seconds=10
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    if what.islower():
        sys.stdout.write(json.dumps(several(mesh, folder, what.split(","))))
    else:
        signalled(mesh, folder, getattr(signal, what))


if __name__ == "__main__":
    main()
