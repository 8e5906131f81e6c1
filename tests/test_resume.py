"""Runs in a folder: whatever happens to them, they end in the bits of the run alone."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk import _signals
from trainax_pk._lock import hold_lock
from trainax_pk.callback import _evaluate
from trainax_pk.checkpoint import (
    CheckpointDamaged,
    Policy,
    RunChanged,
    Segment,
    _store,
)

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))
KEY = jax.random.key(5)
OFTEN = Policy(every_seconds=None, every_steps=7)
TOTAL = 41


def mlp(width=8, key=jax.random.key(1)):
    return eqx.nn.MLP(3, 3, width, 1, key=key)


def linear():
    return eqx.nn.Linear(3, 3, key=jax.random.key(1))


class Dropped(eqx.Module):
    """A network with dropout."""

    linear: eqx.Module
    dropout: eqx.nn.Dropout

    def __call__(self, u, *, key=None):
        return self.linear(self.dropout(u, key=key))


class Normed(eqx.Module):
    """A network with a layer that has a state."""

    norm: eqx.nn.BatchNorm
    linear: eqx.Module

    def __call__(self, u, state):
        u, state = self.norm(u, state)
        return self.linear(u), state


def dropped():
    return tx.Stepper(Dropped(linear(), eqx.nn.Dropout(0.3)), stochastic=True)


def normed():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    return tx.Stepper(Normed(norm, linear()), state=state)


class Killed(Exception):
    pass


class Killer(tx.callback.AbstractCallback):
    """Ends the process, as far as the run can tell, the first time it is asked."""

    armed: list = eqx.field(static=True)
    every: int = eqx.field(static=True)
    name: str = eqx.field(static=True, default="killer")

    def __call__(self, context):
        if context.step and self.armed:
            self.armed.pop()
            raise Killed
        return jnp.float32(context.step)


def make(**options):
    options = {
        "optimizer": optax.adam(1e-2),
        "num_training_steps": TOTAL,
        "batch_size": 10,
        "checkpoints": OFTEN,
        "log_every": 4,
        "progress": False,
        **options,
    }
    data = options.pop("data", DATA)
    return tx.trainer.SupervisedTrainer(data, **options)


def sha(history):
    """SHA-256 of everything that training carries and reports."""
    state = eqx.tree_at(lambda s: s.key, history.state, jax.random.key_data(KEY))
    leaves = jax.tree.leaves((state, history.loss, history.grad_norm))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


# name -> (model, options of the trainer)
class Scaled(eqx.Module):
    """A network with a parameter that has no axis."""

    linear: eqx.Module
    scale: jax.Array

    def __call__(self, u):
        return self.scale * self.linear(u)


def scaled():
    return Scaled(linear(), jnp.asarray(0.9))


RUNS = {
    "plain": (linear, {}),
    "average of a scalar": (scaled, {"ema_decay": 0.9}),
    "dropout": (dropped, {}),
    "layers with state": (normed, {}),
    "average, accumulation, schedule": (
        linear,
        {
            "ema_decay": 0.9,
            "accumulate": 2,
            "max_grad_norm": 0.1,
            "optimizer": optax.adam(optax.cosine_decay_schedule(1e-2, 50)),
        },
    ),
    "loop from the host, skipping": (
        linear,
        {
            "program": "loop",
            "residency": "host",
            "nonfinite": "skip",
            "optimizer": optax.sgd(1e-2, momentum=0.9),
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_in_the_same_bits(name, tmp_path):
    model, options = RUNS[name]
    armed = []
    callbacks = [tx.callback.WeightNorm(6), Killer(armed, 18)]
    trainer = make(callbacks=callbacks, **options)
    _, alone = trainer(model(), key=KEY)
    _, saved = trainer(model(), key=KEY, run_dir=tmp_path / "whole")
    assert sha(saved) == sha(alone)
    # Killed twice; once all is compiled anew after that, as in another process.
    anew = name == "dropout"
    other = make(callbacks=callbacks, **options) if anew else trainer
    for other in (trainer, other):
        armed.append(True)
        with pytest.raises(Killed):
            other(model(), key=KEY, run_dir=tmp_path / "run")
    resumed_model, resumed = other(model(), key=KEY, run_dir=tmp_path / "run")
    assert sha(resumed) == sha(alone)
    for record in ("weight_norm", "killer"):
        a, b = alone.records[record], resumed.records[record]
        assert a.steps == b.steps and np.array_equal(a.values, b.values)
    a, b = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "run"))
    assert a == b
    # Finished: the same again, without an update.
    traces = other.engine.num_traces
    _, again = other(model(), key=KEY, run_dir=tmp_path / "run")
    assert sha(again) == sha(alone) and other.engine.num_traces == traces
    assert eqx.tree_equal(again.records, resumed.records)


def test_a_finished_run_asks_nothing_again(tmp_path):
    asked = []

    def report(step, model, batch):
        asked.append(step)
        return {
            "norm": jnp.sum(model.weight**2, dtype=jnp.float32),
            "list": [
                jnp.arange(3, dtype=jnp.bfloat16),
                (None, "text", jnp.zeros((0, 2))),
            ],
            "key": jax.random.key(step),
        }

    def score(step, model, batch):
        return abs(step - 10.0)

    callbacks = [
        tx.callback.Function(report, 10, "report"),
        tx.callback.Function(score, 10, "score"),
        tx.callback.GetNetwork(20),
    ]
    trainer, folder = make(callbacks=callbacks), tmp_path / "run"
    model, history = trainer(linear(), key=KEY, run_dir=folder)
    assert asked == [0, 10, 20, 30, 40, TOTAL]
    lines = (folder / "metrics.jsonl").read_bytes()

    def again(expected, **options):
        asked.clear()
        other = make(callbacks=callbacks, **options) if options else trainer
        out = other(linear(), key=KEY, run_dir=folder)
        assert asked == expected
        return out

    for _ in range(2):
        same_model, same = again([])
        assert eqx.tree_equal((same_model, same.records), (model, history.records))
        assert (folder / "metrics.jsonl").read_bytes() == lines
    # Damaged it is as if it were not there.
    kept = folder / "finished.json"
    kept.write_bytes(kept.read_bytes().replace(b'"score"', b'"scare"'))
    again([TOTAL])
    again([])
    # Another budget: what was last is last no more.
    _, longer = again([50, 51], num_training_steps=51)
    assert longer.records["report"].steps == (0, 10, 20, 30, 40, 50, 51)
    # Ended early, and a rule that would have gone on.
    early = {"early_stopping": tx.evaluation.EarlyStopping("score", patience=2)}
    folder = tmp_path / "early"
    _, ended = again([0, 10, 20, 30], **early)
    _, same = again([], **early)
    assert eqx.tree_equal(same.records, ended.records) and same.best == ended.best
    early = {"early_stopping": tx.evaluation.EarlyStopping("score", patience=9)}
    again([40, TOTAL], **early)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that stopped on its way, and the bits that it has to end in."""
    trainer = make(ema_decay=0.9)
    folder = tmp_path_factory.mktemp("begun") / "run"
    _, part = trainer(mlp(), key=KEY, run_dir=folder, segment=Segment(epochs=5))
    # Five epochs of 32 windows, ten at a time.
    assert int(part.state.step) == 16 and part.loss.shape == (16,)
    _, alone = trainer(mlp(), key=KEY)
    return trainer, folder, sha(alone)


@pytest.fixture
def run(begun, tmp_path):
    trainer, folder, bits = begun
    shutil.copytree(folder, tmp_path / "run")
    return trainer, tmp_path / "run", bits


def test_segments_and_larger_budgets_continue(run):
    trainer, folder, bits = run
    _, part = trainer(mlp(), key=KEY, run_dir=folder, segment=Segment(minutes=1e-9))
    assert 16 < int(part.state.step) <= TOTAL
    _, whole = trainer(mlp(), key=KEY, run_dir=folder)
    assert sha(whole) == bits
    longer = make(ema_decay=0.9, num_training_steps=TOTAL + 20)
    _, extended = longer(mlp(), key=KEY, run_dir=folder)
    assert sha(extended) == sha(longer(mlp(), key=KEY)[1])
    with pytest.raises(ValueError, match=f"num_training_steps >= {TOTAL + 20}"):
        trainer(mlp(), key=KEY, run_dir=folder)


def test_the_average_and_a_start_from_another_run(run):
    trainer, folder, _ = run
    model, history = trainer(mlp(), key=KEY, run_dir=folder)
    averaged, match = tx.checkpoint.load_model(folder, mlp(), weights="ema")
    assert eqx.tree_equal(averaged, history.state.ema_model)
    assert not match.missing and not match.unused
    current, _ = tx.checkpoint.load_model(folder, mlp())
    assert eqx.tree_equal(current, model)


def deeper():
    return eqx.nn.MLP(3, 3, 8, 2, key=jax.random.key(1))


def shallower():
    return eqx.nn.MLP(3, 3, 8, 0, key=jax.random.key(1))


def swapped():
    one = mlp()
    return eqx.tree_at(lambda m: m.layers, one, (one.layers[1], one.layers[0]))


def other_activation():
    return eqx.nn.MLP(3, 3, 8, 1, jnp.tanh, key=jax.random.key(1))


def retyped():
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, mlp()
    )


# what differs -> (model, options, key, what the message says)
CHANGED = {
    "width": (lambda: mlp(9), {}, KEY, r"out_features: 8 was saved, now 9"),
    "leaves": (
        lambda: mlp(9),
        {},
        KEY,
        r"params\.layers\[0\]\.weight: float64\[8, 3\] was saved, now float64\[9, 3\]",
    ),
    "layer": (deeper, {}, KEY, r"layers\[2\]\.weight: nothing was saved, now"),
    "layer less": (
        shallower,
        {},
        KEY,
        r"layers\[1\]\.weight: .* was saved, now nothing",
    ),
    "layers swapped": (
        swapped,
        {},
        KEY,
        r"layers\[0\]\.weight: float64\[8, 3\] was saved, now float64\[3, 8\]",
    ),
    "activation": (other_activation, {}, KEY, r"model\.activation"),
    "dtype": (retyped, {}, KEY, r"float64\[8, 3\] was saved, now float32\[8, 3\]"),
    "optimizer": (mlp, {"optimizer": optax.sgd(1e-2)}, KEY, r"opt_state.*now nothing"),
    "rate": (mlp, {"optimizer": optax.adam(2e-2)}, KEY, "-0.01 was saved, now -0.02"),
    "batch": (mlp, {"batch_size": 11}, KEY, "batch_size: 10 was saved, now 11"),
    "data": (mlp, {"data": DATA.at[3, 8, 2].add(1e-9)}, KEY, r"data\.arrays\.state"),
    "order of data": (mlp, {"data": DATA[::-1]}, KEY, r"data\.arrays\.state"),
    "seed": (mlp, {}, jax.random.key(6), r"key: .*\[0, 5\] was saved, now .*\[0, 6\]"),
    "rollout": (mlp, {"num_rollout_steps": 2}, KEY, r"num_rollout_steps: 1 was saved"),
    "average": (mlp, {"ema_decay": 0.8}, KEY, "ema_decay: 0.9 was saved, now 0.8"),
    "program": (mlp, {"program": "loop"}, KEY, "'auto' was saved, now 'loop'"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_run_is_refused_by_field(case, begun):
    model, options, key, message = CHANGED[case]
    _, folder, _ = begun
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    with pytest.raises(RunChanged, match=message):
        make(**{"ema_decay": 0.9, **options})(model(), key=key, run_dir=folder)
    assert before == sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_schedules_of_another_length_are_refused(tmp_path):
    def trainer(steps):
        return make(optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, steps)))

    trainer(50)(mlp(), key=KEY, run_dir=tmp_path, segment=Segment(epochs=1))
    with pytest.raises(RunChanged, match="decay_steps: 50 was saved, now 60"):
        trainer(60)(mlp(), key=KEY, run_dir=tmp_path)
    # The same one has been used by now, which is no change.
    again = trainer(50)
    stop = Segment(epochs=1)
    for _ in range(2):
        again(mlp(), key=KEY, run_dir=tmp_path / "again", segment=stop)


def test_a_change_may_be_allowed_and_is_logged(run):
    _, folder, bits = run
    trainer = make(
        ema_decay=0.9,
        optimizer=optax.adam(1e-3),
        callbacks=[tx.callback.WeightNorm(20)],
        residency="host",
    )
    with pytest.raises(RunChanged, match=r"allow_changes=\('optimizer',\)"):
        trainer(mlp(), key=KEY, run_dir=folder)
    _, history = trainer(mlp(), key=KEY, run_dir=folder, allow_changes=["optimizer"])
    assert int(history.state.step) == TOTAL and sha(history) != bits
    assert history.records["weight_norm"].steps == (20, 40, 41)
    events = [json.loads(x) for x in (folder / "events.jsonl").read_text().splitlines()]
    changed = events[-2]["changed"]
    assert any(name.endswith("step_size") for name in changed)
    assert "callbacks[0]" in changed and "data.residency" in changed


def test_what_does_not_matter_is_not_compared(run):
    _, folder, bits = run
    other = make(ema_decay=0.9, checkpoints=Policy(), log_every=4)
    assert sha(other(mlp(key=jax.random.key(9)), key=KEY, run_dir=folder)[1]) == bits
    events = [json.loads(x) for x in (folder / "events.jsonl").read_text().splitlines()]
    assert "changed" not in events[-2]


def test_a_damaged_checkpoint_is_passed_over(run):
    trainer, folder, bits = run
    newest = max((folder / "checkpoints").iterdir())
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=os.path.getsize)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="step 16 is damaged .* that of step 14"):
        _, history = trainer(mlp(), key=KEY, run_dir=folder)
    assert sha(history) == bits


def test_a_run_is_never_begun_again_over_damaged_ones(run):
    trainer, folder, _ = run
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointDamaged, match="16: .*14: "):
        trainer(mlp(), key=KEY, run_dir=folder)
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_second_process_is_refused_and_a_stale_lock_is_not_one(run):
    trainer, folder, bits = run
    with (
        hold_lock(folder / "lock", 0.0, "it", ""),
        pytest.raises(TimeoutError, match=f'"pid": {os.getpid()}.* another run_dir'),
    ):
        trainer(mlp(), key=KEY, run_dir=folder)
    (folder / "lock").write_text('{"pid": 1, "host": "gone"}')
    assert sha(trainer(mlp(), key=KEY, run_dir=folder)[1]) == bits


def signalling(number, every=18):
    fired = []

    def send(step, model, batch):
        if step and not fired:
            fired.append(step)
            os.kill(os.getpid(), number)
        return jnp.zeros(())

    return tx.callback.Function(send, every, "signal")


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_signals_save_and_end(number, ends, tmp_path, caplog):
    never = Policy(every_seconds=None)
    trainer = make(checkpoints=never, callbacks=[signalling(number)])
    handler = signal.getsignal(number)
    began = time.monotonic()
    with pytest.raises(ends) as error:
        trainer(linear(), key=KEY, run_dir=tmp_path)
    assert time.monotonic() - began < 20
    assert number == signal.SIGINT or error.value.code == 143
    assert signal.getsignal(number) is handler
    assert "saves and ends" in caplog.text
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    # Polled before the next callback, or after the chunk that follows.
    assert len(steps) == 1 and 18 <= steps[0] < TOTAL
    _, history = trainer(linear(), key=KEY, run_dir=tmp_path)
    assert sha(history) == sha(make()(linear(), key=KEY)[1])


def test_a_signal_is_heard_between_the_batches_of_an_evaluation(tmp_path, monkeypatch):
    pieces = []
    add_losses = _evaluate._add_losses

    def signalled(*args):
        pieces.append(args[-2:])
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return add_losses(*args)

    monkeypatch.setattr(_evaluate, "_add_losses", signalled)
    monkeypatch.setattr(_evaluate, "_PIECE_SECONDS", 0.0)
    one = tx.configuration.Supervised()
    trainer = make(
        callbacks=[tx.callback.Validation(one, DATA, every=30, batch_size=3)]
    )
    with pytest.raises(SystemExit):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    # Ten whole batches, one by one, of which seven were not waited for.
    assert [(int(a), int(b)) for a, b in pieces] == [(0, 1), (1, 2), (2, 3)]
    _, history = trainer(linear(), key=KEY, run_dir=tmp_path)
    _, alone = trainer(linear(), key=KEY)
    assert sha(history) == sha(alone)
    records = [h.records["validation"].values for h in (history, alone)]
    assert np.array_equal(*records)
    windows = tx.data.Windows(DATA, 1)[:]
    expected, _ = tx.make_eval_step(one)(alone.state, windows)
    np.testing.assert_allclose(records[0][-1], expected, rtol=1e-12)


def test_snapshots_that_hold_keys_go_on(tmp_path):
    class Keyed(eqx.Module):
        linear: eqx.Module
        key: jax.Array

        def __call__(self, u):
            return self.linear(u)

    trainer = make(callbacks=[tx.callback.GetNetwork(10)])
    keyed = Keyed(linear(), jax.random.key(3))
    _, first = trainer(keyed, key=KEY, run_dir=tmp_path)
    _, again = trainer(keyed, key=KEY, run_dir=tmp_path)
    one, other = (h.records["network"] for h in (first, again))
    assert one.steps == other.steps
    assert eqx.tree_equal(one.at(2), other.at(2))


def test_a_signal_is_heard_between_the_batches_of_rollouts(tmp_path, monkeypatch):
    firsts = []
    rollouts = _evaluate._rollouts

    def signalled(callback, state, first):
        firsts.append(int(first))
        if len(firsts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rollouts(callback, state, first)

    monkeypatch.setattr(_evaluate, "_rollouts", signalled)
    metrics = {"mse": lambda a, b: jnp.mean((a - b) ** 2)}
    held_out = jax.random.normal(jax.random.key(8), (7, 4, 3))
    rolled = tx.callback.RolloutMetrics(held_out, metrics, every=30, batch_size=3)
    with pytest.raises(SystemExit):
        make(callbacks=[rolled])(linear(), key=KEY, run_dir=tmp_path)
    assert firsts == [0, 3]
    _, history = make(callbacks=[rolled])(linear(), key=KEY, run_dir=tmp_path)
    assert firsts[2:5] == [0, 3, 4]
    values = history.records["rollout"].values["mse"]
    model, expected = history.state.model, []
    for u in held_out:
        v = u[0]
        for w in u[1:]:
            v = model(v)
            expected.append(jnp.mean((v - w) ** 2))
    np.testing.assert_allclose(values[-1], np.mean(expected), rtol=1e-12)


def test_the_last_state_is_saved_while_the_main_thread_is_deaf(tmp_path, monkeypatch):
    exits = []
    monkeypatch.setattr(_signals, "_PATIENCE", 0.05)
    monkeypatch.setattr(_signals.os, "_exit", exits.append)

    def deaf(step, model, batch):
        if step == 18:
            os.kill(os.getpid(), signal.SIGTERM)
            while not exits:
                time.sleep(0.01)
            assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [
                f"{18:012d}"
            ]
        return jnp.zeros(())

    callbacks = [tx.callback.Function(deaf, 18, "deaf")]
    trainer = make(checkpoints=Policy(), callbacks=callbacks)
    with pytest.raises(SystemExit):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    assert exits == [143]


def test_a_signal_during_the_last_save_is_obeyed(tmp_path, monkeypatch):
    write = _store.write_arrays

    def signalled(folder, leaves):
        os.kill(os.getpid(), signal.SIGTERM)
        write(folder, leaves)

    monkeypatch.setattr(_store, "write_arrays", signalled)
    with pytest.raises(SystemExit):
        make(checkpoints=Policy())(linear(), key=KEY, run_dir=tmp_path)
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [TOTAL]


def test_a_failure_is_noted_and_never_saved(tmp_path):
    trainer = make(optimizer=optax.sgd(1e30))
    with pytest.raises(FloatingPointError, match=r"at update \d+ \(windows"):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    events = [
        json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()
    ]
    assert events[-1]["event"] == "failed" and "(windows [" in events[-1]["why"]
    ignoring = make(optimizer=optax.sgd(1e30), nonfinite="ignore")
    with pytest.warns(RuntimeWarning, match="NotFinite"):
        ignoring(linear(), key=KEY, run_dir=tmp_path / "other")
    found, match = tx.checkpoint.load_model(tmp_path / "other", linear())
    assert match.step < TOTAL and bool(jnp.isfinite(found.weight).all())


class Poisoned(eqx.Module):
    """A model whose loss is not finite where the first number is large."""

    linear: eqx.Module

    def __call__(self, u):
        return jnp.where(u[0] > 0.7, jnp.nan, self.linear(u))


def test_too_many_skipped_updates_in_a_row_end_a_run(tmp_path):
    def train(limit, **options):
        trainer = make(nonfinite="skip", max_skipped=limit, batch_size=2, log_every=1)
        return trainer(Poisoned(linear()), key=KEY, **options)[1]

    ok = np.isfinite(train(None).loss)
    runs = "".join("1" if x else "0" for x in ok).split("1")
    most = max(map(len, runs))
    assert most > 1 and int(train(most).state.num_skipped) == np.sum(~ok)
    end = next(i for i in range(TOTAL) if not ok[max(0, i - most + 1) : i + 1].any())
    message = f"at most {most - 1} updates in a row .* up to update {end}"
    with pytest.raises(FloatingPointError, match=message):
        train(most - 1)
    # Counted across a stop in the middle of them.
    stop = Segment(epochs=(end * 2) / 32)
    assert train(most - 1, run_dir=tmp_path, segment=stop).loss.shape == (end,)
    with pytest.raises(FloatingPointError, match=message):
        train(most - 1, run_dir=tmp_path)


def test_a_failed_save_does_not_end_a_run(tmp_path, monkeypatch):
    write, calls = _store.write_arrays, []

    def sometimes(folder, leaves):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(folder, leaves)

    monkeypatch.setattr(_store, "write_arrays", sometimes)
    with pytest.warns(RuntimeWarning, match="A save failed .*No space left"):
        _, history = make()(linear(), key=KEY, run_dir=tmp_path)
    assert int(history.state.step) == TOTAL and len(calls) >= 5
    monkeypatch.setattr(_store, "write_arrays", write)
    assert sha(make()(linear(), key=KEY, run_dir=tmp_path)[1]) == sha(history)


def test_the_last_save_has_to_work(tmp_path, monkeypatch):
    def full(folder, leaves):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_store, "write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        make(checkpoints=Policy())(linear(), key=KEY, run_dir=tmp_path)


def test_a_folder_that_is_deleted_is_made_again(tmp_path):
    def remove(step, model, batch):
        if step == 18:
            folder = tmp_path / "run" / "checkpoints"
            while not (folder / f"{14:012d}").exists() or list(folder.glob(".*")):
                time.sleep(0.01)
            # Away at once: the run writes lines of its log meanwhile.
            shutil.rmtree((tmp_path / "run").rename(tmp_path / "gone"))
        return jnp.zeros(())

    trainer = make(callbacks=[tx.callback.Function(remove, 18, "remove")])
    _, history = trainer(linear(), key=KEY, run_dir=tmp_path / "run")
    assert sha(history) == sha(make()(linear(), key=KEY)[1])
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name.endswith(str(TOTAL))


def test_runs_that_cannot_be_saved_are_refused(tmp_path):
    trainer = make()
    with pytest.raises(ValueError, match="`run_dir` with `segment`"):
        trainer(mlp(), key=KEY, segment=Segment(epochs=1))
    with pytest.raises(ValueError, match="nonfinite='skip' with `max_skipped`"):
        make(max_skipped=3)
    keys = jax.random.split(KEY, 2)
    models = jax.tree.map(lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x, mlp())
    with pytest.raises(ValueError, match="one model with `run_dir`"):
        trainer(models, key=keys, ensemble=True, run_dir=tmp_path)


def test_what_is_restored_does_not_retrace(run):
    trainer, folder, _ = run
    trainer(mlp(), key=KEY)
    traces = trainer.engine.num_traces
    trainer(mlp(), key=KEY, run_dir=folder)
    assert trainer.engine.num_traces == traces


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """A short form of benchmarks/run_kills.py, which holds the matrix."""
    driver = Path(__file__).with_name("_run_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "4", "1", "dropout, average"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["dropout, average"]
    assert report["kills"] >= 4 and report["same"] and report["once"], report
