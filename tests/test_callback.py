"""Contract of every callback: when it runs, what is stacked, and that it only looks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.checkpoint import Policy

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


# Compiled once: callbacks are no part of the program.
TRAINER = tx.trainer.SupervisedTrainer(
    DATA,
    optimizer=optax.adam(1e-2),
    num_training_steps=6,
    batch_size=5,
    checkpoints=Policy(every_seconds=None),
    progress=False,
    program="loop",
)


def train(callbacks, model=None, **options):
    TRAINER.callbacks = tuple(callbacks)
    model = conv() if model is None else model
    return TRAINER(model, key=jax.random.key(4), **options)[1]


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


RESULTS = {
    "number, then array": (lambda s: 0.0 if s == 0 else jnp.sin(1.0 * s), "float64"),
    "array, then number": (
        lambda s: jnp.asarray(s / 2) if s == 0 else s / 2,
        "float64",
    ),
    "numpy, then array": (
        lambda s: np.float32(s) if s == 0 else jnp.float32(s),
        "float32",
    ),
    "integers": (lambda s: s, "int64"),
    "bools": (lambda s: s > 0, "bool"),
}


def test_every_number_is_kept():
    callbacks = [
        tx.callback.Function(lambda s, m, b, f=f: f(s), 2, name)
        for name, (f, _) in RESULTS.items()
    ]
    records = train(callbacks).records
    for name, (f, dtype) in RESULTS.items():
        values = records[name].values
        assert isinstance(values, jax.Array) and values.dtype == dtype
        expected = np.array([float(f(s)) for s in (0, 2, 4, 6)])
        assert len(set(expected)) > 1
        np.testing.assert_array_equal(values, expected)


def test_settings_of_a_snapshot_stay_what_they_are():
    class Named(eqx.Module):
        conv: eqx.Module
        activation: object
        rate: float

        def __call__(self, u):
            return self.activation(self.rate * self.conv(u))

    named = Named(conv(), jnp.tanh, 0.5)
    history = train([tx.callback.GetNetwork(4)], named)
    last = history.records["network"].at(-1)
    assert last.activation is jnp.tanh and last.rate == 0.5
    assert isinstance(last.rate, float)
    assert eqx.tree_equal(last, history.state.model)


CHANGING = {
    "shape": (
        lambda s, m, b: jnp.ones(1 + s),
        r"callback 'odd' .* got float64\[5\] after 4 updates, but float64\[1\] before",
    ),
    "structure": (
        lambda s, m, b: {"a": 1.0} if s == 0 else {"b": 1.0},
        r"got \['b'\] float64\[\] after 4 updates, but \['a'\] float64\[\] before",
    ),
    "dtype": (
        lambda s, m, b: jnp.zeros((), "f4" if s == 0 else "f8"),
        r"got float64\[\] after 4 updates, but float32\[\] before",
    ),
    "text": (
        lambda s, m, b: {"n": 1.0, "text": f"step {s}"},
        r"got \['text'\] step 4 after 4 updates, but \['text'\] step 0 before",
    ),
    "too large": (lambda s, m, b: 10**30, "numbers that an array can hold"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_results_that_cannot_be_stacked_are_refused_at_once(name):
    odd, message = CHANGING[name]
    seen = []

    def note(step, model, batch):
        seen.append(step)
        return odd(step, model, batch)

    with pytest.raises(ValueError, match=message):
        train([tx.callback.Function(note, 4, "odd")])
    assert seen[-1] < 6  # Not after the run.


def test_a_refused_result_loses_no_update(tmp_path):
    def grown(size_at):
        size = lambda step, m, b: jnp.ones(size_at(step))  # noqa: E731
        return [tx.callback.WeightNorm(2), tx.callback.Function(size, 2, "grow")]

    with pytest.raises(ValueError, match="callback 'grow' .* after 4 updates"):
        train(grown(lambda step: 2 if step == 4 else 1), run_dir=tmp_path)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert steps == [4]
    # What the run recorded is there; what has another form now is named.
    with pytest.warns(RuntimeWarning, match=r"'grow' .* of the steps \[0, 2\]"):
        history = train(grown(lambda step: 3), run_dir=tmp_path)
    whole = train([tx.callback.WeightNorm(2)])
    np.testing.assert_array_equal(history.loss, whole.loss)
    assert history.records["weight_norm"].steps == (0, 2, 4, 6)
    assert history.records["grow"].steps == (4, 6)


class Forced(eqx.Module):
    conv: eqx.Module

    def __call__(self, u, inputs):
        return self.conv(u) * inputs.sample + inputs.time


def forced_residuum(u_next, u_prev, inputs):
    return u_next - 0.5 * u_prev - inputs.time


# Configurations that read one time of the states, and all of the forcing.
FORCED = {
    "residuum": tx.configuration.Residuum(
        2, residuum_fn=tx.Stepper(forced_residuum, conditioned=True)
    ),
    "diverted chain": tx.configuration.DivertedChain(
        2, 1, ref_stepper=tx.Stepper(Forced(lambda u: 0.5 * u), conditioned=True)
    ),
    "curriculum in a composite": tx.configuration.Composite(
        [
            tx.configuration.Curriculum(
                tx.configuration.Residuum(2, residuum_fn=lambda n, p: n - p),
                lambda step: 2,
            )
        ],
        [0.7],
    ),
}


@pytest.mark.parametrize("name", FORCED)
def test_forcing_reaches_validation(name):
    sample = jnp.array([0.8, -0.3])
    forcing = jax.random.normal(jax.random.key(2), (2, 6))
    data = tx.data.Trajectories(HELD_OUT, sample=sample, time=forcing)
    callback = tx.callback.Validation(FORCED[name], data, every=1, batch_size=3)
    model = tx.Stepper(Forced(conv()), conditioned=True)
    state = tx.TrainState.create(model, optax.sgd(1.0), key=jax.random.key(0))
    losses = []
    for s in range(2):
        for t in range(4):  # Windows of three times: the forcing of both steps.
            u, total = HELD_OUT[s, t], 0.0
            for i in (t, t + 1):
                u_next = conv()(u) * sample[s] + forcing[s, i]
                compared = {
                    "residuum": 0.5 * u + forcing[s, i],
                    "diverted chain": 0.5 * u * sample[s] + forcing[s, i],
                    "curriculum in a composite": u,
                }[name]
                total += jnp.mean((u_next - compared) ** 2)
                u = u_next
            losses.append(0.7 * total if "composite" in name else total)
    got = callback(tx.callback.Context(0, state, lambda: None))
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-12)


def validation(**options):
    return lambda: tx.callback.Validation(
        **{"configuration": ONE, "data": HELD_OUT, "every": 1, **options}
    )


BAD = {
    "batch size 0": (validation(batch_size=0), "`batch_size` to be an integer >= 1"),
    "batch size 2.5": (validation(batch_size=2.5), "`batch_size` .* got 2.5"),
    "use_ema": (validation(use_ema="last"), "`use_ema` to be an integer >= 1"),
    "configuration": (
        validation(configuration="x"),
        "`configuration` to be a configuration, got 'x'",
    ),
    "configuration of a loss": (
        lambda: tx.callback.Loss("x", 4),
        "`configuration` to be a configuration",
    ),
    "configuration of a gradient": (
        lambda: tx.callback.GradNorm(lambda m, b: 0.0, 4),
        "`configuration` to be a configuration",
    ),
    "too short": (
        validation(configuration=tx.configuration.Supervised(6)),
        "at most 6 times",
    ),
    "metrics": (
        lambda: tx.callback.RolloutMetrics(HELD_OUT, [jnp.mean], every=1),
        "`metrics` to be functions by name",
    ),
    "metric": (
        lambda: tx.callback.RolloutMetrics(HELD_OUT, {"x": 1}, every=1),
        "`metrics` to be functions by name",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_when_built(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
