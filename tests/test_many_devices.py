"""Training on four devices: the losses of one, and runs that move between them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import trainax_pk as tx
from trainax_pk.checkpoint import Policy, Segment

DATA = jax.random.normal(jax.random.key(0), (4, 9, 1, 12))
KEY = jax.random.key(5)
TOTAL = 24


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


def mlp(key=jax.random.key(1)):
    return eqx.nn.MLP(12, 12, 128, 1, key=key)


def train_mlp(mesh, program="scan", **options):
    trainer = tx.trainer.SupervisedTrainer(
        DATA[:, :, 0],
        optimizer=optax.adam(1e-2),
        num_training_steps=TOTAL,
        batch_size=8,
        ema_decay=0.9,
        mesh=mesh,
        program=program,
        progress=False,
        **options,
    )
    return trainer, lambda **o: trainer(mlp(), key=KEY, **o)[1]


@pytest.mark.parametrize("program", ["scan", "loop"])
def test_parameters_may_be_split_over_devices(program, tmp_path):
    mesh = jax.make_mesh((4,), ("data",))
    trainer, run = train_mlp(mesh, program, parameters="sharded")
    half = Segment(epochs=8 / 32 * 10)
    run(run_dir=tmp_path, segment=half)
    split, whole = run(run_dir=tmp_path), train_mlp(None, program)[1]()
    np.testing.assert_allclose(split.loss, whole.loss, rtol=1e-9)
    first = split.state.params.layers[0]
    for tree in (split.state.params, split.state.ema, split.state.opt_state[0].mu):
        # The longer axis, which four devices divide; small arrays are whole.
        assert tree.layers[0].weight.addressable_shards[0].data.shape == (32, 12)
        assert tree.layers[1].weight.addressable_shards[0].data.shape == (12, 32)
        assert tree.layers[0].bias.addressable_shards[0].data.shape == (128,)
    np.testing.assert_allclose(
        first.weight, whole.state.params.layers[0].weight, rtol=1e-9
    )
    assert np.array_equal(run().loss, split.loss)
    assert trainer.engine.num_traces == 1


def test_a_rule_may_say_how_parameters_are_split():
    def rule(path, x):
        weights = path.endswith("weight") and "layers[1]" in path
        return PartitionSpec(None, "b") if weights else PartitionSpec()

    mesh = jax.make_mesh((2, 2), ("a", "b"))
    params = train_mlp(mesh, parameters=rule)[1]().state.params
    assert params.layers[1].weight.addressable_shards[0].data.shape == (12, 64)
    assert params.layers[0].weight.addressable_shards[0].data.shape == (128, 12)


@pytest.mark.parametrize(
    ("shape", "names"), [((4,), ("members",)), ((2, 2), ("members", "data"))]
)
@pytest.mark.parametrize("program", ["scan", "loop"])
def test_members_of_an_ensemble_are_split_over_devices(shape, names, program):
    keys = jax.random.split(KEY, 4)
    models = eqx.filter_vmap(mlp)(keys)
    trainer, _ = train_mlp(jax.make_mesh(shape, names), program)
    _, split = trainer(models, key=keys, ensemble=True)
    alone, _ = train_mlp(None, program)
    _, whole = alone(models, key=keys, ensemble=True)
    np.testing.assert_allclose(split.loss, whole.loss, rtol=1e-9)
    weight = split.state.params.layers[0].weight
    members = {s.data.shape[0] for s in weight.addressable_shards}
    assert members == {4 // shape[0]} and "over the devices" in split.program


def ensemble():
    models = jax.tree.map(lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x, conv())
    make(4)(models, key=jax.random.split(KEY, 2), ensemble=True)


def odd_ensemble():
    keys = jax.random.split(KEY, 3)
    trainer, _ = train_mlp(jax.make_mesh((4,), ("members",)))
    trainer(eqx.filter_vmap(mlp)(keys), key=keys, ensemble=True)


def build(**options):
    return tx.trainer.SupervisedTrainer(
        jnp.ones((4, 5, 3)), optimizer=optax.sgd(1.0), num_training_steps=1, **options
    )


BAD = {
    "ensemble": (ensemble, "Call the axis that its members are split over 'members'"),
    "one model": (
        lambda: train_mlp(jax.make_mesh((4,), ("members",)))[1](),
        "an ensemble with an axis 'members' of `mesh`, got one model",
    ),
    "members": (odd_ensemble, "number of members that 4 devices divide, got 3"),
    "parameters": (
        lambda: train_mlp(jax.make_mesh((4,), ("data",)), parameters="split"),
        "'replicated', 'sharded' or a function, got 'split'",
    ),
    "nothing to split over": (
        lambda: train_mlp(None, parameters="sharded"),
        "`mesh` with `parameters`, got None",
    ),
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
