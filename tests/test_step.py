"""The train step against hand-written loops, and under every transformation."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import trainax_pk as tx
from trainax_pk.step import stream_key

C = tx.configuration
KEY = jax.random.key(5)


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.1, 0.7, shape))


WINDOWS = _data(8, 3, 3)
BATCHES = _data(6, 8, 3, 3, seed=1)
TWO = C.Supervised(2, time_level_weights=jnp.array([0.4, 1.3]))


class Net(eqx.Module):
    """A small nonlinear stepper with an integer buffer."""

    first: jax.Array
    last: jax.Array
    order: jax.Array

    def __call__(self, u):
        return u + self.last @ jnp.tanh(self.first @ u[self.order])


def _net(seed=0, dtype=float):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return Net(
        0.6 * jax.random.normal(k1, (4, 3), dtype),
        0.3 * jax.random.normal(k2, (3, 4), dtype),
        jnp.array([2, 0, 1]),
    )


NET = _net()

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _loss(model, windows):
    """The loss of `TWO`, from its formula."""
    total = 0.0
    u = windows[:, 0]
    for t, weight in ((1, 0.4), (2, 1.3)):
        u = jax.vmap(model)(u)
        total += weight * jnp.mean((u - windows[:, t]) ** 2)
    return total


def _run(optimizer, *, batches=BATCHES, net=NET, create=None, configuration=TWO, **how):
    """Updates over batches: the last state, and the infos stacked."""
    state = tx.TrainState.create(net, optimizer, key=KEY, **(create or {}))
    step = tx.make_train_step(configuration, optimizer, **how)
    return _jit(lambda s, b: jax.lax.scan(step, s, b))(state, batches)


def _by_hand(optimizer, net=NET, batches=BATCHES):
    """The loop that one would write with optax and equinox."""
    params, static = eqx.partition(net, eqx.is_inexact_array)
    opt_state = optimizer.init(params)

    @_jit
    def update(params, opt_state, batch):
        loss = lambda p: _loss(eqx.combine(p, static), batch)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, grads

    losses, norms, path = [], [], []
    for batch in batches:
        params, opt_state, value, grads = update(params, opt_state, batch)
        losses.append(value)
        norms.append(_norm(grads))
        path.append(params)
    return params, jnp.stack(losses), jnp.stack(norms), path


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def _assert_close(a, b, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


OPTIMIZERS = {
    "adam": optax.adam(3e-2),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw, schedule": optax.adamw(optax.cosine_decay_schedule(0.05, 4), 0.9),
    "clipped chain": optax.chain(optax.clip(0.02), optax.rmsprop(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_a_loop_by_hand(name):
    optimizer = OPTIMIZERS[name]
    state, infos = _run(optimizer)
    params, losses, norms, _ = _by_hand(optimizer)
    _assert_close(state.params, params)
    np.testing.assert_allclose(infos.loss, losses, rtol=1e-12)
    np.testing.assert_allclose(infos.grad_norm, norms, rtol=1e-12)
    assert infos.aux.time_losses.shape == (6, 2)
    assert state.step == 6 and state.num_skipped == 0
    assert not infos.skipped.any() and infos.learning_rate is None


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_are_the_whole_batch(parts):
    optimizer = optax.adam(3e-2)
    whole, expected = _run(optimizer)
    state, infos = _run(optimizer, accumulate=parts)
    _assert_close(state.params, whole.params)
    np.testing.assert_allclose(infos.loss, expected.loss, rtol=1e-12)
    np.testing.assert_allclose(infos.grad_norm, expected.grad_norm, rtol=1e-12)
    np.testing.assert_allclose(
        infos.aux.time_losses, expected.aux.time_losses, rtol=1e-12
    )


def test_accumulation_splits_every_part_of_a_window_alike():
    model = tx.Stepper(lambda u, i: NET(u) * i.sample + i.time, conditioned=True)
    optimizer = optax.sgd(0.1)
    # Something to train beside the functions above.
    model = eqx.tree_at(lambda m: m.module, model, _Forced(NET))
    batch = tx.Window(WINDOWS, 1 + _data(8, 1, seed=2), _data(8, 3, 3, seed=3))
    batches = jax.tree.map(lambda x: x[None], batch)
    composite = C.Composite([TWO, C.Supervised(1)], [1.0, 0.3])
    whole, expected = _run(
        optimizer, batches=batches, net=model, configuration=composite
    )
    state, infos = _run(
        optimizer, batches=batches, net=model, configuration=composite, accumulate=4
    )
    _assert_close(state.params, whole.params)
    np.testing.assert_allclose(infos.aux.parts, expected.aux.parts, rtol=1e-12)


class _Forced(eqx.Module):
    net: Net

    def __call__(self, u, inputs):
        return self.net(u) * inputs.sample + inputs.time


def test_memory_of_accumulation_is_that_of_a_part():
    net = eqx.nn.MLP(3, 3, 128, 3, key=KEY)
    optimizer = optax.sgd(0.1)
    state = tx.TrainState.create(net, optimizer, key=KEY)
    batch = jnp.zeros((256, 9, 3))

    def temporaries(parts):
        step = tx.make_train_step(C.Supervised(8), optimizer, accumulate=parts)
        compiled = jax.jit(step).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) <= 0.2 * temporaries(1)


@pytest.mark.parametrize("parts", [1, 2])
def test_clipping_is_that_of_optax_and_the_norm_that_before(parts):
    limit = 0.05
    state, infos = _run(optax.sgd(0.3), max_grad_norm=limit, accumulate=parts)
    chain = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(0.3))
    params, losses, norms, _ = _by_hand(chain)
    assert (norms > limit).any()
    _assert_close(state.params, params)
    np.testing.assert_allclose(infos.grad_norm, norms, rtol=1e-12)


def test_norms_neither_overflow_nor_divide_by_zero():
    net = _net(dtype=jnp.float32)
    scale = jnp.float32(1e25)  # Its square is not a float32.
    huge = C.Supervised(1, time_level_loss=lambda p, t: scale * jnp.mean((p - t) ** 2))
    batch = WINDOWS.astype("f4")[None]
    how = {"net": net, "batches": batch, "configuration": huge}
    state, infos = _run(optax.sgd(1.0), max_grad_norm=1e-3, **how)
    assert jnp.isfinite(infos.grad_norm).all() and not infos.skipped.any()
    moved = jax.tree.map(lambda a, b: a - b, state.params, net_params(net))
    np.testing.assert_allclose(_norm(moved), 1e-3, rtol=1e-4)
    nothing = C.Supervised(1, time_level_loss=lambda p, t: 0.0 * jnp.sum(p))
    how["configuration"] = nothing
    state, infos = _run(optax.sgd(1.0), max_grad_norm=1e-3, **how)
    _assert_close(state.params, net_params(net), rtol=0)
    assert infos.grad_norm == 0


def net_params(net):
    return eqx.filter(net, eqx.is_inexact_array)


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.999])
def test_the_average_is_the_recursion_with_warm_up(decay):
    optimizer = optax.adam(3e-2)
    state, _ = _run(optimizer, create={"ema": True}, ema_decay=decay)
    path = _by_hand(optimizer)[3]
    expected = jax.tree.map(np.asarray, net_params(NET))
    for n, params in enumerate(path, start=1):
        d = min(decay, (1 + n) / (10 + n))
        expected = jax.tree.map(
            lambda e, p: d * e + (1 - d) * np.asarray(p),  # noqa: B023
            expected,
            params,
        )
    _assert_close(state.ema, expected)
    _assert_close(state.params, path[-1])
    np.testing.assert_array_equal(state.ema_model.order, NET.order)
    np.testing.assert_array_equal(state.ema_model.first, state.ema.first)


TRAINABLE = {
    "function": lambda x: x.shape == (3, 4),
    "tree": Net(False, True, False),
    "tree of the model": Net(False, True, True),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_only_what_is_trainable_moves(name):
    # Weight decay would move whatever the optimizer is shown.
    optimizer = optax.adamw(0.05, weight_decay=0.5)
    state, _ = _run(optimizer, create={"trainable": TRAINABLE[name]})
    model = state.model
    np.testing.assert_array_equal(model.first, NET.first)
    np.testing.assert_array_equal(model.order, NET.order)
    assert model.order.dtype == NET.order.dtype
    assert jnp.all(model.last != NET.last)
    sizes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert sizes == {(3, 4), ()}

    frozen = lambda p: _loss(eqx.tree_at(lambda m: m.last, NET, p), BATCHES[0])  # noqa: E731
    updates, _ = optimizer.update(
        jax.grad(frozen)(NET.last), optimizer.init(NET.last), NET.last
    )
    one, _ = _run(optimizer, create={"trainable": TRAINABLE[name]}, batches=BATCHES[:1])
    np.testing.assert_allclose(one.model.last, NET.last + updates, rtol=1e-12)


def test_prefixes_say_what_is_trainable():
    model = eqx.nn.MLP(3, 3, 4, 1, key=KEY)
    prefix = jax.tree.map(
        lambda x: not isinstance(x, eqx.nn.Linear),
        model,
        is_leaf=lambda x: isinstance(x, eqx.nn.Linear),
    )
    prefix = eqx.tree_at(lambda m: m.layers[1], prefix, replace=True)
    state = tx.TrainState.create(model, optax.sgd(0.1), key=KEY, trainable=prefix)
    assert len(jax.tree.leaves(state.params)) == 2
    np.testing.assert_array_equal(state.params.layers[1].weight, model.layers[1].weight)
    everything = tx.TrainState.create(model, optax.sgd(0.1), key=KEY, trainable=True)
    assert len(jax.tree.leaves(everything.params)) == 4
    assert jax.tree.structure(state.model) == jax.tree.structure(model)


def test_numpy_leaves_are_arrays_like_others():
    def build(order):
        return Net(np.asarray(NET.first), NET.last, order)

    model = build(np.asarray(NET.order))
    state, _ = _run(optax.adam(3e-2), net=model)
    _assert_close(state.params, _run(optax.adam(3e-2))[0].params)
    assert isinstance(state.model.order, jax.Array)


class Rotation(eqx.Module):
    z: jax.Array

    def __call__(self, u):
        return jnp.stack([(self.z * jax.lax.complex(u[0], u[1])).real, u[1]])


def test_complex_leaves_descend_along_the_closed_form():
    # Mean over samples and 2 entries of (Re(z w) - r)²/2: the direction of steepest
    # descent is -(Re(z w) - r)·conj(w), the mean of which is taken.
    w = np.asarray(_data(8, 2, seed=4))
    r = np.asarray(_data(8, 2, seed=5))
    z, rate = 0.7 - 1.1j, 0.3
    windows = jnp.stack([jnp.asarray(w), jnp.asarray(r)], axis=1)
    optimizer = optax.sgd(rate)
    state, infos = _run(
        optimizer,
        net=Rotation(jnp.array(z)),
        batches=jnp.stack([windows] * 40),
        configuration=C.Supervised(1),
    )
    pairs = w[:, 0] + 1j * w[:, 1]
    for _ in range(40):
        error = (z * pairs).real - r[:, 0]
        z = z - rate * np.mean(error * np.conj(pairs))
    np.testing.assert_allclose(state.params.z, z, rtol=1e-12)
    assert (jnp.diff(infos.loss) < 0).all()


def test_complex_leaves_under_adam_and_clipping_descend():
    windows = jnp.stack([_data(8, 2, seed=4), _data(8, 2, seed=5)], axis=1)
    _, infos = _run(
        optax.adam(0.02),
        net=Rotation(jnp.array(1.5 - 2.0j)),
        batches=jnp.stack([windows] * 60),
        configuration=C.Supervised(1),
        max_grad_norm=0.5,
    )
    assert infos.loss[-1] < infos.loss[0] - 0.2
    assert (jnp.diff(infos.loss[:20]) < 0).all()


# Precision.


@pytest.mark.parametrize("parts", [1, 2])
def test_low_precision_is_inside_the_model_only(parts):
    seen = set()

    class Watched(eqx.Module):
        net: Net

        def __call__(self, u):
            seen.add((u["x"].dtype.name, self.net.first.dtype.name))
            return {"x": self.net(u["x"]), "y": (u["y"] + 1).astype(u["y"].dtype)}

    def loss(p, t):
        assert p["x"].dtype == jnp.float64 and p["y"].dtype == jnp.float32
        return jnp.mean((p["x"] - t["x"]) ** 2)

    batches = {"x": BATCHES[:2], "y": jnp.zeros((2, 8, 3, 1), jnp.float32)}
    configuration = C.Supervised(2, time_level_loss=loss)
    how = {"batches": batches, "net": Watched(NET), "configuration": configuration}
    exact, infos = _run(optax.sgd(0.1), **how)
    assert seen == {("float64", "float64")}
    seen.clear()
    state, low = _run(
        optax.sgd(0.1), compute_dtype=jnp.bfloat16, accumulate=parts, **how
    )
    assert seen == {("bfloat16", "bfloat16")}
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float64"}
    assert low.loss.dtype == low.grad_norm.dtype == jnp.float64
    assert 0 < abs(low.loss[1] - infos.loss[1]) <= 2e-2 * infos.loss[1]
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(exact.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=3e-2)


# Updates that are not finite.


def _poisoned(where):
    """Batches of which some hold a NaN."""
    return BATCHES.at[jnp.array(where), 0, 1, 0].set(jnp.nan)


def test_skip_leaves_the_update_out_and_counts_it():
    optimizer = optax.adam(3e-2)
    state, infos = _run(
        optimizer,
        batches=_poisoned([1, 4]),
        nonfinite="skip",
        create={"ema": True},
        ema_decay=0.5,
    )
    np.testing.assert_array_equal(infos.skipped, [0, 1, 0, 0, 1, 0])
    assert state.step == 6 and state.num_skipped == 2
    params, losses, _, _ = _by_hand(optimizer, batches=BATCHES[jnp.array([0, 2, 3, 5])])
    _assert_close(state.params, params)
    np.testing.assert_allclose(infos.loss[jnp.array([0, 2, 3, 5])], losses, rtol=1e-12)
    assert jnp.isnan(infos.loss[1])
    for leaf in jax.tree.leaves((state.opt_state, state.ema)):
        assert jnp.isfinite(leaf).all()


def test_raise_stops_at_the_last_good_update():
    optimizer = optax.adam(3e-2)
    state, infos = _run(optimizer, batches=_poisoned([2]))
    np.testing.assert_array_equal(infos.skipped, [0, 0, 1, 1, 1, 1])
    assert state.num_skipped == 4 and state.step - state.num_skipped == 2
    _assert_close(state.params, _by_hand(optimizer, batches=BATCHES[:2])[0])


def test_ignore_updates_all_the_same():
    state, infos = _run(optax.adam(3e-2), batches=_poisoned([2]), nonfinite="ignore")
    assert not infos.skipped.any() and state.num_skipped == 0
    assert jnp.isnan(state.params.first).all()
    clean, _ = _run(optax.adam(3e-2), nonfinite="ignore")
    _assert_close(clean.params, _by_hand(optax.adam(3e-2))[0])


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_caught():
    # sqrt has value 0 and an infinite slope there.
    kink = C.Supervised(1, time_level_loss=lambda p, t: jnp.sum(jnp.sqrt(0.0 * p**2)))
    for how in ({}, {"max_grad_norm": 1.0}, {"accumulate": 2}):
        state, infos = _run(optax.sgd(0.1), configuration=kink, nonfinite="skip", **how)
        assert jnp.isfinite(infos.loss).all() and infos.skipped.all()
        _assert_close(state.params, net_params(NET), rtol=0)


# Optimizers that evaluate the loss themselves.


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, u):
        return self.matrix @ u


LINE_SEARCHES = {
    "lbfgs": optax.lbfgs(memory_size=12),
    "zoom": optax.chain(
        optax.sgd(1.0),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=20),
    ),
    "backtracking": optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),
    ),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_line_searches_converge_on_a_quadratic(name, parts):
    windows = _data(8, 2, 3, seed=6) * jnp.array([[[1.0, 0.5, 2.0]]])
    inputs, outputs = np.asarray(windows[:, 0]), np.asarray(windows[:, 1])
    best = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    steps = {"lbfgs": 30, "zoom": 250, "backtracking": 1500}[name]
    state, infos = _run(
        LINE_SEARCHES[name],
        net=Linear(jnp.ones((3, 3))),
        batches=jnp.stack([windows] * steps),
        configuration=C.Supervised(1),
        accumulate=parts,
    )
    np.testing.assert_allclose(state.params.matrix, best, atol=1e-5)
    assert (jnp.diff(infos.loss) <= 1e-14).all()
    assert infos.learning_rate is None or infos.learning_rate.shape == (steps,)


# Layers with a state, and noise.


class Normed(eqx.Module):
    net: Net
    norm: eqx.nn.BatchNorm

    def __init__(self, net):
        self.net = net
        self.norm = eqx.nn.BatchNorm(
            3, "batch", momentum=0.8, mode="batch", dtype=jnp.float64
        )

    def __call__(self, u, state):
        u, state = self.norm(self.net(u), state)
        return u, state


def _normed():
    return tx.Stepper(*eqx.nn.make_with_state(Normed)(NET))


def _normed_by_hand(optimizer):
    stepper = _normed()
    params, static = eqx.partition(stepper.module, eqx.is_inexact_array)
    opt_state, layers = optimizer.init(params), stepper.state

    @_jit
    def update(params, opt_state, layers, windows):
        def loss(params, layers):
            model = eqx.combine(params, static)
            batched = jax.vmap(
                model, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
            )
            total, u = 0.0, windows[:, 0]
            for t, weight in ((1, 0.4), (2, 1.3)):
                u, layers = batched(u, layers)
                total += weight * jnp.mean((u - windows[:, t]) ** 2)
            return total, layers

        grads, layers = jax.grad(loss, has_aux=True)(params, layers)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, layers

    for batch in BATCHES:
        params, opt_state, layers = update(params, opt_state, layers, batch)
    return params, layers


def test_batch_norm_is_updated_as_by_hand():
    optimizer = optax.adam(3e-2)
    state, _ = _run(optimizer, net=_normed())
    params, layers = _normed_by_hand(optimizer)
    index = state.model.module.norm.batch_state_index
    _assert_close(state.params.module, params)
    _assert_close(state.model.state.get(index), layers.get(index))
    counter = state.model.module.norm.batch_counter
    assert state.model.state.get(counter) == 12
    # Statistics are no parameters.
    assert all(x is None for x in jax.tree.leaves(state.params.state, is_leaf=_none))


def _none(x):
    return x is None


def test_batch_norm_statistics_of_parts_and_of_low_precision():
    whole, _ = _run(optax.sgd(0.0), net=_normed())
    parts, _ = _run(optax.sgd(0.0), net=_normed(), accumulate=4)
    low, _ = _run(optax.sgd(0.0), net=_normed(), compute_dtype=jnp.bfloat16)
    index = whole.model.module.norm.batch_state_index
    counter = whole.model.module.norm.batch_counter
    assert parts.model.state.get(counter) == 4 * 12
    for a, b in zip(
        low.model.state.get(index), whole.model.state.get(index), strict=True
    ):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=2e-2)


def test_a_skipped_update_leaves_running_statistics():
    state, _ = _run(
        optax.adam(3e-2), net=_normed(), batches=_poisoned([0, 5]), nonfinite="skip"
    )
    clean, _ = _run(optax.adam(3e-2), net=_normed(), batches=BATCHES[1:5])
    _assert_close(state.buffers, clean.buffers)
    _assert_close(state.params, clean.params)


class Dropped(eqx.Module):
    net: Net
    dropout: eqx.nn.Dropout

    def __call__(self, u, *, key):
        return self.net(self.dropout(u, key=key))


def _dropped():
    return tx.Stepper(Dropped(NET, eqx.nn.Dropout(0.4)), stochastic=True)


def test_dropout_differs_between_steps_and_is_reproducible():
    same = jnp.stack([WINDOWS] * 5)
    state, infos = _run(optax.sgd(0.0), net=_dropped(), batches=same)
    assert len(np.unique(np.asarray(infos.loss))) == 5
    _, again = _run(optax.sgd(0.0), net=_dropped(), batches=same)
    np.testing.assert_array_equal(infos.loss, again.loss)
    # A pure function of root key and step: the third update can be had alone.
    optimizer = optax.sgd(0.0)
    start = tx.TrainState.create(_dropped(), optimizer, key=KEY)
    third = eqx.tree_at(lambda s: s.step, start, jnp.array(2, jnp.int32))
    _, info = _jit(tx.make_train_step(TWO, optimizer))(third, WINDOWS)
    np.testing.assert_allclose(info.loss, infos.loss[2], rtol=1e-14)
    other = tx.TrainState.create(_dropped(), optimizer, key=jax.random.key(6))
    _, info = _jit(tx.make_train_step(TWO, optimizer))(other, WINDOWS)
    assert info.loss != infos.loss[0]
    _, parts = _run(optimizer, net=_dropped(), batches=same, accumulate=2)
    assert (parts.loss != infos.loss).all()


def test_streams_of_keys_do_not_meet():
    data = [
        jax.random.key_data(stream_key(KEY, stream, step)).tolist()
        for stream in ("train", "evaluate")
        for step in range(4)
    ]
    assert len({tuple(d) for d in data}) == 8
    with pytest.raises(ValueError, match="one of .*'generate', 'train'.*got 'test'"):
        stream_key(KEY, "test", 0)


def test_a_curriculum_follows_the_number_of_updates():
    grow = C.Curriculum(TWO, lambda step: 1 + step // 3)
    optimizer = optax.adam(3e-2)
    state, infos = _run(optimizer, configuration=grow)
    short = C.Supervised(1, time_level_weights=jnp.array([0.4]))
    first, early = _run(optimizer, configuration=short, batches=BATCHES[:3])
    np.testing.assert_allclose(infos.loss[:3], early.loss, rtol=1e-12)
    np.testing.assert_array_equal(infos.aux.time_losses[:3, 1], 0.0)
    late, _ = jax.lax.scan(tx.make_train_step(TWO, optimizer), first, BATCHES[3:])
    _assert_close(state.params, late.params)


# Evaluation.


def test_evaluation_runs_in_inference_mode_and_changes_nothing():
    optimizer = optax.adam(3e-2)
    for net in (_normed(), _dropped()):
        state, _ = _run(optimizer, net=net)
        before = jax.tree.map(np.array, eqx.filter(state, eqx.is_inexact_array))
        evaluate = _jit(tx.make_eval_step(TWO))
        loss, aux = evaluate(state, WINDOWS)
        _assert_close(eqx.filter(state, eqx.is_inexact_array), before, rtol=0)
        assert evaluate(state, WINDOWS)[0] == loss
        still = eqx.nn.inference_mode(state.model)
        u = WINDOWS[:, 0]
        expected = 0.0
        for t, weight in ((1, 0.4), (2, 1.3)):
            u = jax.vmap(lambda u: still(u, key=KEY), axis_name="batch")(u)  # noqa: B023
            expected += weight * jnp.mean((u - WINDOWS[:, t]) ** 2)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        assert aux.time_losses.shape == (2,)
        if aux.model_state is not None:
            _assert_close(aux.model_state, state.model.state, rtol=0)


def test_evaluation_of_the_average_and_at_full_length():
    optimizer = optax.adam(3e-2)
    state, _ = _run(optimizer, create={"ema": True}, ema_decay=0.5)
    grow = C.Curriculum(TWO, lambda step: 1)
    loss, _ = tx.make_eval_step(grow, use_ema=True)(state, WINDOWS)
    np.testing.assert_allclose(loss, _loss(state.ema_model, WINDOWS), rtol=1e-12)
    assert loss != tx.make_eval_step(TWO)(state, WINDOWS)[0]


# Transformations.


@functools.cache
def _ensemble():
    def member(seed, rate):
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
        key = jax.random.key(seed)
        state = tx.TrainState.create(_net_of(key), optimizer, key=key)
        step = tx.make_train_step(TWO, optimizer)
        return jax.lax.scan(step, state, BATCHES)

    return member


def _net_of(key):
    return Net(
        0.6 * jax.random.normal(key, (4, 3)),
        jnp.linspace(-0.5, 0.4, 12).reshape(3, 4),
        jnp.array([2, 0, 1]),
    )


def test_vmap_over_seeds_and_learning_rates():
    member = _ensemble()
    seeds, rates = jnp.array([3, 8, 4]), jnp.array([1e-3, 5e-2, 2e-2])
    states, infos = _jit(jax.vmap(member))(seeds, rates)
    assert infos.loss.shape == (3, 6)
    np.testing.assert_allclose(infos.learning_rate, jnp.stack([rates] * 6, 1))
    for i in range(3):
        net = _net_of(jax.random.key(seeds[i]))
        params, losses, _, _ = _by_hand(optax.adam(rates[i]), net=net)
        np.testing.assert_allclose(infos.loss[i], losses, rtol=1e-11)
        member_params = jax.tree.map(lambda x: x[i], states.params)  # noqa: B023
        _assert_close(member_params, params, rtol=1e-11)


def test_hyper_gradient_through_training_is_a_central_difference():
    batches = jnp.stack([BATCHES[i % 6] for i in range(10)])

    def validation(rate):
        optimizer = optax.adam(rate, eps_root=1e-8)
        state = tx.TrainState.create(NET, optimizer, key=KEY)
        step = tx.make_train_step(TWO, optimizer, max_grad_norm=0.2)
        state, _ = jax.lax.scan(step, state, batches)
        return tx.make_eval_step(TWO)(state, WINDOWS)[0]

    value = _jit(validation)
    analytic = _jit(jax.grad(validation))(3e-2)
    numeric = (value(3e-2 + 1e-5) - value(3e-2 - 1e-5)) / 2e-5
    assert abs(numeric) > 1e-3
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6)


def test_hyper_gradient_of_a_gradient_that_vanishes_is_finite():
    # The norm has no slope at 0.
    nothing = C.Supervised(1, time_level_loss=lambda p, t: 0.0 * jnp.sum(p * t))

    def trained(rate):
        optimizer = optax.sgd(rate)
        state = tx.TrainState.create(NET, optimizer, key=KEY)
        step = tx.make_train_step(nothing, optimizer, max_grad_norm=1.0)
        return jnp.sum(step(state, WINDOWS)[0].params.first)

    assert _jit(jax.grad(trained))(0.1) == 0.0


def test_one_trace_for_all_learning_rates_and_for_a_resumed_state():
    traces = []

    def loss(p, t):
        traces.append(None)
        return jnp.mean((p - t) ** 2)

    optimizer = optax.inject_hyperparams(optax.adamw)(
        learning_rate=1e-2, weight_decay=optax.linear_schedule(0.1, 0.0, 1000)
    )
    state = tx.TrainState.create(NET, optimizer, key=KEY, ema=True)
    configuration = C.Curriculum(
        C.Supervised(2, time_level_loss=loss), lambda step: 1 + step // 500
    )
    step = _jit(tx.make_train_step(configuration, optimizer, ema_decay=0.99))

    def rate(state):
        return state.opt_state.hyperparams["learning_rate"]

    infos = []
    for i in range(1000):
        new = jnp.asarray(1e-2 / (1 + i), rate(state).dtype)
        state = eqx.tree_at(rate, state, new)
        if i == 500:
            count = len(traces)
            state = _resumed(state)
        state, info = step(state, WINDOWS)
        infos.append(info.learning_rate)
    assert len(traces) == count and step._cache_size() == 1
    np.testing.assert_allclose(
        jnp.stack(infos), 1e-2 / (1 + np.arange(1000)), rtol=1e-6
    )
    assert state.step == 1000 and state.step.dtype == jnp.int32


def _resumed(state):
    """As if read from a disk: another object, with another model's static parts."""
    key = np.array(jax.random.key_data(state.key))
    state = eqx.tree_at(lambda s: s.key, state, key)
    state = jax.tree.map(np.array, state)
    optimizer = optax.inject_hyperparams(optax.adamw)(
        learning_rate=1e-2, weight_decay=optax.linear_schedule(0.1, 0.0, 1000)
    )
    fresh = tx.TrainState.create(_net(3), optimizer, key=jax.random.key(0), ema=True)
    leaves = jax.tree.leaves(state)
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in _leaves(fresh)]
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(x)) if k else jnp.asarray(x)
        for x, k in zip(leaves, is_key, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _leaves(state):
    return jax.tree.leaves(state)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-2),
        optax.sgd(optax.exponential_decay(0.1, 2, 0.5), momentum=0.9),
        optax.lbfgs(),
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 9)),
        optax.contrib.schedule_free_adamw(1e-2),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        optax.chain(optax.add_noise(0.1, 0.5, key=3), optax.sgd(0.1)),
    ],
    ids=["adam", "sgd", "lbfgs", "injected", "schedule free", "multi", "noise"],
)
def test_states_keep_their_types_and_may_be_donated(optimizer):
    state = tx.TrainState.create(NET, optimizer, key=KEY, ema=True)
    step = tx.make_train_step(TWO, optimizer, ema_decay=0.9)
    new, info = jax.eval_shape(step, state, WINDOWS)
    old = jax.eval_shape(lambda: state)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    if info.learning_rate is not None:
        assert info.learning_rate.shape == ()
    # Nothing of the state is held twice, nor belongs to the caller.
    donated, _ = jax.jit(step, donate_argnums=0)(state, WINDOWS)
    assert jnp.isfinite(donated.params.first).all()
    assert not NET.first.is_deleted() and not KEY.is_deleted()


# Devices.


def _mesh():
    return Mesh(np.array(jax.devices()[:4]), ("data",))


def _on_devices(kind, step):
    if kind == "pmap":
        mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0))

        def run(state, batch):
            split = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
            state, info = mapped(state, split)
            for leaf in jax.tree.leaves((state, info.loss)):
                for i in range(1, 4):
                    assert (leaf[i] == leaf[0]).all()
            return jax.tree.map(lambda x: x[0], (state, info))

        return run
    if kind == "vmap":
        mapped = _jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))

        def run(state, batch):
            split = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
            return jax.tree.map(lambda x: x[0], mapped(state, split))

        return run
    replicated, sharded = PartitionSpec(), PartitionSpec("data")
    return _jit(
        jax.shard_map(
            step,
            mesh=_mesh(),
            in_specs=(replicated, sharded),
            out_specs=replicated,
            check_vma=kind == "shard_map",
        )
    )


KINDS = ["pmap", "vmap", "shard_map", "shard_map, unchecked"]
DISTRIBUTED = {
    "plain": (TWO, {"max_grad_norm": 0.1}),
    "accumulated": (TWO, {"accumulate": 2}),
    "k steps": (C.Supervised(2, adjoint=tx.OneStepAdjoint()), {}),
    "checkpointed": (
        C.DivertedChain(
            4, 2, ref_stepper=NET, adjoint=tx.RecursiveCheckpointAdjoint(2)
        ),
        {},
    ),
    "curriculum": (C.Curriculum(TWO, lambda step: 1 + step), {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_data_on_devices_are_one_batch(kind, name):
    _assert_distributed(kind, *DISTRIBUTED[name])


@pytest.mark.parametrize("name", ["k steps", "curriculum"])
def test_loops_under_shard_map(name):
    _assert_distributed("shard_map", *DISTRIBUTED[name])


def _assert_distributed(kind, configuration, how):
    optimizer = optax.adam(3e-2)
    state = tx.TrainState.create(NET, optimizer, key=KEY, ema=True)
    single = _jit(tx.make_train_step(configuration, optimizer, ema_decay=0.5, **how))
    many = _on_devices(
        kind,
        tx.make_train_step(
            configuration, optimizer, ema_decay=0.5, axis_name="data", **how
        ),
    )
    a = b = state
    for batch in BATCHES[:3]:
        a, info_a = single(a, batch)
        b, info_b = many(b, batch)
        np.testing.assert_allclose(info_b.loss, info_a.loss, rtol=1e-10)
        np.testing.assert_allclose(info_b.grad_norm, info_a.grad_norm, rtol=1e-10)
        np.testing.assert_allclose(
            info_b.aux.time_losses, info_a.aux.time_losses, rtol=1e-10
        )
    for x, y in zip(
        jax.tree.leaves((b.params, b.ema)),
        jax.tree.leaves((a.params, a.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_line_searches_agree_across_devices(kind):
    windows = _data(8, 2, 3, seed=6)
    optimizer = optax.lbfgs(memory_size=4)
    state = tx.TrainState.create(Linear(jnp.ones((3, 3))), optimizer, key=KEY)
    single = _jit(tx.make_train_step(C.Supervised(1), optimizer))
    many = _on_devices(
        kind, tx.make_train_step(C.Supervised(1), optimizer, axis_name="data")
    )
    a = b = state
    for _ in range(4):
        (a, _), (b, _) = single(a, windows), many(b, windows)
    np.testing.assert_allclose(b.params.matrix, a.params.matrix, rtol=1e-6)


# Under shard_map, JAX 0.12's check of varying axes refuses equinox's BatchNorm (its
# `pmean` over a vmapped axis), whatever the step does.
@pytest.mark.parametrize("kind", ["pmap"])
def test_batch_norm_and_dropout_on_devices(kind):
    """Statistics of the layers are averaged; noise differs between devices."""
    optimizer = optax.sgd(0.1)
    state = tx.TrainState.create(_normed(), optimizer, key=KEY)
    many = _on_devices(kind, tx.make_train_step(TWO, optimizer, axis_name="data"))
    new, _ = many(state, WINDOWS)
    index = state.model.module.norm.batch_state_index
    counter = state.model.module.norm.batch_counter
    single = _jit(tx.make_train_step(TWO, optimizer))
    shards = [single(state, WINDOWS[2 * i : 2 * i + 2])[0] for i in range(4)]
    for part in range(2):
        mean = sum(s.model.state.get(index)[part] for s in shards) / 4
        np.testing.assert_allclose(new.model.state.get(index)[part], mean, rtol=1e-10)
    assert new.model.state.get(counter) == 2

    state = tx.TrainState.create(_dropped(), optimizer, key=KEY)
    _, repeated = many(state, jnp.concatenate([WINDOWS[:2]] * 4))
    _, once = single(state, WINDOWS[:2])
    assert repeated.loss != once.loss


def test_a_batch_that_lies_on_devices_needs_no_axis():
    optimizer = optax.adam(3e-2)
    state = tx.TrainState.create(NET, optimizer, key=KEY)
    mesh = _mesh()
    batch = jax.device_put(WINDOWS, NamedSharding(mesh, PartitionSpec("data")))
    state_on = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    for parts in (1, 2):
        step = _jit(tx.make_train_step(TWO, optimizer, accumulate=parts))
        new, _ = step(state_on, batch)
        _assert_close(new.params, step(state, WINDOWS)[0].params)


# Bad input.

ADAM = optax.adam(1e-3)
WORST = C.Supervised(
    1, time_level_loss=tx.loss.BatchLoss(lambda p, t: jnp.max(jnp.abs(p - t)))
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "`accumulate` to be an integer >= 1, got 0"),
        ({"accumulate": 2.0}, "`accumulate`"),
        ({"max_grad_norm": 0}, "`max_grad_norm` to be a number > 0, got 0"),
        ({"max_grad_norm": float("nan")}, "`max_grad_norm`.*got nan"),
        ({"max_grad_norm": True}, "`max_grad_norm`.*got True"),
        ({"max_grad_norm": "1"}, "`max_grad_norm`.*got '1'"),
        ({"compute_dtype": jnp.float16}, "bfloat16, float32 or float64.*float16"),
        ({"compute_dtype": jnp.int32}, "`compute_dtype` to be bfloat16"),
        ({"compute_dtype": "half precision"}, "`compute_dtype` to be bfloat16"),
        ({"ema_decay": 1.0}, r"`ema_decay` to lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "`ema_decay`"),
        ({"ema_decay": "0.9"}, "`ema_decay`.*got '0.9'"),
        ({"ema_decay": float("nan")}, "`ema_decay`.*got nan"),
        ({"nonfinite": "stop"}, "`nonfinite` to be 'raise', 'skip' or 'ignore'.*stop"),
        ({"nonfinite": None}, "`nonfinite`"),
        ({"nonfinite": "skip gradient"}, "'raise', 'skip' or 'ignore', got 'skip g"),
        ({"nonfinite": np.array(["raise", "skip"])}, "`nonfinite` to be 'raise'"),
        ({"axis_name": 0}, "`axis_name` to be the name"),
    ],
)
def test_bad_options_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        tx.make_train_step(TWO, ADAM, **options)


def test_a_loss_of_the_whole_batch_is_taken_whole():
    step = tx.make_train_step(WORST, ADAM)
    state = tx.TrainState.create(NET, ADAM, key=KEY)
    expected = jnp.max(jnp.abs(jax.vmap(NET)(WINDOWS[:, 0]) - WINDOWS[:, 1]))
    np.testing.assert_allclose(step(state, WINDOWS)[1].loss, expected, rtol=1e-12)


def test_options_of_other_number_types_are_taken():
    tx.make_train_step(
        TWO, ADAM, max_grad_norm=np.float32(0.5), ema_decay=0, compute_dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tx.make_train_step(NET, ADAM),
            "`configuration` to be a configuration",
        ),
        (
            lambda: tx.make_train_step(TWO, "adam"),
            "`optimizer` to be an optax Gradient",
        ),
        (
            lambda: tx.make_train_step(WORST, ADAM, accumulate=2),
            "a loss of one sample with `accumulate`, got a BatchLoss",
        ),
        (
            lambda: tx.make_train_step(
                C.Composite([TWO, WORST], [1.0, 2.0]), ADAM, axis_name="device"
            ),
            "a loss of one sample with `axis_name`, got a BatchLoss",
        ),
        (lambda: tx.make_eval_step(None), "`configuration` to be a configuration"),
        (
            lambda: tx.make_eval_step(TWO, use_ema=0.9),
            "`use_ema` to be an integer >= 1",
        ),
        (
            lambda: tx.TrainState.create(NET, None, key=KEY),
            "`optimizer` to be an optax GradientTransformation",
        ),
        (lambda: tx.TrainState.create(NET, ADAM, key=None), "`key` to be one random"),
        (lambda: tx.TrainState.create(NET, ADAM, key=0), "`key` to be one random key"),
        (
            lambda: tx.TrainState.create(NET, ADAM, key=jax.random.split(KEY)),
            "`key` to be one random key",
        ),
        (
            lambda: tx.TrainState.create(NET, ADAM, key=KEY, ema=0.9),
            "`ema` to be an integer >= 0, got 0.9",
        ),
        (
            lambda: tx.TrainState.create(jnp.arange(3), ADAM, key=KEY),
            "a trainable inexact array, got .*int64",
        ),
        (
            lambda: tx.TrainState.create(NET, ADAM, key=KEY, trainable=lambda x: False),
            "a trainable inexact array",
        ),
        (
            lambda: tx.TrainState.create(NET, ADAM, key=KEY, trainable=[True, False]),
            "`trainable` to be a function of a leaf or a PyTree of bools",
        ),
    ],
)
def test_bad_arguments_are_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_states_and_options_have_to_fit():
    plain = tx.TrainState.create(NET, ADAM, key=KEY)
    averaged = tx.TrainState.create(NET, ADAM, key=KEY, ema=True)
    with pytest.raises(ValueError, match="a state with a moving average for ema_decay"):
        tx.make_train_step(TWO, ADAM, ema_decay=0.9)(plain, WINDOWS)
    with pytest.raises(ValueError, match="`ema_decay` for a state with a moving aver"):
        tx.make_train_step(TWO, ADAM)(averaged, WINDOWS)
    with pytest.raises(ValueError, match="a moving average of number 1, got none"):
        tx.make_eval_step(TWO, use_ema=True)(plain, WINDOWS)
    with pytest.raises(ValueError, match=r"`accumulate` \(3\) divides, got 8"):
        tx.make_train_step(TWO, ADAM, accumulate=3)(plain, WINDOWS)
    with pytest.raises(ValueError, match="Supervised to get windows"):
        tx.make_train_step(TWO, ADAM)(plain, WINDOWS[:, :2])


def test_legacy_keys_are_taken():
    key = jax.random.PRNGKey(3)
    state = tx.TrainState.create(_dropped(), ADAM, key=key)
    new, _ = _jit(tx.make_train_step(TWO, ADAM))(state, WINDOWS)
    assert new.key.dtype == jnp.uint32
