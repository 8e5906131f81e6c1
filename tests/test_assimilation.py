"""Classical assimilation against closed forms, in double precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainax_pk.sample_data import make_lorenz_63_stepper
from trainax_pk.solver import (
    BlockTridiagonal,
    linear_interpolation,
    optimal_interpolation,
    strong_4dvar,
    weak_4dvar,
)

NUM_TIMES, SIZE, SEEN = 5, 3, 2
RNG = np.random.default_rng(7)
MODEL = 0.5 * RNG.normal(size=(SIZE, SIZE))
OBSERVE = RNG.normal(size=(SEEN, SIZE))
MASK = RNG.random((NUM_TIMES, SEEN)) < 0.7
OBSERVED = RNG.normal(size=(NUM_TIMES, SEEN))
BACKGROUND = RNG.normal(size=SIZE)


def _spd(n, seed):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T + 0.5 * np.eye(n)


R, Q, B = _spd(SEEN, 1), 0.3 * _spd(SIZE, 2), _spd(SIZE, 3)
LINEAR = {
    "obs_err_cov": R,
    "background": BACKGROUND,
    "background_cov": B,
    "obs_op": lambda u: jnp.asarray(OBSERVE) @ u,
}


def _step(u):
    return jnp.asarray(MODEL) @ u


def _smoother(mean, cov, model_err):
    """Rauch-Tung-Striebel smoother; observations of a time are what the mask holds."""
    means, covs, ahead = [], [], []
    for t in range(NUM_TIMES):
        if t:
            mean, cov = MODEL @ mean, MODEL @ cov @ MODEL.T + model_err
        ahead.append((mean, cov))
        h, y = OBSERVE[MASK[t]], OBSERVED[t, MASK[t]]
        r = R[np.ix_(MASK[t], MASK[t])]
        gain = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + r)
        mean, cov = mean + gain @ (y - h @ mean), cov - gain @ h @ cov
        means.append(mean)
        covs.append(cov)
    smooth = [means[-1]]
    for t in range(NUM_TIMES - 2, -1, -1):
        gain = covs[t] @ MODEL.T @ np.linalg.inv(ahead[t + 1][1])
        smooth.append(means[t] + gain @ (smooth[-1] - ahead[t + 1][0]))
    return np.array(smooth[::-1])


def _flat_line(observed, mask, fill):
    """Each column by np.interp."""
    times = np.arange(len(observed))
    return np.stack(
        [
            np.interp(times, times[m], y[m]) if m.any() else np.full(len(y), fill)
            for y, m in zip(observed.T, mask.T, strict=True)
        ],
        axis=1,
    )


_line = jax.jit(lambda y, m: linear_interpolation(y, m, fill=0.25))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_linear_interpolation_is_numpys(seed, share):
    rng = np.random.default_rng(seed)
    observed, mask = rng.normal(size=(7, 4)), rng.random((7, 4)) < share
    hidden = np.where(mask, observed, np.nan)
    np.testing.assert_allclose(
        _line(hidden, mask), _flat_line(observed, mask, 0.25), atol=1e-12
    )


def test_linear_interpolation_fills_by_entry_and_keeps_space():
    observed = jnp.arange(24.0).reshape(4, 3, 2)
    mask = jnp.zeros((4, 3, 2), bool).at[1, 0, 0].set(True)
    fill = jnp.arange(6.0).reshape(3, 2) + 0.5
    line = linear_interpolation(observed, mask, fill=fill)
    expected = np.broadcast_to(np.asarray(fill), (4, 3, 2)).copy()
    expected[:, 0, 0] = 6.0
    np.testing.assert_array_equal(line, expected)


def _window(seed=11, shape=(4, 2)):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    return np.where(mask, rng.normal(size=shape), np.nan), mask


VARIANCES = np.array([0.7, 1.9])


def _dense_oi(observed, mask, mean, covariance):
    seen = mask.reshape(-1)
    b = covariance[:, seen]
    r = np.diag(np.broadcast_to(VARIANCES, mask.shape).reshape(-1)[seen])
    departure = (observed - mean).reshape(-1)[seen]
    system = b[seen] + r
    weights = np.linalg.solve(system, departure)
    return mean + (b @ weights).reshape(mask.shape), 0.5 * departure @ weights


@pytest.mark.parametrize("kind", ["matrix", "operator"])
def test_optimal_interpolation_is_the_dense_formula(kind):
    covariance = _spd(8, 5)
    mean = np.array([0.4, -1.1])
    prior = covariance
    if kind == "operator":
        matrix = jnp.asarray(covariance)
        prior = lx.FunctionLinearOperator(
            lambda w: (matrix @ w.reshape(-1)).reshape(w.shape),
            jax.eval_shape(lambda: jnp.zeros((4, 2))),
        )
    solve = jax.jit(
        jax.vmap(
            lambda y, m: optimal_interpolation(
                y, m, mean=mean, covariance=prior, obs_err_var=VARIANCES
            )
        )
    )
    windows = [_window(seed) for seed in (11, 12)]
    observed, mask = (np.stack(x) for x in zip(*windows, strict=True))
    found = solve(observed, mask)
    for i, window in enumerate(windows):
        state, cost = _dense_oi(*window, mean, covariance)
        np.testing.assert_allclose(found.state[i], state, atol=1e-10)
        np.testing.assert_allclose(found.cost[i], cost, rtol=1e-10)
    assert found.converged.all()
    assert (found.num_steps > 0).all() == (kind == "operator")


def test_block_tridiagonal_solves_what_numpy_does():
    n, num_times = 2, 7
    rng = np.random.default_rng(3)
    lower = np.zeros((num_times * n, num_times * n))
    for t in range(num_times):
        lower[t * n : (t + 1) * n, max(t - 1, 0) * n : (t + 1) * n] = rng.normal(
            size=(n, n * (2 if t else 1))
        )
    matrix = lower @ lower.T + 0.1 * np.eye(num_times * n)
    b = rng.normal(size=(num_times, 2, 1))
    operator = lx.FunctionLinearOperator(
        lambda x: (jnp.asarray(matrix) @ x.reshape(-1)).reshape(x.shape),
        jax.eval_shape(lambda: jnp.asarray(b)),
        lx.positive_semidefinite_tag,
    )
    solution = lx.linear_solve(operator, jnp.asarray(b), BlockTridiagonal())
    expected = np.linalg.solve(matrix, b.reshape(-1)).reshape(b.shape)
    np.testing.assert_allclose(solution.value, expected, atol=1e-9)


def test_strong_4dvar_solves_the_normal_equations():
    found = strong_4dvar(_step, OBSERVED, MASK, initial=np.ones(SIZE), **LINEAR)
    hessian, right = np.linalg.inv(B), np.linalg.inv(B) @ BACKGROUND
    power = np.eye(SIZE)
    for t in range(NUM_TIMES):
        h = (OBSERVE @ power)[MASK[t]]
        weight = np.linalg.inv(R[np.ix_(MASK[t], MASK[t])])
        hessian = hessian + h.T @ weight @ h
        right = right + h.T @ weight @ OBSERVED[t, MASK[t]]
        power = MODEL @ power
    first = np.linalg.solve(hessian, right)
    expected = [first]
    for _ in range(NUM_TIMES - 1):
        expected.append(MODEL @ expected[-1])
    assert bool(found.converged)
    np.testing.assert_allclose(found.state, np.array(expected), atol=1e-7)


_weak = eqx.filter_jit(
    lambda solver: weak_4dvar(
        _step,
        OBSERVED,
        MASK,
        initial=np.ones((NUM_TIMES, SIZE)),
        model_err_cov=Q,
        solver=solver,
        max_steps=500,
        **LINEAR,
    )
)


@pytest.mark.parametrize(
    "solver", [None, optx.BFGS(rtol=1e-9, atol=1e-9)], ids=["default", "BFGS"]
)
def test_weak_4dvar_is_the_smoother(solver):
    found = _weak(solver)
    assert bool(found.converged)
    np.testing.assert_allclose(found.state, _smoother(BACKGROUND, B, Q), atol=1e-6)


def test_weak_4dvar_approaches_the_strong_one():
    options = {**LINEAR, "obs_err_cov": 0.4}
    strong = strong_4dvar(_step, OBSERVED, MASK, initial=np.ones(SIZE), **options)
    weak = weak_4dvar(
        _step, OBSERVED, MASK, initial=strong.state + 0.3, model_err_cov=1e-9, **options
    )
    np.testing.assert_allclose(weak.state, strong.state, atol=1e-6)
    np.testing.assert_allclose(weak.cost, strong.cost, rtol=1e-6)


@pytest.mark.parametrize("closed_over", [True, False])
def test_the_analysis_is_differentiable_in_the_model(closed_over):
    # The model's derivatives are matrices made once; those of second order, which the
    # implicit derivative needs, have to be there too.
    weights = jnp.asarray(MODEL)

    def step(w, u):
        return jnp.tanh(w @ u) + 0.1 * u**2

    def total(w):
        model = (
            (lambda u: step(w, u)) if closed_over else jax.tree_util.Partial(step, w)
        )
        found = weak_4dvar(
            model, OBSERVED, MASK, initial=np.zeros((NUM_TIMES, SIZE)),
            model_err_cov=Q, max_steps=200, **LINEAR,
        )  # fmt: skip
        return jnp.sum(jnp.sin(found.state))

    gradient = jax.jit(jax.grad(total))(weights)
    value = jax.jit(total)
    for place in [(0, 0), (1, 2), (2, 1)]:
        nudge = jnp.zeros_like(weights).at[place].set(1e-5)
        slope = (value(weights + nudge) - value(weights - nudge)) / 2e-5
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-4, atol=1e-7)


def test_costs_are_those_of_their_formula():
    variances = np.array([0.6, 1.7])
    state = np.asarray(
        weak_4dvar(
            _step, OBSERVED, MASK, initial=np.ones((NUM_TIMES, SIZE)),
            **{**LINEAR, "obs_err_cov": variances}, model_err_cov=0.2,
        ).state
    )  # fmt: skip
    misfit = np.where(MASK, OBSERVED - state @ OBSERVE.T, 0.0)
    jumps = state[1:] - state[:-1] @ MODEL.T
    back = state[0] - BACKGROUND
    expected = 0.5 * (
        (misfit**2 / variances).sum()
        + (jumps**2).sum() / 0.2
        + back @ np.linalg.solve(B, back)
    )
    found = weak_4dvar(
        _step, OBSERVED, MASK, initial=state,
        **{**LINEAR, "obs_err_cov": variances}, model_err_cov=0.2,
    )  # fmt: skip
    np.testing.assert_allclose(found.cost, expected, rtol=1e-8)


def _lorenz_windows(num, num_times=40):
    stepper = make_lorenz_63_stepper(0.02)
    start = jnp.asarray(np.random.default_rng(5).normal(size=(num, 3))) + 5.0

    def trajectory(u, length):
        return jax.lax.scan(lambda u, _: (stepper(u), u), u, length=length)[1]

    run = jax.jit(jax.vmap(lambda u: trajectory(u, 200 + num_times)))(start)
    mask = np.zeros((num_times, 3), bool)
    mask[3::5, 0] = True
    return stepper, np.asarray(run[:, 200:]), mask


def test_windows_are_mapped_and_fail_one_by_one():
    """Noiseless observations of x alone determine y and z, where the solve converges."""
    stepper, truth, mask = _lorenz_windows(3)
    initial = truth[:, 0] + np.array([[0.5, -0.5, 1.0]])
    initial[2] = np.nan
    solve = jax.jit(
        jax.vmap(
            lambda y, u: strong_4dvar(stepper, y, mask, initial=u, obs_err_cov=0.1)
        )
    )
    found = solve(np.where(mask, truth, np.nan), initial)
    assert found.converged.tolist() == [True, True, False]
    np.testing.assert_allclose(found.state[:2], truth[:2], atol=1e-5)
    assert (found.num_steps[:2] > 1).all()


def test_steps_that_run_out_are_reported():
    stepper, truth, mask = _lorenz_windows(1)
    found = weak_4dvar(
        stepper, truth[0], mask, initial=0 * truth[0], obs_err_cov=0.1,
        model_err_cov=0.01, max_steps=2,
    )  # fmt: skip
    assert not bool(found.converged)
    assert int(found.num_steps) == 2


Y, M = np.ones((4, 2)), np.ones((4, 2), bool)
STRONG = {"initial": np.ones(2), "obs_err_cov": 1.0}
WEAK = {"initial": np.ones((4, 2)), "obs_err_cov": 1.0, "model_err_cov": 1.0}
OI = {"mean": 0.0, "covariance": np.eye(8), "obs_err_var": 1.0}


def _hold(u):
    return u


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_interpolation(Y, M[:3]), r"`mask` to be bool\[4, 2\]"),
        (lambda: linear_interpolation(Y, 1.0 * M), "float64"),
        (lambda: linear_interpolation(Y[0], M[0]), "one window"),
        (
            lambda: linear_interpolation(np.full((4, 2), np.nan), M),
            "finite observations",
        ),
        (lambda: linear_interpolation(Y, M, fill=np.ones(3)), "`fill`"),
        (lambda: optimal_interpolation(Y, M, **{**OI, "mean": np.ones(3)}), "`mean`"),
        (lambda: optimal_interpolation(Y, M, **{**OI, "obs_err_var": 0.0}), "positive"),
        (
            lambda: optimal_interpolation(Y, M, **{**OI, "covariance": np.eye(7)}),
            "flattened window",
        ),
        (
            lambda: optimal_interpolation(
                Y, M, **{**OI, "covariance": lx.MatrixLinearOperator(jnp.eye(8))}
            ),
            "an operator on",
        ),
        (lambda: strong_4dvar(_hold, Y, M[:2], **STRONG), "`mask`"),
        (lambda: strong_4dvar(None, Y, M, **STRONG), "`stepper` to be callable"),
        (lambda: strong_4dvar(lambda u: u[:1], Y, M, **STRONG), "keep a state"),
        (lambda: strong_4dvar(_hold, Y, M, **STRONG, obs_op=3), "`obs_op`"),
        (
            lambda: strong_4dvar(_hold, Y, M, **STRONG, obs_op=lambda u: u[:1]),
            "observations of shape",
        ),
        (
            lambda: strong_4dvar(_hold, Y, M, **{**STRONG, "obs_err_cov": -1.0}),
            "`obs_err_cov` to be positive",
        ),
        (
            lambda: strong_4dvar(_hold, Y, M, **{**STRONG, "obs_err_cov": np.eye(3)}),
            "`obs_err_cov` to be a variance",
        ),
        (
            lambda: strong_4dvar(
                _hold, Y, M, **{**STRONG, "obs_err_cov": np.array([[1.0, 2], [2, 1]])}
            ),
            "positive definite",
        ),
        (lambda: strong_4dvar(_hold, Y, M, **STRONG, background=Y[0]), "together"),
        (
            lambda: strong_4dvar(
                _hold, Y, M, **STRONG, background=np.ones(3), background_cov=1.0
            ),
            "`background` of shape",
        ),
        (lambda: strong_4dvar(_hold, Y, M, **STRONG, solver="LM"), "`solver`"),
        (lambda: strong_4dvar(_hold, Y, M, **STRONG, max_steps=0), "`max_steps`"),
        (
            lambda: weak_4dvar(_hold, Y, M, **{**WEAK, "initial": np.ones((3, 2))}),
            "4 states",
        ),
        (
            lambda: weak_4dvar(_hold, Y, M, **{**WEAK, "model_err_cov": 0.0}),
            "`model_err_cov`",
        ),
        (
            lambda: BlockTridiagonal().init(
                lx.MatrixLinearOperator(jnp.eye(3), lx.positive_semidefinite_tag), {}
            ),
            "num_times",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
