"""The engine: both families agree, chunks do not matter, nothing retraces."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.engine import ChunkClock, Engine, _chunks, inspect_work, make_feed
from trainax_pk.engine._choice import choose

DATA = jax.random.normal(jax.random.key(0), (4, 9, 1, 12))
OPTIMIZER = optax.adam(1e-2)


def conv(key=jax.random.key(1)):
    return eqx.nn.Conv1d(1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=key)


def make_engine(program="auto", residency="device", step=None, num_rollout_steps=2):
    configuration = tx.configuration.Supervised(num_rollout_steps)
    step = step or tx.make_train_step(configuration, OPTIMIZER)
    windows = tx.data.Windows(DATA, num_rollout_steps, residency=residency)
    order = tx.data.ShuffledOrder(len(windows), 5, jax.random.key(2))
    engine = Engine(step, make_feed(windows), num_updates=40, program=program)
    return engine, order, windows, step


def by_hand(step, windows, order, state, count):
    losses = []
    for i in range(count):
        batch = windows[np.asarray(order.indices(i, 1)[0])]
        state, info = jax.jit(step)(state, batch)
        losses.append(info.loss)
    return state, jnp.stack(losses)


def new_state(key=jax.random.key(3)):
    return tx.TrainState.create(conv(), OPTIMIZER, key=key)


@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("program", ["loop", "scan"])
def test_equals_a_loop_by_hand(program, residency):
    engine, order, windows, step = make_engine(program, residency)
    expected, losses = by_hand(step, windows, order, new_state(), 13)
    state, records = engine.run(new_state(), order, 0, 13, 16)
    np.testing.assert_allclose(records["loss"], losses, rtol=1e-12)
    for a, b in zip(
        jax.tree.leaves(expected.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert int(state.step) == 13


@pytest.mark.parametrize("program", ["loop", "scan"])
def test_chunks_agree_bitwise(program):
    engine, order, _, _ = make_engine(program)
    whole, records = engine.run(new_state(), order, 0, 12, 12)
    state, parts = new_state(), []
    for start, count in ((0, 1), (1, 7), (8, 4)):
        state, part = engine.run(state, order, start, count, 12)
        parts.append(part["loss"])
    assert np.array_equal(np.concatenate(parts), records["loss"])
    assert eqx.tree_equal(
        eqx.tree_at(lambda s: s.key, whole, None),
        eqx.tree_at(lambda s: s.key, state, None),
    )


def test_host_and_device_batches_agree_bitwise():
    device, order, _, _ = make_engine("scan", "device")
    host, _, _, _ = make_engine("scan", "host")
    a, _ = device.run(new_state(), order, 0, 9, 9)
    b, _ = host.run(new_state(), order, 0, 9, 9)
    assert np.array_equal(a.params.weight, b.params.weight)


def test_one_trace_for_all_chunk_lengths_and_learning_rates():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    step = tx.make_train_step(tx.configuration.Supervised(2), optimizer)
    engine, order, _, _ = make_engine("scan", step=step)
    state = tx.TrainState.create(conv(), optimizer, key=jax.random.key(0))
    for start, count in ((0, 5), (5, 16), (21, 1)):
        state, _ = engine.run(state, order, start, count, 16)
        state = eqx.tree_at(
            lambda s: s.opt_state.hyperparams["learning_rate"],
            state,
            state.opt_state.hyperparams["learning_rate"] * 0.5,
        )
    state = jax.tree.map(
        lambda x: (
            x
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else jnp.asarray(np.asarray(x))
        ),
        state,
    )
    engine.run(state, order, 22, 3, 16)
    assert engine.num_traces == 1


def test_optimizers_with_weak_types_can_be_scanned():
    def update(grads, state, params=None):
        del params
        return jax.tree.map(lambda g: -0.1 * g, grads), state * 0 + 1.0

    optimizer = optax.GradientTransformation(lambda p: jnp.zeros(()), update)
    step = tx.make_train_step(tx.configuration.Supervised(2), optimizer)
    engine, order, _, _ = make_engine("scan", step=step)
    state = tx.TrainState.create(conv(), optimizer, key=jax.random.key(0))
    state, _ = engine.run(state, order, 0, 3, 3)
    assert float(state.opt_state) == 1.0


@pytest.mark.parametrize("seconds", [0.001, 0.7, 5.0])
def test_chunks_are_bounded_by_time(seconds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_chunks.time, "perf_counter", lambda: now[0])
    clock, lengths = ChunkClock(), []
    for i in range(6):
        lengths.append(clock.limit(1000))
        clock.begin()
        now[0] += seconds * lengths[-1] + (8.0 if i == 0 else 0.0)
        clock.end(lengths[-1])
    # Beyond two seconds there is one update at a time, and the first compiles.
    assert all(n == 1 or n * seconds <= 2.0 for n in lengths)
    assert lengths[0] == lengths[1] == 1
    assert lengths[2:] == [min(1000, max(1, int(2 / seconds)))] * 4


def test_work_is_counted_through_loops():
    def f(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    work = inspect_work(jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 3))))
    assert work.multiply_adds == 7 * 2 * 3 * 3
    assert not work.convolutions and not work.ffts


def test_work_counts_convolutions_and_ffts():
    model = conv()
    jaxpr = jax.make_jaxpr(lambda u: jnp.fft.rfft(model(u)))
    work = inspect_work(jaxpr(jnp.ones((1, 12))))
    assert work.convolutions and work.ffts
    assert work.multiply_adds == 12 * 3


def test_choice_by_measurement_takes_the_faster():
    def sleeper(seconds):
        def run(count):
            for _ in range(count):
                jax.numpy.zeros(()).block_until_ready()
                _busy(seconds)
            return jnp.zeros(())

        return run

    slow, fast = sleeper(2e-3), sleeper(2e-4)
    choice = choose({"loop": slow, "scan": fast}, num_updates=10**6, certain=None)
    assert choice.family == "scan" and set(choice.seconds_per_update) == {
        "loop",
        "scan",
    }
    choice = choose({"loop": fast, "scan": slow}, num_updates=10**6, certain=None)
    assert choice.family == "loop"


def _busy(seconds):
    now = time.perf_counter
    until = now() + seconds
    while now() < until:
        pass


def test_matrix_products_are_scanned_without_measuring():
    model = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.key(0))
    windows = tx.data.Windows(jax.random.normal(jax.random.key(0), (4, 9, 3)), 1)
    order = tx.data.ShuffledOrder(len(windows), 4, jax.random.key(0))
    step = tx.make_train_step(tx.configuration.Supervised(), OPTIMIZER)
    engine = Engine(step, make_feed(windows), num_updates=10)
    state = tx.TrainState.create(model, OPTIMIZER, key=jax.random.key(0))
    engine.run(state, order, 0, 10, 10)
    assert engine.choice.family == "scan" and not engine.choice.seconds_per_update
    assert engine.num_traces == 1


def test_unknown_program_is_refused():
    with pytest.raises(ValueError, match="'auto', 'loop' or 'scan', got 'fast'"):
        make_engine("fast")


def test_unrolling_changes_rounding_only():
    step = tx.make_train_step(tx.configuration.Supervised(5), OPTIMIZER)
    windows = tx.data.Windows(DATA, 5)
    order = tx.data.ShuffledOrder(len(windows), 4, jax.random.key(0))
    short = Engine(step, make_feed(windows), num_updates=10, program="scan")
    long = Engine(step, make_feed(windows), num_updates=10**6, program="scan")
    a, _ = short.run(new_state(), order, 0, 8, 8)
    b, _ = long.run(new_state(), order, 0, 8, 8)
    np.testing.assert_allclose(a.params.weight, b.params.weight, rtol=1e-12)
