"""Optimizers that make of a finite gradient what is not: seen at once, and never kept."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.checkpoint import Policy, Segment
from trainax_pk.trainer import _loop

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))
KEY = jax.random.key(5)
TOTAL = 24


def linear(key=jax.random.key(1)):
    return eqx.nn.Linear(3, 3, key=key)


def dividing(fails):
    """Gradient descent that divides by zero where `fails(count, gradient)`."""

    def update(grads, count, params=None):
        bad = fails(count, grads)
        return jax.tree.map(
            lambda g: -0.05 * g / jnp.where(bad, 0, 1), grads
        ), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def at(number):
    return dividing(lambda count, grads: count == number)


def now_and_then():
    """Fails by the batch alone, several times and sometimes twice in a row."""
    return dividing(lambda count, grads: grads.weight[0, 0] > 0.1)


def make(optimizer, **options):
    options = {
        "num_training_steps": TOTAL,
        "batch_size": 2,
        "checkpoints": Policy(every_seconds=None, every_steps=5),
        "progress": False,
        **options,
    }
    return tx.trainer.SupervisedTrainer(DATA, optimizer=optimizer, **options)


@pytest.fixture(scope="module")
def by_hand():
    """Update by update, with the step that guards itself: state, and what it skipped."""
    trainer = make(now_and_then(), nonfinite="skip", ema_decay=0.9)
    model = linear()
    step, skipped = jax.jit(trainer.step_fn), []
    order_key, state_key = jax.random.split(KEY)
    order = tx.data.ShuffledOrder(len(trainer.windows), 2, order_key)
    state = tx.TrainState.create(model, trainer.optimizer, key=state_key, ema=True)
    for i in range(TOTAL):
        state, info = step(state, trainer.windows[order.indices(i, 1)[0]])
        assert np.isfinite(info.loss) and np.isfinite(info.grad_norm)
        skipped.append(bool(info.skipped))
    return state, skipped


@pytest.mark.parametrize("number", [11, TOTAL - 1])
def test_a_run_ends_at_that_very_update(number, tmp_path):
    # The last update has no loss after it that could tell.
    message = (
        rf"at update {number} \(windows \[\d+, \d+\]\); what the optimizer makes is not "
        r"finite in all leaves \(\.weight, \.bias\)"
    )
    trainer = make(at(number))
    with pytest.raises(FloatingPointError, match=message):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    found, match = tx.checkpoint.load_model(tmp_path, linear())
    assert match.step == number - number % 5 and np.isfinite(found.weight).all()
    assert "what the optimizer makes" in (tmp_path / "events.jsonl").read_text()
    if number == TOTAL - 1:
        with pytest.raises(FloatingPointError, match=f"at update {number}"):
            trainer(linear(), key=KEY)


def test_skipped_updates_leave_everything_as_it_was(by_hand, tmp_path):
    trainer = make(now_and_then(), nonfinite="skip", ema_decay=0.9)
    _, history = trainer(linear(), key=KEY)
    expected, skipped = by_hand
    count = sum(skipped)
    assert 2 <= count < TOTAL - 2 and int(history.state.num_skipped) == count
    for a, b in (
        (history.state.params, expected.params),
        (history.state.ema, expected.ema),
    ):
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-12)
    # Stopped and taken up: the same bits, whatever the chunks.
    for _ in range(2):
        trainer(linear(), key=KEY, run_dir=tmp_path, segment=Segment(epochs=0.4))
    _, resumed = trainer(linear(), key=KEY, run_dir=tmp_path)
    assert int(resumed.state.num_skipped) == count
    for name in ("params", "ema", "opt_state"):
        assert eqx.tree_equal(
            getattr(resumed.state, name), getattr(history.state, name)
        )
    assert np.array_equal(resumed.loss, history.loss)
    # Inside jit nobody looks after a chunk: the step guards itself.
    inside = jax.jit(lambda m: trainer(m, key=KEY)[1].state)(linear())
    assert int(inside.num_skipped) == count
    np.testing.assert_allclose(inside.params.weight, expected.params.weight, rtol=1e-12)


def test_they_count_among_those_in_a_row(by_hand, tmp_path):
    _, skipped = by_hand
    most = max(map(len, "".join("01"[s] for s in skipped).split("0")))
    end = next(i for i in range(TOTAL) if all(skipped[max(0, i - most + 1) : i + 1]))
    message = f"at most {most - 1} updates in a row .* up to update {end}"

    def train(limit, **options):
        trainer = make(
            now_and_then(), nonfinite="skip", ema_decay=0.9, max_skipped=limit
        )
        return trainer(linear(), key=KEY, **options)

    train(most)
    with pytest.raises(FloatingPointError, match=message):
        train(most - 1)
    # Counted across a stop in the middle of them.
    assert most > 1
    train(most - 1, run_dir=tmp_path, segment=Segment(epochs=end / 16))
    with pytest.raises(FloatingPointError, match=message):
        train(most - 1, run_dir=tmp_path)


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_members_fail_alone(whole):
    keys = jax.random.split(KEY, 2)
    models = eqx.filter_vmap(linear)(keys)
    program = "auto" if whole else "loop"
    trainer = make(now_and_then(), nonfinite="skip", program=program)
    trainer.engine.vmapped = True
    _, together = trainer(models, key=keys, ensemble=True)
    for i in range(2 if whole else 1):
        member = jax.tree.map(lambda x, i=i: x[i], models)
        _, alone = trainer(member, key=keys[i])
        assert together.state.num_skipped[i] == alone.state.num_skipped
        np.testing.assert_allclose(
            together.state.params.weight[i], alone.state.params.weight, rtol=1e-12
        )
    assert together.state.num_skipped.sum() > 0
    if not whole:
        return
    ending = make(at(TOTAL - 1))
    with pytest.raises(FloatingPointError, match=r"members \[0, 1\] in the updates"):
        ending(models, key=keys, ensemble=True)


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_what_was_infinite_before_may_stay_so(whole, tmp_path):
    class Masked(eqx.Module):
        linear: eqx.Module
        mask: jax.Array

        def __call__(self, u):
            return self.linear(u) * jnp.exp(self.mask)

    model = Masked(linear(), jnp.array([0.0, -jnp.inf, 0.0]))
    for folder in (None, tmp_path) if whole else (None,):
        trained, _ = make(optax.sgd(1e-2))(model, key=KEY, run_dir=folder)
        assert trained.mask[1] == -jnp.inf
        assert jnp.isfinite(trained.linear.weight).all()
    if not whole:
        return
    assert len(list((tmp_path / "checkpoints").iterdir())) > 0
    # -inf + inf by weight decay: NaN is not what it was.
    decayed = optax.adamw(1e-2, weight_decay=0.1)
    with pytest.raises(FloatingPointError, match=r"at update 0 .*the optimizer makes"):
        make(decayed)(model, key=KEY)


def test_raising_after_skipping_names_the_update(by_hand, tmp_path):
    skipped = [i for i, is_skipped in enumerate(by_hand[1]) if is_skipped]
    stop = skipped[1] + 1
    options = {"ema_decay": 0.9}
    make(now_and_then(), nonfinite="skip", **options)(
        linear(), key=KEY, run_dir=tmp_path, segment=Segment(epochs=stop / 16)
    )
    wrong = next(i for i in skipped if i >= stop)
    message = rf"at update {wrong} .*what the optimizer makes"
    with pytest.raises(FloatingPointError, match=message):
        make(now_and_then(), **options)(
            linear(), key=KEY, run_dir=tmp_path, allow_changes=["nonfinite"]
        )


def test_ignoring_goes_on():
    model, history = make(at(11), nonfinite="ignore")(linear(), key=KEY)
    assert not jnp.isfinite(model.weight).any() and history.loss.shape == (TOTAL,)


def test_norms_that_overflow_are_no_failure_of_members():
    # Gradients are large and finite, and nothing to this optimizer.
    trainer = make(
        optax.chain(optax.scale_by_sign(), optax.scale(-1e-3)),
        time_level_loss=lambda p, t: 1e200 * jnp.mean(jnp.square(p - t)),
        program="scan",
    )
    trainer.engine.vmapped = True
    keys = jax.random.split(KEY, 2)
    models = eqx.filter_vmap(linear)(keys)
    trained, history = trainer(models, key=keys, ensemble=True)
    assert jnp.isinf(history.grad_norm).all() and jnp.isfinite(history.loss).all()
    alone, _ = trainer(jax.tree.map(lambda x: x[1], models), key=keys[1])
    np.testing.assert_allclose(trained.weight[1], alone.weight, rtol=1e-12)


def test_a_step_that_is_guarded_already_does_not_run_once_more(monkeypatch):
    def step(state, batch):
        return state, SimpleNamespace(loss=jnp.ones(()), grad_norm=jnp.asarray(jnp.inf))

    made = make(optax.sgd(1e-2))
    engine = tx.engine.Engine(
        step,
        tx.engine.make_feed(made.windows),
        num_updates=4,
        program="scan",
        raises=True,
    )
    engine.vmapped, calls = True, []
    members = engine._programs.members

    def counting(*args):
        calls.append(args)
        return members(*args)

    monkeypatch.setattr(engine._programs, "members", counting)

    def run(key):
        state = tx.TrainState.create(linear(), optax.sgd(1e-2), key=key)
        return engine.run(state, tx.data.ShuffledOrder(8, 2, key), 0, 4, 4)

    with pytest.raises(FloatingPointError, match="member 0 at update 0"):
        eqx.filter_vmap(run)(jax.random.split(KEY, 2))
    assert len(calls) == 1


def test_parameters_that_no_replay_explains_are_named(monkeypatch):
    monkeypatch.setattr(_loop, "explain_failure", lambda *_: None)
    message = (
        r"finite parameters, got \.weight, \.bias that are not after the updates \d+ to "
        rf"{TOTAL - 1}; losses and gradients were finite\. Lower"
    )
    with pytest.raises(FloatingPointError, match=message):
        make(at(TOTAL - 1))(linear(), key=KEY)
