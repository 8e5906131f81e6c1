"""Batches, losses, steps, and the trainer on learned solvers."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

pytestmark = pytest.mark.slow

S = tx.solver
KEY = jax.random.key(8)


def _waves(num=12):
    """Sines observed at every third time, with noise."""
    rng = np.random.default_rng(0)
    t = np.arange(9.0)[None, :, None]
    x = np.sin(t * rng.uniform(0.3, 0.6, (num, 1, 2)) + rng.uniform(0, 6, (num, 1, 2)))
    mask = np.zeros(x.shape, bool)
    mask[:, ::3] = True
    y = np.where(mask, x + 0.05 * rng.normal(size=x.shape), np.nan)
    return tx.Batch1D(y, mask, x)


def _solver(adjoint=tx.RecursiveCheckpointAdjoint()):
    keys = jax.random.split(KEY)
    return S.FourDVarNet1D(
        S.BilinAEPrior1D(2, 2, key=keys[0]),
        S.ConvLSTMGradMod1D(2, 2, key=keys[1]),
        num_steps=3,
        solver_adjoint=adjoint,
    )


# Batches -----------------------------------------------------------------------------

Y = np.arange(24.0).reshape(2, 4, 3)
NAN = np.where(Y == 17, np.nan, Y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tx.Batch1D(Y, np.ones((2, 4))),
            r"mask of the input's shape \[2, 4, 3\], got \[2, 4\]",
        ),
        (lambda: tx.Batch1D(Y, None), "mask of the input's shape"),
        (lambda: tx.Batch1D(Y, 0.5 * np.ones_like(Y)), "mask of 0 and 1, got 0.5"),
        (
            lambda: tx.Batch1D(jnp.asarray(NAN), np.ones_like(Y)),
            r"Expected finite observations, got nan at index \(1, 1, 2\)",
        ),
        (
            lambda: tx.Batch1D(np.where(Y == 2, np.inf, NAN), np.ones_like(Y, bool)),
            r"got inf at index \(0, 0, 2\) where the mask holds \(2 such entries\)",
        ),
        (lambda: tx.Batch1D(Y.astype(int), Y == Y), "floating array"),
        (lambda: tx.Batch1D(Y.tolist(), Y == Y), "floating array .*, got list"),
        (lambda: tx.Batch1D(Y[0], Y[0]), r"axes \(B, T, N\), got the shape \[4, 3\]"),
        (lambda: tx.Batch2D(Y, Y), r"axes \(B, T, H, W\), got the shape \[2, 4, 3\]"),
        (lambda: tx.Batch1D(Y, Y == Y, Y[:1]), "`target` to hold 2 windows"),
        (lambda: tx.Batch1D(Y, Y == Y, initial=Y[:1]), "`initial` to hold 2 windows"),
    ],
)
def test_bad_batches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nan_under_the_mask_is_welcome_in_every_array():
    for array in (np.asarray, jnp.asarray):
        batch = tx.Batch1D(array(NAN), array(~np.isnan(NAN)), target=array(Y))
        np.testing.assert_array_equal(batch.observed(), np.where(NAN == Y, Y, 0.0))
        assert batch.batch_size == 2
    inside = jax.jit(lambda: tx.Batch1D(NAN, ~np.isnan(NAN)).observed())()
    np.testing.assert_array_equal(inside, batch.observed())
    known = jnp.asarray(NAN)
    with pytest.raises(ValueError, match="Expected finite observations"):
        jax.jit(lambda: tx.Batch1D(known, Y == Y).observed())()


def test_initial_state_stands_for_the_gaps():
    batch = tx.Batch1D(NAN, ~np.isnan(NAN), initial=Y[:, :, :1])
    np.testing.assert_array_equal(batch.start(), Y[:, :, :1])
    # State and observations of different shapes, with an operator between them.
    cost = S.VariationalCost(lambda x: x, lambda x: jnp.broadcast_to(x, (4, 3)))
    out = S.solve_4dvarnet_1d(batch, cost, S.GradientDescent(0.1), 50)
    means = np.nanmean(NAN, axis=2, keepdims=True)
    np.testing.assert_allclose(out, means, rtol=1e-6)


# Losses ------------------------------------------------------------------------------


def _mean(values, weights):
    return np.sum(values * weights) / np.sum(weights)


def test_loss_is_the_sum_written_by_hand():
    rng = np.random.default_rng(1)
    p, t = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    mask, w = rng.uniform(size=p.shape) < 0.7, rng.uniform(0.5, 2, size=(5, 1))
    w_full = np.broadcast_to(w, p.shape) * mask
    e = p - t
    pair = np.where(
        mask[:, 1:] & mask[:, :-1], (w_full[:, 1:] + w_full[:, :-1]) / 2, 0.0
    )
    filled = np.where(mask, t, p)
    expected = [
        _mean(e**2, w_full),
        _mean((e[:, 1:] - e[:, :-1]) ** 2, pair),
        np.mean((p - 0.5 * p**2) ** 2),
        np.mean((filled - 0.5 * filled**2) ** 2),
    ]
    loss = S.reconstruction_loss(
        jnp.asarray(p),
        jnp.where(mask, t, jnp.nan),
        mask=mask,
        weights=w,
        gradient_weight=0.3,
        prior=lambda x: 0.5 * x**2,
        prior_weight=0.2,
        target_prior_weight=0.1,
    )
    np.testing.assert_allclose(loss, np.dot([1, 0.3, 0.2, 0.1], expected), rtol=1e-12)
    plain = S.reconstruction_loss(jnp.asarray(p), jnp.asarray(t))
    np.testing.assert_allclose(plain, np.mean(e**2), rtol=1e-13)


def test_differences_are_taken_in_time_in_1d_and_in_space_in_2d():
    def slope(shape, axis, **options):
        ramp = np.moveaxis(np.broadcast_to(np.arange(4.0), shape), -1, axis)
        loss = functools.partial(S.reconstruction_loss, gradient_weight=1.0, **options)
        return float(jax.jit(loss)(ramp, np.zeros_like(ramp)) - 3.5)

    assert [slope((2, 3, 4), axis) for axis in (1, 2)] == [1.0, 0.0]
    assert slope((2, 3, 4), 2, gradient_axes=(2,)) == 1.0
    assert [slope((2, 3, 5, 4), axis) for axis in (1, 2, 3)] == [0.0, 1.0, 1.0]


def test_gradients_of_the_loss_do_not_see_what_does_not_count():
    t = jnp.where(Y == 17, jnp.nan, Y)
    value = lambda p: S.reconstruction_loss(  # noqa: E731
        p, t, mask=~jnp.isnan(t), gradient_weight=1.0
    )
    slope = jax.grad(value)(jnp.asarray(Y) + 1)
    assert np.isfinite(slope).all() and float(slope[1, 1, 2]) == 0.0
    nothing = jax.value_and_grad(
        lambda p: S.reconstruction_loss(p, t, mask=jnp.zeros((), bool))
    )(jnp.asarray(Y))
    assert float(nothing[0]) == 0 and not nothing[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "Expected a target to compare"),
        ({"target": Y[:, 1:]}, r"prediction's shape \[2, 4, 3\], got \[2, 3, 3\]"),
        ({"mask": Y[:, :2] > 0}, r"`mask` to broadcast to .* got \[2, 2, 3\]"),
        ({"weights": Y[0, 0, :2]}, "`weights` to broadcast to"),
        ({"gradient_weight": -1.0}, "`gradient_weight` to be a finite number >= 0"),
        ({"prior_weight": float("inf")}, "`prior_weight` to be a finite number >= 0"),
        ({"prior_weight": 1.0}, "Expected a `prior` for prior_weight"),
        (
            {"gradient_weight": 1.0, "gradient_axes": (0,)},
            "`gradient_axes` between 1 and 2",
        ),
    ],
)
def test_bad_losses_are_refused(options, message):
    options = {"target": jnp.asarray(Y)} | options
    with pytest.raises(ValueError, match=message):
        S.reconstruction_loss(jnp.asarray(Y), options.pop("target"), **options)


# Steps -------------------------------------------------------------------------------


def test_step_follows_the_gradient_and_evaluation_changes_nothing():
    model, batch, sgd = _solver(), _waves(4), optax.sgd(0.1)
    opt_state = sgd.init(eqx.filter(model, eqx.is_inexact_array))
    before = eqx.filter_jit(S.eval_step)(model, batch)
    new, _, loss = eqx.filter_jit(S.train_step)(model, batch, sgd, opt_state)
    np.testing.assert_allclose(before, loss, rtol=1e-13)
    expected, slope = eqx.filter_jit(eqx.filter_value_and_grad(S.train_loss_fn))(
        model, batch
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    moved = jax.tree.map(
        lambda a, g: a - 0.1 * g, eqx.filter(model, eqx.is_array), slope
    )
    new = eqx.filter(new, eqx.is_array)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_loss_function_of_a_step_can_be_another():
    model, batch = _solver(), _waves(4)
    loss_fn = functools.partial(S.train_loss_fn, gradient_weight=0.5, prior_weight=0.5)
    configuration = tx.configuration.Reconstruction(
        gradient_weight=0.5, prior_weight=0.5
    )
    loss, aux = eqx.filter_jit(configuration)(model, batch)
    np.testing.assert_allclose(
        eqx.filter_jit(functools.partial(S.eval_step, loss_fn=loss_fn))(model, batch),
        loss,
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        loss, aux.parts @ jnp.array([1, 0.5, 0.5, 0.0]), rtol=1e-12
    )
    assert aux.parts[3] == aux.parts[3] and (aux.parts[:3] > 0).all()


@pytest.mark.parametrize("call", [S.train_loss_fn, S.eval_step, None])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (tx.Batch1D(Y, Y == Y), "Expected a batch with a target"),
        (Y, "Expected a Batch1D or Batch2D, got ndarray"),
        (tx.Window(Y), "Expected a Batch1D or Batch2D, got Window"),
    ],
    ids=["no target", "array", "window"],
)
def test_steps_ask_for_a_target(call, batch, message):
    call = tx.configuration.Reconstruction() if call is None else call
    with pytest.raises(ValueError, match=message):
        call(lambda batch: batch.observed(), batch)


def test_missing_targets_are_skipped_on_request():
    batch = tx.Batch1D(Y, Y == Y, target=np.where(Y == 17, np.nan, Y + 1))
    fill = lambda batch: batch.observed()  # noqa: E731
    skipping = tx.configuration.Reconstruction(skip_missing=True)
    assert float(skipping(fill, batch)[0]) == 1.0
    assert np.isnan(tx.configuration.Reconstruction()(fill, batch)[0])


def test_terms_of_a_prior_need_a_prior():
    configuration = tx.configuration.Reconstruction(target_prior_weight=1.0)
    batch = tx.Batch1D(Y, Y == Y, target=Y)
    with pytest.raises(ValueError, match="field or property `prior`"):
        configuration(lambda batch: batch.observed(), batch)
    with pytest.raises(ValueError, match="`gradient_weight` to be a finite"):
        tx.configuration.Reconstruction(gradient_weight=-1.0)


# The trainer -------------------------------------------------------------------------


def _train(data, **options):
    validation = tx.callback.Validation(
        tx.configuration.Reconstruction(), _waves(), every=20, batch_size=5
    )
    trainer = tx.trainer.Trainer(
        data,
        tx.configuration.Reconstruction(),
        optimizer=optax.adam(0.02),
        num_training_steps=40,
        batch_size=4,
        callbacks=[validation],
        progress=False,
        **options,
    )
    model, history = trainer(_solver(), key=KEY)
    return model, np.asarray(history.loss), history.records["validation"]


def test_trainer_trains_a_solver():
    data = _waves()
    model, loss, records = _train(data, program="scan")
    start = float(eqx.filter_jit(S.eval_step)(_solver(), data))
    end = float(eqx.filter_jit(S.eval_step)(model, data))
    values = np.asarray(records.values).reshape(-1)
    np.testing.assert_allclose(values[[0, -1]], [start, end], rtol=1e-6)
    assert end < 0.7 * start and loss.shape == (40,)
    # From the host, and part by part, the same batches give the same updates.
    for options in ({"residency": "host"}, {"accumulate": 2}):
        again = _train(data, program="loop", **options)[1]
        np.testing.assert_allclose(again, loss, rtol=1e-6)


def test_samples_are_rows_of_every_leaf():
    data = tx.data.Samples(_waves())
    host = tx.data.Samples(_waves(), residency="host")
    rows = np.array([3, 11, 0])
    for samples in (data, host):
        batch = samples[rows]
        assert isinstance(batch, tx.Batch1D) and len(samples) == 12
        np.testing.assert_array_equal(batch.target, _waves().target[rows])
        np.testing.assert_array_equal(batch.mask, _waves().mask[rows])
        assert samples.item_bytes == 9 * 2 * 17
    assert isinstance(host[2:4].input, np.ndarray)
    inside = jax.jit(data.gather)(data.arrays, jnp.asarray(rows))
    np.testing.assert_array_equal(inside.target, batch.target)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tx.data.Samples({}), "one leading sample axis"),
        (lambda: tx.data.Samples([np.ones((2, 3)), np.ones((3, 3))]), "one leading"),
        (lambda: tx.data.Samples(np.ones((0, 3))), "one leading sample axis"),
        (lambda: tx.data.Samples(np.ones(())), "one leading sample axis"),
        (lambda: tx.data.Samples(Y, residency="disk"), "`residency` to be"),
        (lambda: _train(_waves(), window_stride=2), "window_stride=1 for samples"),
        (lambda: _train(_waves(3)), "batch_size <= num_items"),
    ],
)
def test_bad_samples_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_nan_in_training_names_the_update():
    data = _waves()
    target = data.target.copy()
    target[5] = np.nan
    with pytest.raises(FloatingPointError, match="its batch holds NaN"):
        _train(tx.Batch1D(data.input, data.mask, target), program="scan")


def test_any_callable_on_batches_is_a_solver():
    """The configuration asks for nothing but a call, and for `prior` where it uses it."""
    fill = lambda batch: batch.observed()  # noqa: E731
    fill.prior = lambda x: 0 * x
    batch = tx.Batch1D(Y, Y == Y, target=Y)
    loss, _ = tx.configuration.Reconstruction(prior_weight=2.0)(fill, batch)
    np.testing.assert_allclose(loss, 2 * np.mean(Y**2))
