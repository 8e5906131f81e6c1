"""Trainers: what they return, what they refuse, ensembles, failures, callbacks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

DATA = jax.random.normal(jax.random.key(0), (4, 9, 1, 12))
HELD_OUT = jax.random.normal(jax.random.key(9), (2, 6, 1, 12))
OPTIONS = {
    "optimizer": optax.adam(1e-2),
    "num_training_steps": 12,
    "batch_size": 5,
    "progress": False,
}


def conv(key=jax.random.key(1)):
    return eqx.nn.Conv1d(1, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=key)


def physics(u):
    return jnp.roll(u, 1, axis=-1) * 0.9


def by_hand(trainer, model, key):
    """The documented recipe: split the key, shuffle, step."""
    order_key, state_key = jax.random.split(key)
    order = tx.data.ShuffledOrder(len(trainer.windows), trainer.batch_size, order_key)
    state = tx.TrainState.create(model, trainer.optimizer, key=state_key)
    losses = []
    for i in range(trainer.num_training_steps):
        batch = trainer.windows[np.asarray(order.indices(i, 1)[0])]
        state, info = jax.jit(trainer.step_fn)(state, batch)
        losses.append(info.loss)
    return state.model, jnp.stack(losses)


TRAINERS = {
    "supervised": lambda **o: tx.trainer.SupervisedTrainer(
        DATA, num_rollout_steps=3, **OPTIONS, **o
    ),
    "diverted": lambda **o: tx.trainer.DivertedChainTrainer(
        DATA,
        ref_stepper=physics,
        num_rollout_steps=3,
        num_branch_steps=2,
        **OPTIONS,
        **o,
    ),
    "branch one": lambda **o: tx.trainer.DivertedChainBranchOneTrainer(
        DATA, ref_stepper=physics, num_rollout_steps=3, **OPTIONS, **o
    ),
    "mix": lambda **o: tx.trainer.MixChainTrainer(
        DATA, ref_stepper=physics, num_rollout_steps=2, **OPTIONS, **o
    ),
    "residuum": lambda **o: tx.trainer.ResiduumTrainer(
        DATA,
        residuum_fn=lambda n, p: n - physics(p),
        num_rollout_steps=2,
        **OPTIONS,
        **o,
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_equals_a_loop_by_hand(name):
    trainer = TRAINERS[name]()
    model, history = trainer(conv(), key=jax.random.key(4))
    expected, losses = by_hand(trainer, conv(), jax.random.key(4))
    np.testing.assert_allclose(history.loss, losses, rtol=1e-11)
    np.testing.assert_allclose(model.weight, expected.weight, rtol=1e-11)
    assert history.program and int(history.state.step) == 12


@pytest.mark.parametrize("way", ["argument", "filter_vmap"])
@pytest.mark.parametrize("program", ["auto", "loop"])
def test_members_of_an_ensemble_are_those_alone(way, program):
    trainer = TRAINERS["supervised"](
        program=program,
        callbacks=[tx.callback.WeightNorm(5), tx.callback.GetNetwork(6)],
    )
    keys = jax.random.split(jax.random.key(5), 3)
    models = eqx.filter_vmap(conv)(keys)
    if way == "argument":
        trained, history = trainer(models, key=keys, ensemble=True)
    else:
        trained, history = eqx.filter_vmap(lambda m, k: trainer(m, key=k))(models, keys)
    assert history.loss.shape == (3, 12)
    for i in range(3):
        member = jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, models)
        alone, single = trainer(member, key=keys[i])
        np.testing.assert_allclose(history.loss[i], single.loss, rtol=1e-9)
        np.testing.assert_allclose(trained.weight[i], alone.weight, rtol=1e-9)
        np.testing.assert_allclose(
            history.records["weight_norm"].values[i],
            single.records["weight_norm"].values,
            rtol=1e-9,
        )


def test_members_in_one_program_are_those_alone():
    # The rewrite for a CPU sees all members at once: no grouped convolution is left.
    trainer, alone = TRAINERS["supervised"](), TRAINERS["supervised"]()
    trainer.engine.vmapped = True
    keys = jax.random.split(jax.random.key(5), 3)
    models = eqx.filter_vmap(conv)(keys)
    together, history = trainer(models, key=keys, ensemble=True)
    apart, expected = alone(models, key=keys, ensemble=True)
    assert not alone.engine.members[0]
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-9)
    np.testing.assert_allclose(together.weight, apart.weight, rtol=1e-9)


def _mapped(what, x):
    """A trainer that has something of a `vmap` around it inside."""
    rate, weights, stepper = 1e-2, None, lambda u: 0.5 * u
    if what == "learning rate":
        rate = x
    elif what == "weights":
        weights = jnp.stack([x, 1.0 - x])
    else:
        stepper = lambda u: x * u  # noqa: E731
    return tx.trainer.DivertedChainTrainer(
        DATA,
        ref_stepper=stepper,
        num_rollout_steps=2,
        num_branch_steps=2 if what == "stepper" else 1,
        time_level_weights=weights,
        optimizer=optax.chain(optax.clip(1.0), optax.sgd(rate)),
        num_training_steps=7,
        batch_size=4,
        progress=False,
    )


@pytest.mark.parametrize("what", ["learning rate", "weights", "stepper"])
def test_what_a_trainer_is_made_of_may_be_mapped_over(what):
    def train(x):
        trained, history = _mapped(what, x)(conv(), key=jax.random.key(0))
        return trained.weight, history.loss

    values = jnp.array([0.1, 0.3, 0.6])
    weights, losses = jax.vmap(train)(values)
    assert not np.allclose(weights[0], weights[1])
    for i, x in enumerate(values):
        weight, loss = train(x)
        np.testing.assert_allclose(weights[i], weight, rtol=1e-9)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-9)


def test_a_failure_inside_jit_freezes_the_state():
    options = OPTIONS | {"optimizer": optax.sgd(1e60)}
    trainer, key = tx.trainer.SupervisedTrainer(DATA, **options), jax.random.key(0)
    with pytest.raises(FloatingPointError):
        trainer(conv(), key=key)
    model, history = eqx.filter_jit(lambda m: trainer(m, key=key))(conv())
    failed = int(history.state.num_skipped)
    assert 0 < failed < 12 and int(history.state.step) == 12
    expected, losses = by_hand(trainer, conv(), key)
    np.testing.assert_allclose(model.weight, expected.weight, rtol=1e-9)
    assert bool(jnp.all(jnp.isfinite(model.weight)))
    np.testing.assert_allclose(history.loss, losses, rtol=1e-9)


def test_a_trainer_may_be_made_and_called_inside_jit():
    def train(model):
        return TRAINERS["supervised"]()(model, key=jax.random.key(0))[0].weight

    expected = train(conv())
    np.testing.assert_allclose(eqx.filter_jit(train)(conv()), expected, rtol=1e-9)


@pytest.mark.parametrize("program", ["scan", "loop"])
def test_chunks_of_other_lengths_compile_nothing(program, monkeypatch, caplog):
    """Lengths of chunks are a matter of the clock: each run has its own."""
    trainer = tx.trainer.SupervisedTrainer(
        DATA, num_rollout_steps=3, program=program, **OPTIONS
    )
    first = trainer(conv(), key=jax.random.key(0))[1].loss
    lengths = itertools.cycle([3, 1, 2])
    monkeypatch.setattr(
        tx.engine.ChunkClock, "limit", lambda self, size: min(size, next(lengths))
    )
    with jax.log_compiles():
        again = trainer(conv(), key=jax.random.key(0))[1].loss
    assert not [m for m in caplog.messages if m.startswith("Compiling")]
    np.testing.assert_array_equal(again, first)


def test_a_single_run_after_an_ensemble_is_described_as_one():
    trainer = TRAINERS["supervised"]()
    keys = jax.random.split(jax.random.key(5), 3)
    _, history = trainer(eqx.filter_vmap(conv)(keys), key=keys, ensemble=True)
    assert "members" in history.program
    _, history = trainer(conv(), key=keys[0])
    assert "members" not in history.program


def test_members_may_lie_on_other_devices_at_another_call():
    trainer = TRAINERS["supervised"](program="scan")
    trainer.engine.vmapped = False
    keys = jax.random.split(jax.random.key(5), 4)
    models = eqx.filter_vmap(conv)(keys)
    expected, _ = trainer(models, key=keys, ensemble=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("members",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("members"))
    spread = jax.tree.map(
        lambda x: jax.device_put(x, place) if eqx.is_array(x) else x, models
    )
    found, _ = trainer(spread, key=keys, ensemble=True)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-9)


def test_an_ensemble_inside_jit_is_traced():
    trainer = TRAINERS["supervised"]()
    keys = jax.random.split(jax.random.key(5), 2)
    models = eqx.filter_vmap(conv)(keys)
    run = eqx.filter_jit(eqx.filter_vmap(lambda m, k: trainer(m, key=k)[0]))
    direct, _ = trainer(models, key=keys, ensemble=True)
    np.testing.assert_allclose(run(models, keys).weight, direct.weight, rtol=1e-9)


def test_callbacks_run_before_on_the_way_and_after():
    seen = []

    def note(step, model, batch):
        seen.append(step)
        return {"mean": jnp.mean(batch.state), "step": step}

    one = tx.configuration.Supervised(1)
    callbacks = [
        tx.callback.Function(note, 5, "note"),
        tx.callback.Loss(one, 4),
        tx.callback.GradNorm(one, 6),
        tx.callback.WeightNorm(12),
        tx.callback.GetNetwork(12),
        tx.callback.Validation(one, HELD_OUT, every=12, batch_size=3),
        tx.callback.RolloutMetrics(
            HELD_OUT, {"nrmse": tx.metrics.nrmse_per_lead_time}, every=12
        ),
    ]
    trainer = TRAINERS["supervised"](callbacks=callbacks)
    model, history = trainer(conv(), key=jax.random.key(4))
    assert seen == [0, 5, 10, 12]
    assert history.records["note"].steps == (0, 5, 10, 12)
    assert history.records["note"].values["step"].tolist() == [0, 5, 10, 12]
    assert history.records["loss"].steps == (0, 4, 8, 12)
    first, last = (history.records["network"].at(i) for i in (0, -1))
    assert np.array_equal(first.weight, conv().weight)
    assert np.array_equal(last.weight, model.weight)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in (model.weight, model.bias)))
    np.testing.assert_allclose(history.records["weight_norm"].values[-1], norm)
    grads = eqx.filter_grad(lambda m: one(m, trainer.engine.batch(*_batch(trainer)))[0])
    leaves = jax.tree.leaves(grads(conv()))
    expected = np.sqrt(sum(np.sum(np.square(g)) for g in leaves))
    np.testing.assert_allclose(history.records["grad_norm"].values[0], expected)
    pairs = [(HELD_OUT[s, t], HELD_OUT[s, t + 1]) for s in range(2) for t in range(5)]
    by_hand = np.mean([np.mean((model(a) - b) ** 2) for a, b in pairs])
    np.testing.assert_allclose(history.records["validation"].values[-1], by_hand)
    prediction = jax.vmap(lambda u: tx.rollout(model, u, 5))(HELD_OUT[:, 0])
    np.testing.assert_allclose(
        history.records["rollout"].values["nrmse"][-1],
        tx.metrics.nrmse_per_lead_time(prediction, HELD_OUT[:, 1:]),
    )


def _batch(trainer):
    order_key, _ = jax.random.split(jax.random.key(4))
    order = tx.data.ShuffledOrder(len(trainer.windows), trainer.batch_size, order_key)
    return order, 0


def test_callbacks_do_not_change_training():
    _, bare = TRAINERS["supervised"]()(conv(), key=jax.random.key(4))
    callback = tx.callback.Validation(tx.configuration.Supervised(), HELD_OUT, every=3)
    watched = TRAINERS["supervised"](callbacks=[callback])
    _, history = watched(conv(), key=jax.random.key(4))
    assert np.array_equal(bare.loss, history.loss)


def test_ema_and_options_reach_the_step():
    trainer = TRAINERS["supervised"](ema_decay=0.5, max_grad_norm=1e-3)
    _, history = trainer(conv(), key=jax.random.key(4))
    assert not np.array_equal(
        history.state.ema_model.weight, history.state.model.weight
    )


def test_forcing_and_parameters_reach_the_model():
    forcing = jax.random.normal(jax.random.key(3), (4, 9))
    parameter = jax.random.normal(jax.random.key(4), (4,))
    data = tx.data.Trajectories(DATA, sample=parameter, time=forcing)

    class Forced(eqx.Module):
        conv: eqx.Module

        def __call__(self, u, inputs):
            return self.conv(u) + inputs.sample + inputs.time

    model = tx.Stepper(Forced(conv()), conditioned=True)
    for name, options in (
        ("SupervisedTrainer", {}),
        ("DivertedChainTrainer", {"ref_stepper": physics}),
    ):
        make = getattr(tx.trainer, name)
        trainer = make(data, num_rollout_steps=3, **OPTIONS, **options)
        assert len(trainer.windows) == 4 * 6
        trained, history = trainer(model, key=jax.random.key(0))
        expected, losses = by_hand(trainer, model, jax.random.key(0))
        np.testing.assert_allclose(history.loss, losses, rtol=1e-11)


def test_a_failure_names_update_and_windows():
    trainer = TRAINERS["supervised"](nonfinite="raise")
    model = eqx.tree_at(lambda m: m.weight, conv(), conv().weight * 1e200)
    with pytest.raises(FloatingPointError, match=r"at update 0 \(windows \["):
        trainer(model, key=jax.random.key(0))


class Scale(eqx.Module):
    weight: jax.Array

    def __call__(self, u):
        return self.weight * u


def test_a_failing_member_is_named():
    trainer = TRAINERS["supervised"]()
    models = Scale(jnp.array([1.0, 1e200, 1.0]))
    keys = jax.random.split(jax.random.key(5), 3)
    with pytest.raises(FloatingPointError, match="of member 1 at update 0"):
        trainer(models, key=keys, ensemble=True)


def test_a_failing_member_leaves_the_others_alone():
    # XLA multiplies grouped convolutions by masks on a CPU: 0·NaN would reach them.
    trainer = TRAINERS["supervised"](nonfinite="skip")
    keys = jax.random.split(jax.random.key(5), 3)
    models = eqx.filter_vmap(conv)(keys)
    scale = jnp.array([1.0, 1e200, 1.0])[:, None, None, None]
    models = eqx.tree_at(lambda m: m.weight, models, models.weight * scale)
    _, history = trainer(models, key=keys, ensemble=True)
    assert history.state.num_skipped.tolist() == [0, 12, 0]


def test_skipping_counts():
    trainer = TRAINERS["supervised"](nonfinite="skip")
    model = eqx.tree_at(lambda m: m.weight, conv(), conv().weight * 1e200)
    same, history = trainer(model, key=jax.random.key(0))
    assert int(history.state.num_skipped) == 12
    assert np.array_equal(same.weight, model.weight)


def build(data=DATA, **changes):
    configuration = tx.configuration.Supervised(3)
    return lambda: tx.trainer.Trainer(data, configuration, **{**OPTIONS, **changes})


BAD = {
    "batch": (build(batch_size=1000), "batch"),
    "steps": (
        build(num_training_steps=0),
        "`num_training_steps` to be an integer >= 1",
    ),
    "negative": (build(batch_size=-1), "`batch_size` to be an integer >= 1, got -1"),
    "optimizer": (build(optimizer=0.1), "optax GradientTransformation"),
    "window": (build(DATA[:, :3]), "3 times"),
    "nan": (build(DATA.at[1, 2, 0, 3].set(jnp.nan)), r"\(1, 2, 0, 3\)|\[1, 2, 0, 3\]"),
    "integer": (build(jnp.ones((4, 9, 1, 12), int)), "int64"),
    "complex": (build(DATA + 0j), "complex"),
    "leading": (build({"a": DATA, "b": DATA[:3]}), "'b'"),
    "callback": (build(callbacks=[print]), "tx.callback.Function"),
    "names": (
        build(callbacks=[tx.callback.WeightNorm(1), tx.callback.WeightNorm(2)]),
        "more than once",
    ),
    "program": (build(program="quick"), "'auto', 'loop' or 'scan'"),
    "residency": (build(residency="disk"), "residency"),
    "progress": (build(progress=1), "`progress` to be True or False"),
    "every": (lambda: tx.callback.WeightNorm(0), "`every` to be an integer >= 1"),
    "name": (lambda: tx.callback.WeightNorm(1, ""), "`name` to be a non-empty string"),
    "function": (lambda: tx.callback.Function(3, 1, "x"), "`function` to be callable"),
    "metrics": (
        lambda: tx.callback.RolloutMetrics(HELD_OUT, {}, every=1),
        "at least one metric",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_a_model_that_changes_shape_is_refused():
    trainer = TRAINERS["supervised"]()
    wrong = eqx.nn.Conv1d(1, 2, 3, padding="SAME", key=jax.random.key(0))
    with pytest.raises(ValueError, match="keep shape"):
        trainer(wrong, key=jax.random.key(0))
