"""Every option of the trainer and its callbacks acts, through the trainer."""

import functools
import io
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm.std import tqdm

import trainax_pk as tx
from trainax_pk.checkpoint import read_metrics
from trainax_pk.trainer import _loop

KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (6, 10, 3))
HELD_OUT = jax.random.normal(jax.random.key(9), (2, 6, 3))
ONE = tx.configuration.Supervised()
STEPS = 5


def linear():
    return eqx.nn.Linear(3, 3, key=jax.random.key(1))


def make(**options):
    options = {
        "optimizer": optax.sgd(0.1),
        "num_training_steps": STEPS,
        "batch_size": 4,
        "progress": False,
        "program": "loop",
        **options,
    }
    return tx.trainer.SupervisedTrainer(DATA, **options)


@functools.cache
def plain():
    return make()(linear(), key=KEY)


def by_hand(*, limit=None, dtype=None, trainable=lambda x: True, stride=1):
    """Models after each update, and losses: gradient descent, from its formulas."""
    order_key, _ = jax.random.split(KEY)
    starts = [(s, t) for s in range(6) for t in range(0, 9, stride)]
    order = tx.data.ShuffledOrder(len(starts), 4, order_key)
    model, models, losses = linear(), [linear()], []

    def loss(model, rows):
        low = lambda x: x if dtype is None else x.astype(dtype)  # noqa: E731
        model = jax.tree.map(low, model)
        errors = [
            model(low(DATA[s, t])).astype(DATA.dtype) - DATA[s, t + 1] for s, t in rows
        ]
        return jnp.mean(jnp.stack(errors) ** 2)

    for i in range(STEPS):
        rows = [starts[j] for j in np.asarray(order.indices(i, 1)[0])]
        value, grads = jax.value_and_grad(loss)(model, rows)
        grads = jax.tree.map(lambda g: g if trainable(g) else 0 * g, grads)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        scale = 1.0 if limit is None else jnp.minimum(1.0, limit / norm)
        model = jax.tree.map(lambda p, g: p - 0.1 * scale * g, model, grads)
        models.append(model)
        losses.append(value)
    return models, np.array(losses)


def average(models, decay):
    ema = models[0]
    for n, model in enumerate(models[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, ema, model)
    return ema


# option -> (options of the trainer, those of the formulas, whether a run differs)
OPTIONS = {
    "none": ({}, {}, False),
    "window_stride": ({"window_stride": 4}, {"stride": 4}, True),
    "trainable": (
        {"trainable": lambda x: x.ndim == 1},
        {"trainable": lambda x: x.ndim == 1},
        True,
    ),
    "accumulate": ({"accumulate": 2}, {}, False),
    "compute_dtype": ({"compute_dtype": jnp.float32}, {"dtype": jnp.float32}, True),
    "max_grad_norm": ({"max_grad_norm": 0.2}, {"limit": 0.2}, True),
    "ema_decay": ({"ema_decay": 0.25}, {}, False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_say(name):
    options, formulas, differs = OPTIONS[name]
    trainer = make(**options)
    model, history = trainer(linear(), key=KEY)
    models, losses = by_hand(**formulas)
    rtol = 1e-6 if name == "compute_dtype" else 1e-12
    np.testing.assert_allclose(history.loss, losses, rtol=rtol)
    np.testing.assert_allclose(model.weight, models[-1].weight, rtol=rtol)
    np.testing.assert_allclose(model.bias, models[-1].bias, rtol=rtol)
    other = np.allclose(model.bias, plain()[0].bias, rtol=1e-9, atol=0)
    assert differs != other
    if name == "trainable":
        np.testing.assert_array_equal(model.weight, linear().weight)
        assert not np.array_equal(model.bias, linear().bias)
    if name == "ema_decay":
        ema = average(models, 0.25)
        np.testing.assert_allclose(history.state.ema_model.weight, ema.weight)
        assert not np.allclose(ema.weight, model.weight)
    # Parts are computed one after another: a loop over them in the program.
    state = tx.TrainState.create(
        linear(), trainer.optimizer, key=KEY, ema="ema_decay" in options
    )
    program = str(jax.make_jaxpr(trainer.step_fn)(state, trainer.windows[:4]))
    assert ("split_count=2" in program or "length=2" in program) == (
        name == "accumulate"
    )


@pytest.mark.parametrize("every", [1, 2])
def test_log_every_is_the_length_of_a_mean(every, tmp_path):
    _, history = make(log_every=every)(linear(), key=KEY, run_dir=tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    whole = STEPS // every
    means = np.asarray(history.loss[: whole * every]).reshape(whole, every).mean(1)
    assert [x["step"] for x in lines] == [every * (i + 1) for i in range(whole)]
    np.testing.assert_allclose([x["loss"] for x in lines], means, rtol=1e-12)


NRMSE = {"nrmse": tx.metrics.nrmse_per_lead_time}
AVERAGED = {
    "validation": lambda **o: tx.callback.Validation(ONE, HELD_OUT, every=STEPS, **o),
    "rollout": lambda **o: tx.callback.RolloutMetrics(
        HELD_OUT, NRMSE, every=STEPS, **o
    ),
    "network": lambda **o: tx.callback.GetNetwork(STEPS, **o),
}


def evaluate(name, model):
    if name == "validation":
        pairs = [(s, t) for s in range(2) for t in range(5)]
        return np.mean(
            [
                np.mean((model(HELD_OUT[s, t]) - HELD_OUT[s, t + 1]) ** 2)
                for s, t in pairs
            ]
        )
    if name == "network":
        return model.weight
    u, states = HELD_OUT[:, 0], []
    for _ in range(5):
        u = jax.vmap(model)(u)
        states.append(u)
    return tx.metrics.nrmse_per_lead_time(jnp.stack(states, 1), HELD_OUT[:, 1:])


@pytest.mark.parametrize("name", AVERAGED)
def test_use_ema_evaluates_the_average(name):
    callbacks = [
        AVERAGED[name](use_ema=True, name="averaged"),
        AVERAGED[name](name="current"),
    ]
    model, history = make(ema_decay=0.25, callbacks=callbacks)(linear(), key=KEY)
    average = history.state.ema_model
    for record, evaluated in (("averaged", average), ("current", model)):
        values = jax.tree.leaves(
            eqx.filter(history.records[record].values, eqx.is_array)
        )
        np.testing.assert_allclose(values[0][-1], evaluate(name, evaluated), rtol=1e-12)
    assert not np.allclose(evaluate(name, average), evaluate(name, model))


class Everything(eqx.Module):
    """A stepper that takes parameters, forcing and a key, and drops out in training."""

    linear: eqx.Module
    dropout: eqx.nn.Dropout
    noise: float

    def __call__(self, u, inputs, *, key):
        noise_key, drop_key = jax.random.split(key)
        u = self.dropout(self.linear(u), key=drop_key) * inputs.sample + inputs.time
        return u + self.noise * jax.random.normal(noise_key)


def everything(noise):
    module = Everything(linear(), eqx.nn.Dropout(0.5), noise)
    return tx.Stepper(module, stochastic=True, conditioned=True)


SAMPLE = jnp.array([0.8, -0.3])
FORCING = jax.random.normal(jax.random.key(3), (2, 6))
INPUTS = tx.data.Trajectories(HELD_OUT, sample=SAMPLE, time=FORCING)


def watch(noise):
    states = {"states": lambda prediction, reference: prediction}
    callbacks = [
        tx.callback.RolloutMetrics(INPUTS, states, every=STEPS),
        tx.callback.Validation(ONE, INPUTS, every=STEPS, batch_size=3),
    ]
    data = tx.data.Trajectories(
        DATA, sample=jnp.linspace(-1.0, 1.0, 6), time=DATA[:, :, 0]
    )
    trainer = tx.trainer.SupervisedTrainer(
        data,
        optimizer=optax.sgd(0.1),
        num_training_steps=STEPS,
        batch_size=4,
        callbacks=callbacks,
        progress=False,
        program="loop",
    )
    return trainer(everything(noise), key=KEY)


def test_callbacks_pass_parameters_forcing_and_keys_and_drop_nothing_out():
    model, history = watch(0.0)
    got = history.records["rollout"].values["states"][-1]
    trained, losses = model.module.linear, []
    for s in range(2):
        u = HELD_OUT[s, 0]
        for t in range(5):
            step = trained(HELD_OUT[s, t]) * SAMPLE[s] + FORCING[s, t]
            losses.append(np.mean((step - HELD_OUT[s, t + 1]) ** 2))
            u = trained(u) * SAMPLE[s] + FORCING[s, t]
            np.testing.assert_allclose(got[s, t], u, rtol=1e-9)
    validation = history.records["validation"].values[-1]
    np.testing.assert_allclose(validation, np.mean(losses), rtol=1e-9)


def test_rollouts_of_samples_have_keys_of_their_own():
    model, history = watch(1.0)
    got = history.records["rollout"].values["states"][-1]
    trained = model.module.linear
    noise = np.array(
        [
            got[s, 0] - trained(HELD_OUT[s, 0]) * SAMPLE[s] - FORCING[s, 0]
            for s in range(2)
        ]
    )
    np.testing.assert_allclose(
        noise - noise[:, :1], 0.0, atol=1e-12
    )  # One number each.
    assert abs(noise[0, 0] - noise[1, 0]) > 1e-3 and np.all(np.abs(noise) > 1e-6)


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_shows_updates_and_loss(progress, monkeypatch):
    text = io.StringIO()
    shown = functools.partial(tqdm, file=text, ascii=True, ncols=120)

    def enabled(*, disable=False, **options):
        return shown(disable=disable, **options)

    monkeypatch.setattr(_loop, "tqdm", enabled)
    _, history = make(progress=progress)(linear(), key=KEY)
    if not progress:
        assert text.getvalue() == ""
        return
    last = text.getvalue().split("\r")[-1]
    assert f"{STEPS}/{STEPS}" in last
    shown_loss = re.search(r"loss=(\S+?)[,\]]", last).group(1)
    assert shown_loss == f"{float(history.loss[-1]):.3e}"


def test_the_environment_may_silence_the_bar(capfd):
    # TQDM_DISABLE is set for all tests; an explicit disable=False would overrule it.
    make(progress=True)(linear(), key=KEY)
    assert capfd.readouterr().err == ""


class Rooted(eqx.Module):
    """A network whose gradient is infinite where a parameter is zero."""

    linear: eqx.Module
    offset: jax.Array

    def __call__(self, u):
        return self.linear(u) + jnp.sqrt(self.offset)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9}])
def test_leaves_whose_gradient_is_not_finite_are_named(options):
    model = Rooted(linear(), jnp.zeros(3))
    with pytest.raises(FloatingPointError, match=r"in 1 of 3 leaves \(\.offset\)"):
        make(**options)(model, key=KEY)
