"""Contract of every callback: when it runs, what is stacked, and that it only looks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

DATA = jax.random.normal(jax.random.key(0), (3, 7, 1, 10))
HELD_OUT = jax.random.normal(jax.random.key(9), (2, 6, 1, 10))
ONE = tx.configuration.Supervised()
NRMSE = {"nrmse": tx.metrics.nrmse_per_lead_time}

# name -> (callback that runs every 4 updates, shape of one result)
CALLBACKS = {
    "loss": (tx.callback.Loss(ONE, 4), ()),
    "grad_norm": (tx.callback.GradNorm(ONE, 4), ()),
    "weight_norm": (tx.callback.WeightNorm(4), ()),
    "network": (tx.callback.GetNetwork(4), (1, 1, 3)),
    "validation": (tx.callback.Validation(ONE, HELD_OUT, every=4, batch_size=3), ()),
    "rollout": (tx.callback.RolloutMetrics(HELD_OUT, NRMSE, every=4), (5,)),
    "bias": (tx.callback.Function(lambda step, m, batch: m.bias, 4, "bias"), (1, 1)),
}


def conv():
    return eqx.nn.Conv1d(
        1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=jax.random.key(1)
    )


def train(callbacks):
    trainer = tx.trainer.SupervisedTrainer(
        DATA,
        optimizer=optax.adam(1e-2),
        num_training_steps=6,
        batch_size=5,
        callbacks=callbacks,
        progress=False,
    )
    return trainer(conv(), key=jax.random.key(4))[1]


@pytest.fixture(scope="module")
def bare():
    return train([])


@pytest.mark.parametrize("name", CALLBACKS)
def test_contract(name, bare):
    callback, shape = CALLBACKS[name]
    history = train([callback])
    record = history.records[name]
    assert record.steps == (0, 4, 6)
    values = jax.tree.leaves(eqx.filter(record.values, eqx.is_array))
    assert values[0].shape == (3, *shape)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in values)
    assert not np.array_equal(values[0][0], values[0][-1])
    np.testing.assert_array_equal(history.loss, bare.loss)
