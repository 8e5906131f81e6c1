"""A run that takes over parts of another one, and several averages."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.checkpoint import Start

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))
KEY = jax.random.key(5)
DECAYS = (0.5, 0.9)


def mlp(width=8, key=jax.random.key(1)):
    return eqx.nn.MLP(3, 3, width, 1, key=key)


def make(steps=12, ema_decay=DECAYS, **options):
    return tx.trainer.SupervisedTrainer(
        DATA,
        optimizer=optax.adam(1e-2),
        num_training_steps=steps,
        batch_size=10,
        ema_decay=ema_decay,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run, and where it stands."""
    folder = tmp_path_factory.mktemp("other") / "run"
    _, history = make()(mlp(), key=KEY, run_dir=folder)
    return folder, history.state


def begin(start, model=None, trainer=None, settings=None, **options):
    """The state before the first update, as a callback sees it, and the match."""
    seen = []

    class Look(tx.callback.AbstractCallback):
        every: int = eqx.field(static=True, default=100)
        name: str = eqx.field(static=True, default="look")

        def __call__(self, context):
            seen.append(context.state)

    trainer = trainer or make(1, callbacks=[Look()], **(settings or {}))
    model = mlp(key=jax.random.key(9)) if model is None else model
    _, history = trainer(model, key=jax.random.key(8), start=start, **options)
    return seen[0], history.start


def same(a, b):
    return eqx.tree_equal(a, b)


def test_several_averages_are_those_of_their_decays(other):
    folder, state = other
    for number, decay in enumerate(DECAYS, 1):
        one = make(ema_decay=decay)(mlp(), key=KEY)[1].state
        assert same(one.ema, (state.ema, *state.more_ema)[number - 1])
        loaded, match = tx.checkpoint.load_model(
            folder, mlp(), weights="ema", average=number
        )
        assert same(loaded, state.averaged_model(number)) and not match.missing
    assert same(state.ema_model, state.averaged_model(1))
    with pytest.raises(ValueError, match="3 moving averages"):
        tx.checkpoint.load_model(folder, mlp(), weights="ema", average=3)
    with pytest.raises(ValueError, match="moving average of number 3, got 2"):
        state.averaged_model(3)


def test_callbacks_name_the_average_that_they_look_at():
    one = tx.configuration.Supervised()
    callbacks = [
        tx.callback.Validation(one, DATA, every=12, use_ema=n, name=f"v{n}")
        for n in (1, 2)
    ]
    _, history = make(callbacks=callbacks)(mlp(), key=KEY)
    for n in (1, 2):
        evaluate = tx.make_eval_step(one, use_ema=n)
        windows = tx.data.Windows(DATA, 1)
        expected, _ = evaluate(history.state, windows[:])
        np.testing.assert_allclose(history.records[f"v{n}"].values[-1], expected)
    with pytest.raises(ValueError, match="use_ema=2, got 1"):
        make(ema_decay=0.9, callbacks=callbacks[1:])


def test_each_part_is_taken_over_on_its_own(other):
    folder, state = other
    fresh = tx.TrainState.create(
        mlp(key=jax.random.key(9)), optax.adam(1e-2), key=KEY, ema=2
    )
    begun, match = begin(Start(folder))
    assert same(begun.params, state.params) and same(begun.opt_state, fresh.opt_state)
    # Averages begin at the weights that were taken over.
    assert same(begun.ema, state.params) and same(begun.more_ema[0], state.params)
    assert match.step == 12 and len(match.matched) == 4 and not match.missing
    begun, _ = begin(Start(folder, weights="ema"))
    assert same(begun.params, state.ema)
    begun, match = begin(Start(folder, weights=None, optimizer=True))
    assert same(begun.params, fresh.params) and same(begun.opt_state, state.opt_state)
    assert all(path.startswith(".opt_state") for path in match.matched)
    begun, _ = begin(Start(folder, weights=None, ema=True))
    assert same(begun.params, fresh.params) and same(begun.ema, state.ema)
    assert same(begun.more_ema, state.more_ema) and int(begun.step) == 0
    begun, _ = begin(Start(folder, optimizer=True, ema=True))
    for name in ("params", "opt_state", "ema", "more_ema"):
        assert same(getattr(begun, name), getattr(state, name))


def test_what_does_not_fit_is_refused_or_listed(other, tmp_path):
    folder, state = other
    with pytest.raises(
        ValueError, match=r"\.params\.layers\[0\]\.weight: float64\[8, 3\] was saved"
    ):
        begin(Start(folder), mlp(9))
    begun, match = begin(Start(folder, partial=True), mlp(9), run_dir=tmp_path)
    # The last bias alone has the same shape.
    assert match.matched == (".params.layers[1].bias",)
    assert same(begun.params.layers[1].bias, state.params.layers[1].bias)
    assert len(match.missing) == 3 and not match.unused
    events = [
        json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()
    ]
    assert events[1]["event"] == "taken over" and events[1]["of_step"] == 12
    assert events[1]["matched"] == list(match.matched)
    assert events[1]["missing"] == list(match.missing)


def test_what_was_trained_may_be_frozen_now(other):
    folder, state = other
    frozen = jax.tree.map(eqx.is_inexact_array, mlp())
    frozen = eqx.tree_at(
        lambda m: (m.layers[0].weight, m.layers[0].bias), frozen, (False, False)
    )
    begun, match = begin(Start(folder), settings={"trainable": frozen})
    assert not match.missing and not match.unused
    assert same(begun.model, state.model)
    begun, _ = begin(Start(folder, weights="ema"), settings={"trainable": frozen})
    assert same(begun.model, state.ema_model)


def test_averages_that_were_not_there_begin_at_the_weights(tmp_path):
    make(ema_decay=0.5)(mlp(), key=KEY, run_dir=tmp_path / "one")
    begun, match = begin(Start(tmp_path / "one", ema=True, partial=True))
    assert any("more_ema" in p for p in match.missing)
    assert same(begun.more_ema[0], begun.params)
    assert not same(begun.ema, begun.params)


def test_a_run_that_goes_on_takes_nothing_over(other, tmp_path):
    folder, _ = other
    start = Start(folder)
    stop = tx.checkpoint.Segment(epochs=2)
    trainer = make(9)
    trainer(mlp(), key=KEY, start=start, run_dir=tmp_path, segment=stop)
    _, resumed = trainer(mlp(), key=KEY, start=start, run_dir=tmp_path)
    _, alone = trainer(mlp(), key=KEY, start=start)
    assert np.array_equal(resumed.loss, alone.loss) and resumed.start is None
    assert not np.array_equal(alone.loss, trainer(mlp(), key=KEY)[1].loss)


def ensemble(start):
    keys = jax.random.split(KEY, 2)
    make()(
        eqx.filter_vmap(lambda k: mlp(key=k))(keys),
        key=keys,
        ensemble=True,
        start=start,
    )


BAD = {
    "weights": (lambda _: Start("x", weights="best"), "'current', 'ema' or None"),
    "flag": (lambda _: Start("x", optimizer=1), "`optimizer` to be True or False"),
    "nothing": (lambda _: Start("x", weights=None), "something to take over"),
    "a bool": (lambda _: Start("x", step=True), "`step` to be an integer >= 0"),
    "no step": (lambda _: Start("x", step=-1), "`step` to be an integer >= 0"),
    "no path": (lambda _: Start(3), "`run_dir` to be the path of a folder, got 3"),
    "no folder": (lambda _: Start(""), "`run_dir` to be the path of a folder"),
    "average": (
        lambda f: begin(Start(f, ema=True), trainer=make(1, ema_decay=None)),
        "`ema_decay` with a Start",
    ),
    "ensemble": (lambda f: ensemble(Start(f)), "one model with `start`"),
    "decays": (lambda _: make(ema_decay=(0.9, 1.0)), r"\[0, 1\), got \(0.9, 1.0\)"),
    "no decay": (lambda _: make(ema_decay=()), r"\[0, 1\), got \(\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case, other):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run(other[0])


def test_a_state_with_another_number_of_averages_is_refused():
    step = tx.make_train_step(
        tx.configuration.Supervised(), optax.sgd(0.1), ema_decay=DECAYS
    )
    state = tx.TrainState.create(mlp(), optax.sgd(0.1), key=KEY, ema=True)
    with pytest.raises(ValueError, match="each of the 2 decays, got 1"):
        step(state, jnp.ones((8, 2, 3)))
