"""Networks of Flax and Keras in our step, beside loops written for these packages."""

import os
import subprocess
import sys
from typing import Literal

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx

import trainax_pk as tx
from trainax_pk import experiment as tx_experiment
from trainax_pk.data import ShuffledOrder, Windows
from trainax_pk.experiment import _artifact, _spec
from trainax_pk.framework import from_flax, from_keras, to_flax, to_keras
from trainax_pk.step import stream_key

DATA = tx.sample_data.lorenz_rk4(4, temporal_horizon=12, key=jax.random.key(0))
FIELDS = tx.sample_data.advection_1d_periodic(
    num_points=12, num_samples=4, temporal_horizon=8, key=jax.random.key(1)
)
KEY = jax.random.key(7)
NUM_STEPS = 8


@pytest.fixture(autouse=True)
def _double_precision():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    # Keras's own code adds biases across ranks.
    with jax.numpy_rank_promotion("allow"):
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class FlaxNet(nnx.Module):
    """Everything at once: parameters, statistics, random streams, a constant."""

    def __init__(self, rngs, *, channels=None, norm=True, rate=0.2):
        double = {"rngs": rngs, "param_dtype": jnp.float64, "dtype": jnp.float64}
        if channels is None:
            self.first = nnx.Linear(3, 8, use_bias=not norm, **double)
            self.last = nnx.Linear(8, 3, **double)
        else:
            circular = {"padding": "CIRCULAR", **double}
            self.first = nnx.Conv(channels, 8, 3, use_bias=not norm, **circular)
            self.last = nnx.Conv(8, channels, 3, **circular)
        self.norm = nnx.BatchNorm(8, momentum=0.9, **double) if norm else None
        if norm:
            # Flax keeps statistics in single precision whatever it is told.
            self.norm.mean = nnx.BatchStat(jnp.zeros(8))
            self.norm.var = nnx.BatchStat(jnp.ones(8))
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else None
        self.scale = nnx.Variable(jnp.full((), 0.5))

    def __call__(self, u):
        h = self.first(u)
        h = h if self.norm is None else self.norm(h)
        h = jnp.tanh(h)
        h = h if self.dropout is None else self.dropout(h)
        return u + self.scale * self.last(h)


def keras_net(*, channels=None, norm=True, rate=0.2, name=None):
    """Likewise, of Keras."""
    keras.utils.set_random_seed(3)
    K = keras.layers
    if channels is None:
        inputs = keras.Input((3,))
        first, last = K.Dense(8, use_bias=not norm), K.Dense(3)
    else:
        inputs = keras.Input((12, channels))
        same = {"kernel_size": 3, "padding": "same"}
        first = K.Conv1D(8, use_bias=not norm, **same)
        last = K.Conv1D(channels, **same)
    h = first(inputs)
    h = K.BatchNormalization(momentum=0.9)(h) if norm else h
    h = K.ReLU()(h)
    h = K.Dropout(rate, seed=5)(h) if rate else h
    return keras.Model(inputs, K.Add()([inputs, K.Rescaling(0.5)(last(h))]), name=name)


def batches(data, num_rollout_steps=1, size=8):
    windows = Windows(data, num_rollout_steps)
    order = ShuffledOrder(len(windows), size, KEY)
    return [windows[order.indices(i, 1)[0]].state for i in range(NUM_STEPS)]


def ours(model, data, configuration=None, **options):
    """Losses and the last state of our step."""
    optimizer = optax.adam(1e-2)
    configuration = configuration or tx.configuration.Supervised()
    state = tx.TrainState.create(model, optimizer, key=KEY)
    step = jax.jit(tx.make_train_step(configuration, optimizer, **options))
    losses = []
    for batch in batches(data, configuration.num_rollout_steps):
        state, info = step(state, batch)
        losses.append(float(info.loss))
    assert step._cache_size() == 1  # one trace
    return np.array(losses), state


def first_key(i, t, size=8):
    """What the first sample of a batch gets at update i and time t."""
    key = stream_key(KEY, "train", i)
    return jax.random.split(jax.random.fold_in(key, t), size)[0]


def reseed(module, key):
    """The documented seeding: stream n, by name, begins at fold_in(key, n)."""
    keys, counts = nnx.state(module, nnx.RngKey, nnx.RngCount)
    leaves, treedef = jax.tree.flatten(keys)
    new = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    nnx.update(module, treedef.unflatten(new), jax.tree.map(jnp.zeros_like, counts))


def flax_loop(module, data, *, last=False, num_rollout_steps=1):
    """As one writes it with Flax and optax, without anything of ours."""
    tx_ = optax.adam(1e-2)
    opt_state = tx_.init(nnx.state(module, nnx.Param))

    def loss_fn(params, rest, graph, u, key):
        module = nnx.merge(graph, params, rest, copy=True)
        total, v = 0.0, to_last(u[:, 0], last)
        for t in range(num_rollout_steps):
            reseed(module, jax.random.split(jax.random.fold_in(key, t), 8)[0])
            v = module(v)
            total += jnp.mean((v - to_last(u[:, t + 1], last)) ** 2)
        return total, nnx.split(module, nnx.Param, ...)[2]

    graph = nnx.graphdef(module)
    grad_fn = jax.jit(
        lambda *args: jax.value_and_grad(loss_fn, has_aux=True)(
            *args[:2], graph, *args[2:]
        )
    )
    losses = []
    for i, u in enumerate(batches(data, num_rollout_steps)):
        _, params, rest = nnx.split(module, nnx.Param, ...)
        (loss, rest), grads = grad_fn(params, rest, u, stream_key(KEY, "train", i))
        updates, opt_state = jax.jit(tx_.update)(grads, opt_state, params)
        nnx.update(module, optax.apply_updates(params, updates), rest)
        losses.append(float(loss))
    return np.array(losses)


def to_last(u, last):
    return jnp.moveaxis(u, 1, -1) if last else u


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"norm": False, "rate": 0.0}, 1), ({"channels": 1}, 2)],
)
def test_flax_trains_as_in_a_loop_of_flax(options, steps):
    fields = "channels" in options
    data = FIELDS if fields else DATA
    model = from_flax(FlaxNet(nnx.Rngs(0), **options), channels_last=fields)
    losses, state = ours(model, data, tx.configuration.Supervised(steps))
    theirs = FlaxNet(nnx.Rngs(0), **options)
    expected = flax_loop(theirs, data, last=fields, num_rollout_steps=steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    back = nnx.state(to_flax(state.model), nnx.Not(nnx.RngState))
    wanted = nnx.state(theirs, nnx.Not(nnx.RngState))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
        back, wanted,
    )  # fmt: skip


def test_only_params_train_and_statistics_move():
    model = from_flax(FlaxNet(nnx.Rngs(0)))
    assert model.stochastic and model.state is not None
    names = ["first.kernel", "last.bias", "last.kernel", "norm.bias", "norm.scale"]
    assert sorted(model.module.params) == names
    state = tx.TrainState.create(model, optax.sgd(0.1), key=KEY)
    assert len(jax.tree.leaves(state.params)) == len(names)
    configuration = tx.configuration.Supervised()
    _, aux = configuration(model, batches(DATA)[0], key=KEY)
    before = to_flax(model)
    after = to_flax(eqx.tree_at(lambda m: m.state, model, aux.model_state))
    assert float(after.scale[...]) == 0.5
    assert not np.allclose(before.norm.mean[...], after.norm.mean[...])


def keras_loop(model, data, *, last=False):
    """As Keras's guide to JAX writes it: stateless_call and optax."""
    tx_ = optax.adam(1e-2)
    weights = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]
    seeded = [v.name == "seed_generator_state" for v in model.non_trainable_variables]
    opt_state = tx_.init(weights)

    def loss_fn(weights, rest, u):
        prediction, rest = model.stateless_call(
            weights, rest, to_last(u[:, 0], last), training=True
        )
        return jnp.mean((prediction - to_last(u[:, 1], last)) ** 2), rest

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    losses = []
    for i, u in enumerate(batches(data)):
        words = jax.random.key_data(jax.random.fold_in(first_key(i, 0), 0))
        rest = [words if s else x for s, x in zip(seeded, rest, strict=True)]
        (loss, rest), grads = grad_fn(weights, rest, u)
        updates, opt_state = jax.jit(tx_.update)(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append(float(loss))
    return (
        np.array(losses),
        weights,
        [x for s, x in zip(seeded, rest, strict=True) if not s],
    )


@pytest.mark.parametrize("options", [{"norm": False, "channels": 1}, {}], ids=str)
def test_keras_trains_as_in_a_loop_of_keras(options):
    fields = "channels" in options
    data = FIELDS if fields else DATA
    network = keras_net(**options)
    model = from_keras(network, channels_last=fields)
    untouched = [v.value for v in network.variables]
    losses, state = ours(model, data)
    for a, b in zip(untouched, network.variables, strict=True):
        np.testing.assert_array_equal(a, b.value)
    expected, weights, rest = keras_loop(keras_net(**options), data, last=fields)
    # Keras normalises in single precision whatever it is told.
    exact = options.get("norm", True) is False
    np.testing.assert_allclose(losses, expected, rtol=1e-10 if exact else 1e-6)
    close = {"rtol": 1e-8, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-6}
    other = keras_net(**options)
    for target in (to_keras(state.model), to_keras(state.model, other)):
        found = [v.value for v in target.trainable_variables]
        for a, b in zip(found, weights, strict=True):
            np.testing.assert_allclose(a, b, **close)
        found = [v.value for v in target.non_trainable_variables]
        found = [x for x in found if x.dtype != jnp.uint32]
        for a, b in zip(found, rest, strict=True):
            np.testing.assert_allclose(a, b, **close)
    assert to_keras(state.model) is network


def make(kind):
    if kind == "flax":
        return from_flax(FlaxNet(nnx.Rngs(0)))
    return from_keras(keras_net())


both = pytest.mark.parametrize("kind", ["flax", "keras"])


def short_trainer(num_training_steps=8, **options):
    return tx.trainer.SupervisedTrainer(
        DATA, optimizer=optax.adam(1e-2), program="loop", batch_size=8, progress=False,
        num_training_steps=num_training_steps, **options,
    )  # fmt: skip


@both
def test_a_run_goes_on_with_the_same_bits(kind, tmp_path):
    trainer = short_trainer()
    alone, whole = trainer(make(kind), key=KEY)
    # Built anew, as another process would: names of layers differ, the run is the same.
    stop = tx.checkpoint.Segment(epochs=0.5)
    _, first = trainer(make(kind), key=KEY, run_dir=tmp_path, segment=stop)
    assert 0 < int(first.state.step) < 8
    model, history = trainer(make(kind), key=KEY, run_dir=tmp_path)
    np.testing.assert_array_equal(history.loss, whole.loss)
    leaves = (jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (alone, model))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    others = {
        "flax": lambda: from_flax(FlaxNet(nnx.Rngs(0), rate=0.3)),
        "keras": lambda: from_keras(keras_net(rate=0.3)),
    }
    with pytest.raises(tx.checkpoint.RunChanged, match=r"model\.module"):
        trainer(others[kind](), key=KEY, run_dir=tmp_path)


@both
def test_evaluation_has_neither_noise_nor_batch(kind):
    model = eqx.nn.inference_mode(make(kind))
    u = jnp.asarray(DATA[0, :5])
    keys = jax.random.split(KEY, 5)
    alone = jnp.stack([model(x, key=k) for x, k in zip(u, keys, strict=True)])
    mapped = jax.vmap(lambda x: model(x, key=KEY), axis_name="batch")(u)
    np.testing.assert_allclose(alone, mapped, rtol=1e-12)
    network = to_flax(model) if kind == "flax" else to_keras(model)
    expected = (
        network(u, training=False) if kind == "keras" else call_evaluated(network, u)
    )
    np.testing.assert_allclose(alone, expected, rtol=1e-12)
    step = tx.make_eval_step(tx.configuration.Supervised(3))
    state = tx.TrainState.create(make(kind), optax.sgd(0.1), key=KEY)
    batch = batches(DATA, 3)[0]
    first = step(state, batch)
    second = step(eqx.tree_at(lambda s: s.key, state, jax.random.key(99)), batch)
    np.testing.assert_array_equal(first[0], second[0])


def call_evaluated(module, u):
    module.eval()
    return module(u)


@both
def test_dropout_is_a_function_of_the_key(kind):
    network = {
        "flax": lambda: from_flax(FlaxNet(nnx.Rngs(0), norm=False, rate=0.5)),
        "keras": lambda: from_keras(keras_net(norm=False, rate=0.5)),
    }[kind]()
    u = jnp.ones((6, 3))

    def call(key):
        return jax.vmap(lambda x: network(x, key=key), axis_name="batch")(u)

    np.testing.assert_array_equal(call(KEY), call(KEY))
    assert not np.allclose(call(KEY), call(jax.random.key(8)))
    # One draw for a batch: its samples get masks of their own.
    assert len(np.unique(np.asarray(call(KEY)).round(9), axis=0)) > 1
    single = network(u[0], key=KEY)
    assert single.shape == (3,)


@both
def test_members_with_weights_of_their_own(kind):
    model = {
        "flax": lambda: from_flax(FlaxNet(nnx.Rngs(0), norm=False, rate=0.0)),
        "keras": lambda: from_keras(keras_net(norm=False, rate=0.0)),
    }[kind]()
    arrays, static = eqx.partition(model, eqx.is_array)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), arrays)

    def loss(arrays, batch):
        member = eqx.combine(arrays, static)
        return tx.configuration.Supervised(2)(member, batch)[0]

    batch = batches(DATA, 2)[0]
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(stacked, batch)
    grad = jax.jit(jax.grad(loss))
    for i in range(3):
        one = grad(jax.tree.map(lambda x: x[i], stacked), batch)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12),
            grads, one,
        )  # fmt: skip

    # Also where nothing but the weights is mapped, in what looks like a batch.
    u = jnp.asarray(DATA[0, 0])
    out = jax.vmap(
        lambda a: eqx.combine(a, static)(u), axis_name="batch"
    )(stacked)  # fmt: skip
    expected = [
        eqx.combine(jax.tree.map(lambda x: x[i], stacked), static)(u) for i in range(3)
    ]
    np.testing.assert_allclose(out, jnp.stack(expected), rtol=1e-12)


@both
def test_gradients_with_respect_to_one_state(kind):
    model = {
        "flax": lambda: from_flax(FlaxNet(nnx.Rngs(0), norm=False, rate=0.0)),
        "keras": lambda: from_keras(keras_net(norm=False, rate=0.0)),
    }[kind]()
    u = jnp.asarray(DATA[0, 0])
    jacobian = jax.jacrev(model)(u)
    step = 1e-4
    for i in range(3):
        d = jnp.zeros(3).at[i].set(step)
        numeric = (model(u + d) - model(u - d)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, i], numeric, rtol=1e-6, atol=1e-8)


@both
def test_rollouts_adjoints_and_options_of_the_step(kind):
    model = {
        "flax": lambda: from_flax(FlaxNet(nnx.Rngs(0), rate=0.0)),
        "keras": lambda: from_keras(keras_net(rate=0.0, norm=False)),
    }[kind]()
    batch = batches(DATA, 3)[0]
    found = []
    for adjoint in (tx.DirectAdjoint(), tx.RecursiveCheckpointAdjoint()):
        configuration = tx.configuration.Supervised(3, adjoint=adjoint)
        value_and_grad = eqx.filter_value_and_grad(configuration, has_aux=True)
        (loss, _), grads = eqx.filter_jit(value_and_grad)(model, batch)
        found.append((loss, *jax.tree.leaves(grads.module)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    out = tx.rollout(eqx.nn.inference_mode(model), jnp.asarray(DATA[0, 0]), 4)
    assert out.shape == (4, 3) and bool(jnp.isfinite(out).all())
    losses, _ = ours(model, DATA, accumulate=2, max_grad_norm=1.0)
    assert losses[-1] < losses[0]


def test_flax_in_lower_precision():
    net = nnx.Linear(3, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    model = from_flax(net)
    exact, _ = ours(model, DATA, accumulate=2)
    rough, state = ours(model, DATA, accumulate=2, compute_dtype=jnp.bfloat16)
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(exact, rough, rtol=0.05)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state.params))


def test_keras_computes_in_its_own_precision():
    with pytest.raises(ValueError, match=r"weights of float64.*mixed_bfloat16"):
        ours(
            from_keras(keras_net(norm=False, rate=0.0)),
            DATA,
            compute_dtype=jnp.bfloat16,
        )


class Conditioned(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, u, inputs):
        assert inputs.sample.ndim == u.ndim == 2
        return self.linear(jnp.concatenate([u, inputs.sample], -1))


def test_conditioned_networks():
    flax_model = from_flax(Conditioned(nnx.Rngs(0)), conditioned=True)
    u, p = keras.Input((3,)), keras.Input((1,))
    out = keras.layers.Dense(3)(keras.layers.Concatenate()([u, p]))
    keras_model = from_keras(keras.Model([u, p], out), conditioned=True)
    kernel = flax_model.module.params["linear.kernel"]
    keras_model = eqx.tree_at(lambda m: m.module.weights[0], keras_model, kernel)
    window = tx.Window(jnp.asarray(DATA[:, :2]), sample=jnp.arange(4.0)[:, None] / 3)
    losses = [
        tx.configuration.Supervised()(m, window)[0] for m in (flax_model, keras_model)
    ]
    x = jnp.concatenate([window.state[:, 0], window.sample], -1)
    expected = jnp.mean((x @ kernel - window.state[:, 1]) ** 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


class OfOneSample(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, u):
        assert u.shape == (3,)
        return self.dropout(self.linear(u))


def test_a_module_of_one_sample():
    model = from_flax(OfOneSample(nnx.Rngs(0)), takes_batch=False)
    losses, _ = ours(model, DATA)
    assert np.isfinite(losses).all()
    u, keys = jnp.ones((2, 3)), jax.random.split(KEY, 2)
    together = jax.vmap(lambda x, k: model(x, key=k), axis_name="batch")(u, keys)
    alone = [model(x, key=k) for x, k in zip(u, keys, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-12)


def test_a_state_of_several_fields():
    class Coupled(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, u):
            return {"a": self.linear(u["b"]), "b": u["a"]}

    data = {"a": DATA, "b": 2 * DATA}
    windows = Windows(data, 2)
    model = from_flax(Coupled(nnx.Rngs(0)))
    loss, _ = tx.configuration.Supervised(2)(model, windows[[3, 5]])
    u, total = windows[[3, 5]].state, 0.0
    v = {k: x[:, 0] for k, x in u.items()}
    kernel = model.module.params["linear.kernel"]
    for t in (1, 2):
        v = {"a": v["b"] @ kernel, "b": v["a"]}
        total += np.mean([np.mean((v[k] - u[k][:, t]) ** 2) for k in "ab"])
    np.testing.assert_allclose(loss, total, rtol=1e-12)


def test_shared_weights_stay_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)
            self.b = self.a

        def __call__(self, u):
            return self.b(self.a(u))

    model = from_flax(Twice(nnx.Rngs(0)))
    assert len(model.module.params) == 2
    _, state = ours(model, DATA)
    back = to_flax(state.model)
    assert back.a is back.b


def test_layers_that_are_stacked_draw_for_themselves():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, u):
            return self.dropout(self.linear(u))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.blocks = nnx.split_rngs(splits=4)(make)(rngs)

        def __call__(self, u):
            every = nnx.vmap(lambda block, u: block(u), in_axes=(0, None))
            return every(self.blocks, u).sum(axis=0)

    model = from_flax(Stack(nnx.Rngs(0)))
    kernel = model.module.params["blocks.linear.kernel"]
    # Of equal layers, those that are kept differ.
    model = eqx.tree_at(
        lambda m: m.module.params["blocks.linear.kernel"],
        model,
        jnp.broadcast_to(jnp.eye(3), kernel.shape),
    )
    kept = np.stack([model(jnp.ones(3), key=jax.random.key(i)) / 2 for i in range(8)])
    assert set(np.unique(kept)) > {1, 2, 3}
    losses, _ = ours(model, DATA)
    assert np.isfinite(losses).all()


@both
def test_networks_of_mixed_precision_answer_in_that_of_the_state(kind):
    if kind == "flax":
        net = nnx.Linear(3, 3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        model = from_flax(net)
    else:
        dense = keras.layers.Dense(3, dtype="mixed_bfloat16")
        dense.build((None, 3))
        model = from_keras(dense)
    u = jnp.array([0.1, 0.7, -0.3], jnp.float32)
    out = model(u)
    assert out.dtype == jnp.float32
    if kind == "keras":
        state, sample = keras.Input((3,)), keras.Input((2,))
        both = keras.layers.Concatenate()([state, sample])
        layer = keras.layers.Dense(3, dtype="mixed_bfloat16")
        net = from_keras(keras.Model([state, sample], layer(both)), conditioned=True)
        assert net(u, tx.Inputs(sample=u[:2])).dtype == jnp.float32
    np.testing.assert_array_equal(out, out.astype(jnp.bfloat16))
    # Of another precision than the weights, it stays what it is.
    assert model(u.astype(jnp.float64)).dtype != jnp.float64


class DrawsInEvaluation(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)
        self.rngs = rngs

    def __call__(self, u):
        return self.linear(u) + jax.random.normal(self.rngs.noise(), u.shape)


def test_networks_that_draw_in_evaluation_use_the_key():
    model = from_flax(DrawsInEvaluation(nnx.Rngs(0, noise=1)))
    operator, u = tx_experiment.Operator(model, {}), jnp.ones(3)
    one, other = jax.random.split(KEY)
    stepper = tx.Stepper(operator, stochastic=True)
    for call in (operator, stepper):
        assert not np.allclose(call(u, key=one), call(u, key=other))
        np.testing.assert_array_equal(call(u, key=one), model(u, key=one))
    np.testing.assert_array_equal(operator(u), operator(u))
    # Each test trajectory of a run has its own draws.
    test = jnp.asarray(DATA[:2])
    keys = jax.random.split(jax.random.key(0), 2)
    predicted = [
        tx.rollout(model, u, test.shape[1] - 1, key=k)
        for u, k in zip(test[:, 0], keys, strict=True)
    ]
    expected = tx.metrics.nrmse_per_lead_time(jnp.stack(predicted), test[:, 1:])
    found, _ = _artifact._test_errors(model, test)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


class Noisy(tx_experiment.AbstractSpec):
    """Of Flax, with statistics and dropout, and of Keras likewise."""

    kind: Literal["noisy"] = "noisy"
    package: Literal["flax", "keras"]

    def build(self, shape, key):
        if self.package == "flax":
            return from_flax(FlaxNet(nnx.Rngs(key)))
        keras.utils.set_random_seed(int(jax.random.bits(key, dtype="uint32")))
        dense = keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1)
        return from_keras(keras.Sequential([keras.Input(shape), *dense]))


@both
def test_a_run_file_trains_a_network_that_draws(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(_spec._KINDS["model"], "noisy", Noisy)
    run = tx_experiment.read_run(f"""
        precision: float64
        data: {{kind: lorenz_63, num_samples: 10, temporal_horizon: 6}}
        model: {{kind: noisy, package: {kind}}}
        configuration: supervised
        optimizer: {{kind: sgd, learning_rate: 1e-5}}
        training: {{num_steps: 2, batch_size: 8}}
    """)
    model, _, artifact = tx_experiment.train(run, tmp_path)
    assert np.isfinite(artifact["results"]["test_nrmse_geometric_mean"])
    operator, u = tx_experiment.load_operator(tmp_path), jnp.ones(3)
    # Evaluated, without a key, though the model draws.
    expected = eqx.nn.inference_mode(model)(u, key=KEY)
    np.testing.assert_array_equal(operator(u), expected)
    assert tx.rollout(operator, u, 2).shape == (2, 3)
    assert operator.model.stochastic
    assert tx_experiment.reproduce(tmp_path).is_identical


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, u):
        self.new = nnx.Variable(u)
        return self.linear(u)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: from_flax(lambda u: u), r"module of Flax NNX, got function.*nnx\.Module"),
        (lambda: from_flax(flax.linen.Dense(3)), r"got Dense.*ToNNX"),
        (lambda: from_flax(nnx.Dropout(0.1)), r"parameters to train.*rngs=nnx\.Rngs"),
        (lambda: from_flax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), channels_last=1),
         "`channels_last` to be True or False"),
        (lambda: from_flax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), takes_batch=1),
         "`takes_batch` to be True or False"),
        (lambda: from_flax(Sows(nnx.Rngs(0)))(jnp.ones(3)), "changes of .*new"),
        (lambda: from_flax(FlaxNet(nnx.Rngs(0)))(jnp.ones(3), KEY, key=KEY),
         "average over a batch.*inference_mode"),
        (lambda: to_flax(from_keras(keras_net())), "made by from_flax, got Stepper"),
        (lambda: to_flax(nnx.Linear(3, 3, rngs=nnx.Rngs(0))), "from_flax, got Linear"),
        (lambda: from_keras(lambda u: u), r"model of Keras, got function.*keras\.Input"),
        (lambda: from_keras(keras.layers.Dense(3)), "that is not built"),
        (lambda: from_keras(keras.Sequential([keras.Input((3,))])), "variables to train"),
        (lambda: from_keras(keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(3, kernel_regularizer="l2")])),
         "losses of its own, got 1.*adamw"),
        (lambda: from_keras(keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(3, activity_regularizer="l2")]))(
                jnp.ones(3)),
         "losses of its own, got 1.*add_loss"),
        (lambda: from_keras(keras_net(), channels_last=None), "`channels_last` to be True"),
        (lambda: from_keras(keras_net())(jnp.ones(3), KEY, key=KEY),
         "average over a batch.*inference_mode"),
        (lambda: to_keras(from_flax(FlaxNet(nnx.Rngs(0)))), "made by from_keras"),
        (lambda: to_keras(from_keras(keras_net()), keras_net(norm=False)), "`into`"),
    ],
)  # fmt: skip
def test_refusals(call, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        call()


@both
def test_a_network_of_another_size_is_refused_before_compute(kind):
    model = {
        "flax": lambda: from_flax(nnx.Linear(3, 4, rngs=nnx.Rngs(0))),
        "keras": lambda: from_keras(
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        ),
    }[kind]()
    with pytest.raises(ValueError, match="must keep shape"):
        tx.configuration.Supervised()(model, jnp.asarray(DATA[:, :2]))
    if kind == "flax":
        with pytest.raises(ValueError, match="to map a state"):
            tx.configuration.Supervised()(model, jnp.ones((4, 2, 5)))


def test_extras_that_are_missing_are_named(monkeypatch):
    run = tx_experiment.read_run("""
        precision: float64
        data: {kind: lorenz_63}
        model: mlp
        configuration: supervised
        optimizer: {kind: sgd, learning_rate: 0.1}
        training: {num_steps: 1, batch_size: 1}
    """)
    for name, extra, call in (
        ("flax", "flax", lambda: from_flax(None)),
        ("keras", "keras", lambda: from_keras(None)),
        ("torch", "lightning", lambda: tx_experiment.to_lightning(run, None)),
    ):
        with monkeypatch.context() as patch:
            loaded = [m for m in sys.modules if m.split(".")[0] == name]
            for module in {name, *loaded}:
                patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"trainax_pk\[{extra}\]"):
                call()


def test_libraries_are_imported_when_asked_for_and_backends_refused():
    code = (
        "import sys, trainax_pk as tx, trainax_pk.experiment\n"
        "print({'flax', 'keras', 'torch', 'lightning'} & set(sys.modules))\n"
        "import keras\n"
        "net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])\n"
        "try:\n    tx.framework.from_keras(net)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"}, timeout=120,
    )  # fmt: skip
    first, rest = found.stdout.split("\n", 1)
    assert first == "set()"
    assert "got the backend 'numpy'. Set os.environ['KERAS_BACKEND']" in rest
