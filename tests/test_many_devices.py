"""Training on four devices: the losses of one, and runs that move between them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from tests._programs import compilation_cache
from trainax_pk.checkpoint import Policy, Segment

DATA = jax.random.normal(jax.random.key(0), (4, 9, 1, 12))
KEY = jax.random.key(5)
TOTAL = 24


@pytest.fixture(scope="module", autouse=True)
def _programs(tmp_path_factory):
    """Equal programs are compiled once."""
    with compilation_cache(tmp_path_factory.mktemp("programs")):
        yield


def conv():
    return eqx.nn.Conv1d(
        1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=jax.random.key(1)
    )


def make(devices, **options):
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("data",))
    return tx.trainer.SupervisedTrainer(
        DATA,
        num_rollout_steps=2,
        optimizer=optax.adam(1e-2),
        num_training_steps=TOTAL,
        batch_size=8,
        ema_decay=0.9,
        mesh=mesh,
        progress=False,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"program": "loop", "residency": "host", "accumulate": 2}],
    ids=["scan", "loop from the host, accumulating"],
)
def test_four_devices_give_the_losses_of_one(options):
    split = make(4, **options)
    _, one = make(1, **options)(conv(), key=KEY)
    _, four = split(conv(), key=KEY)
    np.testing.assert_allclose(four.loss, one.loss, rtol=1e-9)
    np.testing.assert_allclose(four.state.ema.weight, one.state.ema.weight, rtol=1e-9)
    assert len(four.state.params.weight.sharding.device_set) == 4


def test_every_device_computes_its_share():
    trainer = make(4)
    state = trainer.devices.replicate(
        tx.TrainState.create(conv(), trainer.optimizer, key=KEY, ema=True)
    )
    batch = trainer.devices.replicate(trainer.windows[np.arange(8)])
    text = jax.jit(trainer.step_fn).lower(state, batch).compile().as_text()
    # Two of eight windows each, and the gradients summed.
    assert "f64[2,3,1,12]" in text and "all-reduce" in text


def test_a_run_moves_to_another_number_of_devices(tmp_path):
    part = Segment(epochs=8 / 28 * 10)
    _, stopped = make(4)(conv(), key=KEY, run_dir=tmp_path, segment=part)
    assert stopped.loss.shape == (10,)
    _, moved = make(1)(conv(), key=KEY, run_dir=tmp_path)
    _, alone = make(1)(conv(), key=KEY)
    np.testing.assert_allclose(moved.loss, alone.loss, rtol=1e-9)
    # On as many devices it is the same run, bit by bit.
    folder = tmp_path / "four"
    trainer = make(4, checkpoints=Policy(every_seconds=None, every_steps=5))
    _, whole = trainer(conv(), key=KEY)
    trainer(conv(), key=KEY, run_dir=folder, segment=part)
    _, resumed = trainer(conv(), key=KEY, run_dir=folder)
    assert np.array_equal(resumed.loss, whole.loss)
    assert np.array_equal(resumed.state.params.weight, whole.state.params.weight)


def ensemble():
    models = jax.tree.map(lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x, conv())
    make(4)(models, key=jax.random.split(KEY, 2), ensemble=True)


def build(**options):
    return tx.trainer.SupervisedTrainer(
        jnp.ones((4, 5, 3)), optimizer=optax.sgd(1.0), num_training_steps=1, **options
    )


BAD = {
    "ensemble": (ensemble, "one model with `mesh`"),
    "mesh": (lambda: build(batch_size=4, mesh=4), "jax.sharding.Mesh, got 4"),
    "batch": (
        lambda: build(batch_size=6, mesh=jax.make_mesh((4,), ("data",))),
        "4 devices of `mesh` divide, got 6",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run()
