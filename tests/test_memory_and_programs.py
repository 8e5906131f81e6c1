"""Trainers by their integers: bytes and lines of programs, traces, members of ensembles."""

import itertools
import math
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.data import ShuffledOrder
from trainax_pk.engine import make_rewrite
from trainax_pk.engine._choice import faster_for_members
from trainax_pk.engine._members import run_side_by_side, split_members, stack_members

pytestmark = pytest.mark.slow

T = tx.trainer
BATCH = 20


def _net(key):
    key_in, key_out = jax.random.split(key)
    conv = lambda i, o, k: eqx.nn.Conv1d(  # noqa: E731
        i, o, 3, padding="SAME", padding_mode="CIRCULAR", key=k
    )
    return eqx.nn.Sequential(
        [conv(1, 4, key_in), eqx.nn.Lambda(jax.nn.gelu), conv(4, 1, key_out)]
    )


def _mlp(key):
    return eqx.nn.MLP(3, 3, 16, 2, key=key)


def _chunk(trainer, model, size):
    """The trainer's program of many updates, lowered."""
    key = jax.random.key(0)
    order = ShuffledOrder(len(trainer.windows), trainer.batch_size, key)
    state = tx.TrainState.create(model, trainer.optimizer, key=key)
    arrays = trainer.engine._feed.load(order, 0, size, size)
    zero = np.int32(0)
    return trainer.engine._programs._scan.lower(state, arrays, zero, zero, size=size)


# Memory of windows.


@pytest.mark.parametrize("length", [6, 21])
def test_windows_cost_the_raw_data_and_one_batch(length):
    size = 100
    data = jax.random.normal(jax.random.key(0), (30, 41, 1, 80))
    model = _net(jax.random.key(1))
    trainer = T.SupervisedTrainer(
        data,
        num_rollout_steps=length - 1,
        optimizer=optax.adam(1e-3),
        num_training_steps=size,
        batch_size=BATCH,
        progress=False,
    )
    chunk = _chunk(trainer, model, size).compile().memory_analysis()
    state = tx.TrainState.create(model, trainer.optimizer, key=jax.random.key(2))
    update_fn = make_rewrite(jax.default_backend(), size)(trainer.step_fn)
    lowered = jax.jit(update_fn).lower(state, trainer.windows[:BATCH])
    update = lowered.compile().memory_analysis().temp_size_in_bytes
    small = sum(x.nbytes for x in jax.tree.leaves(state.params)) * 8 + 4096
    batch = BATCH * length * math.prod(data.shape[2:]) * data.itemsize
    plan = 4 * size * BATCH
    stacked = len(trainer.windows) * length / (data.shape[0] * data.shape[1])
    assert stacked > 5  # What storing the windows would cost, in units of the data.
    assert chunk.argument_size_in_bytes <= data.nbytes + small
    assert chunk.temp_size_in_bytes <= update + batch + plan + small


# Size of programs.


def _trainers(length, num_updates=10):
    # As many windows for every length: the order's program depends on their number.
    data = jax.random.normal(jax.random.key(0), (4, length + 12, 1, 24))
    options = {
        "optimizer": optax.adam(1e-3),
        "num_training_steps": num_updates,
        "batch_size": 3,
        "progress": False,
    }
    ref = tx.sample_data.make_advection_1d_stepper(24)
    return {
        "supervised": lambda: T.SupervisedTrainer(
            data, num_rollout_steps=length, **options
        ),
        "diverted": lambda: T.DivertedChainTrainer(
            data,
            ref_stepper=ref,
            num_rollout_steps=length,
            num_branch_steps=3,
            **options,
        ),
        "mix": lambda: T.MixChainTrainer(
            data,
            ref_stepper=ref,
            num_rollout_steps=length,
            num_post_physics_steps=2,
            **options,
        ),
        "residuum": lambda: T.ResiduumTrainer(
            data,
            residuum_fn=lambda u_next, u_prev: u_next - ref(u_prev),
            num_rollout_steps=length,
            **options,
        ),
        "checkpointed": lambda: T.SupervisedTrainer(
            data,
            num_rollout_steps=length,
            adjoint=tx.RecursiveCheckpointAdjoint(),
            **options,
        ),
        "truncated": lambda: T.SupervisedTrainer(
            data, num_rollout_steps=length, adjoint=tx.KStepAdjoint(2), **options
        ),
    }


@pytest.mark.parametrize("name", _trainers(1))
def test_programs_of_trainers_do_not_grow_with_the_rollout(name):
    model = _net(jax.random.key(1))
    lines = [
        _chunk(_trainers(length)[name](), model, 10).as_text().count("\n")
        for length in (6, 48)
    ]
    assert abs(lines[1] - lines[0]) <= 0.05 * lines[0]


def test_programs_do_not_grow_with_the_run():
    model = _net(jax.random.key(1))
    lines = [
        _chunk(_trainers(4, num_updates=n)["supervised"](), model, n)
        .as_text()
        .count("\n")
        for n in (5, 500)
    ]
    assert abs(lines[1] - lines[0]) <= 0.05 * lines[0]


# Ensembles.


def _problem(name):
    if name == "mlp":
        data = tx.sample_data.lorenz_rk4(3, temporal_horizon=9, key=jax.random.key(0))
        return data / 10, _mlp
    return jax.random.normal(jax.random.key(0), (4, 9, 1, 12)), _net


def _train_all(trainer, models, keys, way):
    if way == "argument":
        return trainer(models, key=keys, ensemble=True)
    return eqx.filter_vmap(lambda m, k: trainer(m, key=k))(models, keys)


def _ensemble_trainer(data, **options):
    return T.SupervisedTrainer(
        data,
        num_rollout_steps=2,
        optimizer=optax.adam(1e-2),
        num_training_steps=80,  # Two chunks: the first is of 64.
        batch_size=4,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("name", ["mlp", "net"])
def test_members_are_those_alone_in_either_form(name):
    data, make = _problem(name)
    keys = jax.random.split(jax.random.key(5), 3)
    models = eqx.filter_vmap(make)(keys)
    trainer = _ensemble_trainer(data, program="scan")
    alone = [trainer(_member(models, i), key=keys[i]) for i in range(3)]
    for way, vmapped in itertools.product(("argument", "filter_vmap"), (True, False)):
        trainer.engine.vmapped = vmapped
        trained, history = _train_all(trainer, models, keys, way)
        assert history.loss.shape == (3, 80)
        for i, (model, single) in enumerate(alone):
            got = eqx.filter((_member(trained, i), history.loss[i]), eqx.is_array)
            expected = eqx.filter((model, single.loss), eqx.is_array)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
            for a, b in pairs:
                # Apart each member runs the program that it would run alone.
                rtol = 1e-6 if vmapped else 0
                np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


def test_an_ensemble_is_traced_once():
    data, make = _problem("mlp")
    keys = jax.random.split(jax.random.key(5), 3)
    models = eqx.filter_vmap(make)(keys)
    trainer = _ensemble_trainer(data)
    _train_all(trainer, models, keys, "argument")
    traces = trainer.engine.num_traces
    assert traces <= 2  # The loss's shape, and the program.
    _train_all(trainer, models, keys, "filter_vmap")
    trainer(_member(models, 1), key=keys[1])
    assert trainer.engine.num_traces == traces


def test_members_keep_the_precision_of_the_caller():
    # The setting holds in the thread that made it; members run in others.
    with jax.enable_x64(False):
        data, make = _problem("mlp")
        keys = jax.random.split(jax.random.key(5), 3)
        models = eqx.filter_vmap(make)(keys)
        trainer = _ensemble_trainer(data)
        trainer.engine.vmapped = False
        trained, history = _train_all(trainer, models, keys, "argument")
        alone, single = trainer(_member(models, 2), key=keys[2])
    assert history.loss.dtype == jnp.float32
    np.testing.assert_array_equal(history.loss[2], single.loss)
    leaves = zip(
        jax.tree.leaves(eqx.filter(_member(trained, 2), eqx.is_array)),
        jax.tree.leaves(eqx.filter(alone, eqx.is_array)),
        strict=True,
    )
    for a, b in leaves:
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_a_fixed_loop_stays_a_loop_in_an_ensemble():
    data, make = _problem("mlp")
    keys = jax.random.split(jax.random.key(5), 2)
    models = eqx.filter_vmap(make)(keys)
    trainer = _ensemble_trainer(data, program="loop")
    _, history = _train_all(trainer, models, keys, "argument")
    assert history.program.startswith("loop")
    assert "fixed by the user" in history.program


def test_members_are_split_and_stacked_again():
    tree = {
        "own": jnp.arange(6.0).reshape(3, 2),
        "keys": jax.random.split(jax.random.key(0), 3),
        "shared": jnp.arange(5),
    }
    mapped = {"own": 0, "keys": 0, "shared": None}
    members = split_members(tree, mapped, 3)
    assert members[2]["own"].tolist() == [4.0, 5.0]
    assert members[1]["shared"] is tree["shared"]
    stacked = stack_members([{k: m[k] for k in ("own", "keys")} for m in members])
    assert (stacked["own"] == tree["own"]).all()
    assert (stacked["keys"] == tree["keys"]).all()


def test_members_run_at_the_same_time(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    # Passes only if both calls are under way at once.
    meet = threading.Barrier(2, timeout=20)

    def program(x, y):
        meet.wait()
        return x + y

    assert run_side_by_side(program, [(1, 2), (3, 4), (5, 6), (7, 8)]) == [3, 7, 11, 15]


def test_an_error_of_a_member_reaches_the_caller():
    def program(x):
        raise RuntimeError(f"member {x}")

    with pytest.raises(RuntimeError, match="member 0"):
        run_side_by_side(program, [(0,), (1,)])


def _sleeps(seconds, first=0.0):
    asked = []

    def run(count):
        asked.append(count)
        time.sleep(seconds * count + (first if len(asked) == 1 else 0.0))

    run.asked = asked
    return run


@pytest.mark.parametrize(("vmapped", "apart"), [(0.001, 0.004), (0.004, 0.001)])
def test_the_faster_form_of_an_ensemble_is_taken(vmapped, apart):
    together = _sleeps(vmapped)
    chosen, reason = faster_for_members(together, _sleeps(apart), 10**6, 64)
    assert chosen == (vmapped < apart)
    assert "measured" in reason
    assert max(together.asked) <= 64


def test_a_short_run_is_not_measured():
    together = _sleeps(0.0)
    chosen, reason = faster_for_members(together, _sleeps(1e-3, first=0.2), 100, 64)
    assert not chosen and not together.asked
    assert "too short to earn back" in reason


def _member(tree, i):
    return jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, tree)
