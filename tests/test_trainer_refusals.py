"""What a trainer refuses, when it is built and when it is called: the messages."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (6, 10, 3))


def linear(key=KEY, size=3):
    return eqx.nn.Linear(size, size, key=key)


def make(data=DATA, **options):
    options = {
        "optimizer": optax.sgd(1e-2),
        "num_training_steps": 5,
        "batch_size": 4,
        "progress": False,
        "program": "loop",
        **options,
    }
    return tx.trainer.SupervisedTrainer(data, **options)


TRAINER = make()


class Dropped(eqx.Module):
    linear: eqx.Module
    dropout: eqx.Module

    def __call__(self, u, *, key=None):
        return self.dropout(self.linear(u), key=key)


class Normed(eqx.Module):
    linear: eqx.Module
    norm: eqx.Module

    def __call__(self, u, state):
        u, state = self.norm(self.linear(u), state)
        return u, state


def normed():
    norm, _ = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    return Normed(linear(), norm)


def call(model=None, key=KEY, **options):
    def run():
        made = linear() if model is None else model() if callable(model) else model
        return TRAINER(made, key=key, **options)

    return run


def stacked(count):
    return lambda: eqx.filter_vmap(linear)(jax.random.split(KEY, count))


def differentiated():
    return eqx.filter_grad(lambda m: TRAINER(m, key=KEY)[1].loss[-1])(linear())


CALLS = {
    "another size": (
        call(lambda: linear(size=4)),
        r"`model` to map a state \(state: float64\[3\]\) to the next one, got: "
        r"TypeError: dot_general .* Check the sizes",
    ),
    "dropout": (
        call(lambda: Dropped(linear(), eqx.nn.Dropout(0.5))),
        r"got: RuntimeError: Dropout requires a key .* wrapped in tx.Stepper",
    ),
    "batch norm": (call(normed), r"got: TypeError: .*state.* wrapped in tx.Stepper"),
    "a declared key": (
        call(lambda: tx.Stepper(linear(size=4), stochastic=True)),
        "and its `stochastic`, `conditioned` and `state`",
    ),
    "no key": (call(key=0), r"`key` to be a random key, got 0. Pass jax.random.key"),
    "a float for a key": (call(key=jnp.ones(2)), "`key` to be a random key"),
    "one key for many": (
        call(stacked(2), ensemble=True),
        r"a key for each member .* got one key. Pass jax.random.split",
    ),
    "many keys for one": (
        call(key=jax.random.split(KEY, 3)),
        "one key for one model, got 3 keys. Pass ensemble=True",
    ),
    "other numbers": (
        call(stacked(2), key=jax.random.split(KEY, 3), ensemble=True),
        r"leading axis of 3, one for each key, got the shape \[2, 3, 3\] for "
        r"model.weight",
    ),
    "one model for many keys": (
        call(
            lambda: eqx.tree_at(lambda m: m.weight, linear(), jnp.zeros(())),
            key=jax.random.split(KEY, 3),
            ensemble=True,
        ),
        r"leading axis of 3, .* got the shape \[\] for model.weight",
    ),
    "ensemble": (call(ensemble=2), "`ensemble` to be True or False"),
    "a number for a folder": (call(run_dir=3), "`run_dir` to be the path of a folder"),
    "a number for a segment": (
        call(run_dir="x", segment=5),
        r"a tx\.checkpoint\.Segment, got 5\. Pass",
    ),
    "a folder to start from": (
        call(start="other"),
        r"a tx\.checkpoint\.Start, got 'other'\. Pass",
    ),
    "the letters of a field": (
        call(run_dir="x", allow_changes="optimizer"),
        r"names of fields, got 'optimizer'\. Pass a list",
    ),
    "fields that are none": (call(run_dir="x", allow_changes=[1]), r"got \[1\]"),
    "reverse mode": (differentiated, "loop over tx.make_train_step"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_with_a_remedy(name):
    run, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        run()


def build(**options):
    return lambda: make(**options)


def averaged(make_callback):
    return build(callbacks=[make_callback()])


NRMSE = {"nrmse": tx.metrics.nrmse_per_lead_time}
ONE = tx.configuration.Supervised()
BUILDS = {
    "one callback": (
        build(callbacks=tx.callback.WeightNorm(2)),
        r"a list of callbacks, got WeightNorm.* Pass callbacks=\[",
    ),
    "a policy": (build(checkpoints="often"), r"a tx\.checkpoint\.Policy, got 'often'"),
    "a monitor": (build(monitors=3), "`name` to name what callbacks return, got 3"),
    "monitors": (build(monitors=[3]), "`name` to name what callbacks return, got 3"),
    "a rule": (build(early_stopping=3), "`name` to name what callbacks return, got 3"),
    "weights": (
        build(monitors={"a": "b"}),
        r"`name\['a'\]` to be a finite number, got 'b'",
    ),
    "one tracker": (build(trackers=3), r"a list of trackers, got 3"),
    "validation of no average": (
        averaged(lambda: tx.callback.Validation(ONE, DATA, every=1, use_ema=True)),
        "`ema_decay` for the callback 'validation' with use_ema=True, got None",
    ),
    "rollout of no average": (
        averaged(
            lambda: tx.callback.RolloutMetrics(DATA, NRMSE, every=1, use_ema=True)
        ),
        "`ema_decay` for the callback 'rollout'",
    ),
    "snapshot of no average": (
        averaged(lambda: tx.callback.GetNetwork(1, use_ema=True)),
        "`ema_decay` for the callback 'network'",
    ),
    "parts": (
        build(accumulate=3),
        r"a batch size that `accumulate` \(3\) divides, got 4",
    ),
    "no parts": (build(accumulate=0), "`accumulate` to be an integer >= 1"),
    "a float": (build(batch_size=np.float64(4)), "`batch_size` to be an integer"),
    "a bool": (build(batch_size=True), "`batch_size` to be an integer"),
    "a policy of our own": (
        build(nonfinite="skip gradient"),
        "`nonfinite` to be 'raise', 'skip' or 'ignore', got 'skip gradient'",
    ),
    "no policy": (build(nonfinite=True), "`nonfinite` to be 'raise', .* got True"),
    "policies": (
        build(nonfinite=["skip"]),
        r"`nonfinite` to be 'raise', .* \['skip'\]",
    ),
    "a length by a bool": (build(num_training_steps=True), "`num_training_steps` to"),
    "lines by a bool": (build(log_every=True), "`log_every` to be an integer"),
    "a stride by a bool": (build(window_stride=True), "`stride` to be an integer"),
    "a limit by a bool": (
        build(nonfinite="skip", max_skipped=True),
        "`max_skipped` to be an integer",
    ),
    "parts by a bool": (build(accumulate=True), "`accumulate` to be an integer"),
    "a program by a bool": (build(program=True), "`program` to be"),
    "a residency by a bool": (build(residency=True), "`residency` to be"),
}


WINDOWS = tx.data.Windows(DATA, 2)
NO_DATA = {
    "windows": (
        build(data=WINDOWS),
        r"Expected trajectories, got Windows, .* `arrays`",
    ),
    "a window": (build(data=WINDOWS[:4]), "Expected trajectories, got Window,"),
    "a list of trajectories": (
        build(data=[tx.data.Trajectories(DATA)]),
        "Expected trajectories, got list, which holds",
    ),
    "a window to validate": (
        lambda: tx.callback.Validation(ONE, WINDOWS[:4], every=1),
        "Expected trajectories, got Window,",
    ),
    "windows to validate": (
        lambda: tx.callback.Validation(ONE, WINDOWS, every=1),
        "Expected trajectories, got Windows,",
    ),
    "windows to roll out": (
        lambda: tx.callback.RolloutMetrics(WINDOWS, NRMSE, every=1),
        "Expected trajectories, got Windows,",
    ),
    "windows of windows": (
        lambda: tx.data.Windows(WINDOWS, 1),
        "Expected trajectories, got Windows,",
    ),
    "a loss of the batch in parts": (
        build(
            accumulate=2,
            time_level_loss=tx.loss.BatchLoss(lambda p, t: jnp.max(jnp.abs(p - t))),
        ),
        "a loss of one sample with `accumulate`, got a BatchLoss",
    ),
}
BUILDS |= NO_DATA


@pytest.mark.parametrize("name", BUILDS)
def test_options_are_refused_when_built(name):
    run, message = BUILDS[name]
    with pytest.raises(ValueError, match=message):
        run()


def test_integers_of_numpy_are_integers(tmp_path):
    number = np.int64
    trainer = make(
        num_training_steps=number(5),
        batch_size=number(4),
        num_rollout_steps=number(2),
        cut_bptt_every=number(2),
        adjoint=tx.KStepAdjoint(number(2)),
        window_stride=number(1),
        accumulate=number(2),
        log_every=number(2),
        callbacks=[
            tx.callback.WeightNorm(number(2)),
            tx.callback.Validation(ONE, DATA, every=number(3), batch_size=number(7)),
        ],
    )
    stepper = tx.Stepper(linear(), bundle=number(1))
    _, history = trainer(stepper, key=KEY, run_dir=tmp_path)
    _, expected = make(num_rollout_steps=2, adjoint=tx.KStepAdjoint(2), accumulate=2)(
        linear(), key=KEY
    )
    np.testing.assert_array_equal(history.loss, expected.loss)
    assert history.records["weight_norm"].steps == (0, 2, 4, 5)
