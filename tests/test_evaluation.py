"""What evaluations decide: the best model, the end of training; and nothing else."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.checkpoint import Policy
from trainax_pk.evaluation import EarlyStopping, Monitor, Progress

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))
HELD_OUT = jax.random.normal(jax.random.key(9), (2, 6, 3))
KEY = jax.random.key(5)


def linear():
    return eqx.nn.Linear(3, 3, key=jax.random.key(1))


def make(callbacks=(), **options):
    return tx.trainer.SupervisedTrainer(
        DATA,
        optimizer=optax.adam(1e-2),
        num_training_steps=60,
        batch_size=10,
        callbacks=callbacks,
        progress=False,
        **options,
    )


def scripted(values, name="score", every=5):
    """A callback that reports given numbers, one after another by the step."""

    def report(step, model, batch):
        return jnp.asarray(values[step // every])

    return tx.callback.Function(report, every, name)


# rule, values -> (best evaluation, number of evaluations until the end or None, why)
NAN = math.nan
RULES = {
    "patience": (
        EarlyStopping("x", patience=2),
        [3, 1, 2, 1.5, 0],
        (1, 4, "in 2 eval"),
    ),
    "no end": (EarlyStopping("x", patience=2), [3, 1, 2, 0.5, 1], (3, None, "")),
    "delta": (
        EarlyStopping(Monitor("x", min_delta=0.5), patience=2),
        [3.0, 2.8, 2.6, 2.0],
        (0, 3, "in 2 eval"),
    ),
    "max": (
        EarlyStopping(Monitor("x", mode="max"), patience=1),
        [1, 2, 1],
        (1, 3, "in 1"),
    ),
    "finite": (EarlyStopping("x"), [2, NAN, 1], (0, 2, "is nan")),
    "infinite": (EarlyStopping("x"), [2, -math.inf, 1], (0, 2, "is -inf")),
    "infinite, max": (
        EarlyStopping(Monitor("x", mode="max"), check_finite=False),
        [2, math.inf, 3],
        (2, None, ""),
    ),
    "not finite": (EarlyStopping("x", check_finite=False), [2, NAN, 1], (2, None, "")),
    "reached": (
        EarlyStopping("x", stopping_threshold=1.0),
        [2, 1, 0],
        (1, 2, "reached 1"),
    ),
    "diverged": (
        EarlyStopping("x", divergence_threshold=5.0),
        [2, 5, 6, 1],
        (0, 3, "worse than 5"),
    ),
    "reached, max": (
        EarlyStopping(Monitor("x", mode="max"), stopping_threshold=0.9),
        [0.5, 0.95, 0.2],
        (1, 2, "reached 0.9"),
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    rule, values, (best, end, why) = RULES[case]
    progress, seen = Progress(), None
    for i, value in enumerate(values):
        progress = progress.after(rule, i, value)
        if progress.reason is not None:
            seen = i + 1
            break
    assert progress.best_step == best and seen == end
    assert progress.best_value == values[best]
    assert why in (progress.reason or "")


def test_a_monitor_may_weigh_several_numbers():
    monitor = Monitor({"rollout['nrmse']": 2.0, "validation": 0.5})
    results = {"rollout['nrmse']": np.array([1.0, 3.0]), "validation": 4.0}
    assert monitor.value(results) == 6.0
    assert monitor.value({"validation": 4.0}) is None


SCRIPT = [3.0, 2.0, 1.0, 1.5, 1.2, 1.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_early_stopping_returns_the_best_model(tmp_path):
    callbacks = [scripted(SCRIPT), tx.callback.GetNetwork(5)]
    trainer = make(callbacks, early_stopping=EarlyStopping("score", patience=3))
    model, history = trainer(linear(), key=KEY)
    assert int(history.state.step) == 25 and history.loss.shape == (25,)
    assert history.best == {"score": (10, 1.0)}
    snapshots = history.records["network"]
    assert eqx.tree_equal(model, snapshots.at(snapshots.steps.index(10)))
    # The same in a folder, killed after the best evaluation and taken up again.
    armed = [True]

    def kill(step, model, batch):
        if step == 20 and armed:
            armed.clear()
            raise InterruptedError
        return jnp.zeros(())

    policy = Policy(every_seconds=None, every_steps=6, keep_last=1)
    saved = make(
        [*callbacks, tx.callback.Function(kill, 20, "kill")],
        early_stopping=EarlyStopping("score", patience=3),
        checkpoints=policy,
    )
    with pytest.raises(InterruptedError):
        saved(linear(), key=KEY, run_dir=tmp_path)
    for _ in range(2):  # taken up, and finished
        again, resumed = saved(linear(), key=KEY, run_dir=tmp_path)
        assert eqx.tree_equal(again, model) and resumed.best == history.best
        assert np.array_equal(resumed.loss, history.loss)
        assert resumed.records["score"].steps == history.records["score"].steps
    events = [
        json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()
    ]
    assert events[-1]["reason"] == "no improvement in 3 evaluations"
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == [10, 25]


@pytest.mark.parametrize("in_folder", [False, True])
def test_training_may_end_before_its_first_update(in_folder, tmp_path):
    options = {"run_dir": tmp_path} if in_folder else {}
    rule = EarlyStopping("score", stopping_threshold=1.0)
    trainer = make([scripted([0.5])], early_stopping=rule)
    for _ in range(2):
        model, history = trainer(linear(), key=KEY, **options)
        assert eqx.tree_equal(model, linear())
        assert history.loss.shape == history.grad_norm.shape == (0,)
        assert history.best == {"score": (0, 0.5)}


def test_a_monitor_of_what_a_callback_does_not_report_is_refused():
    metrics = {"nrmse": tx.metrics.nrmse_per_lead_time}
    rolled = tx.callback.RolloutMetrics(HELD_OUT, metrics, every=5)
    for name in ("rollout", "rollout['mse']"):
        trainer = make([rolled], early_stopping=EarlyStopping(name))
        with pytest.raises(ValueError, match=r"rollout\['nrmse'\]"):
            trainer(linear(), key=KEY)


def test_the_last_model_may_be_asked_for():
    rule = EarlyStopping("score", patience=3, restore_best=False)
    model, history = make([scripted(SCRIPT)], early_stopping=rule)(linear(), key=KEY)
    assert int(history.state.step) == 25 and eqx.tree_equal(model, history.state.model)


def test_best_checkpoints_of_several_monitors_are_kept(tmp_path):
    callbacks = [
        scripted(SCRIPT, "a"),
        scripted([-x for x in SCRIPT[::-1]], "b"),
        tx.callback.GetNetwork(5),
    ]
    trainer = make(
        callbacks,
        monitors=["a", Monitor("b", mode="max")],
        checkpoints=Policy(every_seconds=None, every_steps=7, keep_last=1),
    )
    model, history = trainer(linear(), key=KEY, run_dir=tmp_path)
    assert int(history.state.step) == 60
    assert history.best == {"a": (30, 0.1), "b": (0, -0.1)}
    best, _ = tx.checkpoint.load_model(tmp_path, linear(), step=30)
    snapshots = history.records["network"]
    assert eqx.tree_equal(best, snapshots.at(snapshots.steps.index(30)))
    assert eqx.tree_equal(model, history.state.model)


def test_monitors_of_one_callback_are_told_apart():
    most = Monitor("score", mode="max", label="worst score")
    trainer = make(
        [scripted(SCRIPT)],
        early_stopping=EarlyStopping("score", patience=3),
        monitors=["score", most],
    )
    _, history = trainer(linear(), key=KEY)
    assert history.best == {"score": (10, 1.0), "worst score": (0, 3.0)}
    weighed = [Monitor({"a": 1.0, "b": w}, label=f"b {w}") for w in (0.5, 2.0)]
    both = [scripted(SCRIPT, "a"), scripted([x**2 for x in SCRIPT], "b", 10)]
    trainer = make(both, monitors=weighed)
    assert make(both, monitors={"a": 1.0, "b": 0.5}).monitors[0].key == "a + b"
    _, history = trainer(linear(), key=KEY)
    # Compared where both are reported: 0, 10, ... 60.
    assert {step % 10 for step, _ in history.best.values()} == {0}
    assert len(history.best) == 2


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path):
    trainer = make(
        [scripted(SCRIPT)], early_stopping=EarlyStopping("score", patience=3)
    )
    trainer(linear(), key=KEY, run_dir=tmp_path)
    victim = tmp_path / "checkpoints" / f"{10:012d}" / "manifest.json"
    victim.write_text("{}")
    with pytest.warns(RuntimeWarning, match="best step, 10, is not there"):
        model, history = trainer(linear(), key=KEY, run_dir=tmp_path)
    assert eqx.tree_equal(model, history.state.model)


def test_evaluation_does_not_change_training():
    one = tx.configuration.Supervised()
    nrmse = {"nrmse": tx.metrics.nrmse_per_lead_time}
    watched = make(
        [
            tx.callback.Validation(one, HELD_OUT, every=7),
            tx.callback.Validation(one, HELD_OUT, every=9, use_ema=True, name="ema"),
            tx.callback.Validation(one, DATA, every=20, name="train"),
            tx.callback.RolloutMetrics(HELD_OUT, nrmse, every=11),
        ],
        ema_decay=0.9,
        early_stopping=EarlyStopping("validation", patience=100),
        monitors=["ema", {"rollout['nrmse']": 1.0}],
    )
    _, history = watched(linear(), key=KEY)
    _, bare = make(ema_decay=0.9)(linear(), key=KEY)
    for a, b in ((history.state, bare.state), (history.loss, bare.loss)):
        same = jax.tree.map(
            lambda x, y: (
                np.array_equal(*(jax.random.key_data(z) for z in (x, y)))
                if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                else np.array_equal(x, y)
            ),
            a,
            b,
        )
        assert all(jax.tree.leaves(same))
    assert set(history.best) == {"validation", "ema", "rollout['nrmse']"}


def ensemble():
    keys = jax.random.split(KEY, 2)
    models = jax.tree.map(lambda x: jnp.stack([x, x]), linear())
    make([scripted(SCRIPT)], monitors=["score"])(models, key=keys, ensemble=True)


BAD = {
    "name": (lambda: Monitor(""), "`name` to name what callbacks return"),
    "mode": (lambda: Monitor("x", mode="least"), "'min' or 'max'"),
    "delta": (
        lambda: Monitor("x", min_delta=-1),
        "`min_delta` to be a finite number >= 0",
    ),
    "patience": (lambda: EarlyStopping("x", patience=0), "`patience`"),
    "threshold": (lambda: EarlyStopping("x", stopping_threshold=NAN), "`stopping_thr"),
    "callback": (
        lambda: make([scripted(SCRIPT)], early_stopping="loss"),
        r"monitor 'loss' with the callbacks \['score'\]",
    ),
    "ensemble": (ensemble, "got an ensemble"),
    "label": (lambda: Monitor("x", label=""), "`label` to be a non-empty string"),
    "same key": (
        lambda: make([scripted(SCRIPT)], monitors=["score", Monitor("score", "max")]),
        r"different keys in history\.best.*mode='max'.*`label=`",
    ),
    "same key, sums": (
        lambda: make(
            [scripted(SCRIPT, "a"), scripted(SCRIPT, "b")],
            monitors=[{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}],
        ),
        "different keys",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run()
