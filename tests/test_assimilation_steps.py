"""Analysis steps and cycles against the Kalman filter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import trainax_pk as tx
from trainax_pk.solver import as_analysis_step, cycle

SIZE, SEEN = 3, 2
RNG = np.random.default_rng(4)
H = RNG.normal(size=(SEEN, SIZE))
MODEL = 0.6 * RNG.normal(size=(SIZE, SIZE))


def _spd(n, seed):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T + 0.5 * np.eye(n)


B, R = _spd(SIZE, 1), _spd(SEEN, 2)
FORECAST, OBS = RNG.normal(size=SIZE), RNG.normal(size=SEEN)


class Linear(eqx.Module):
    """Observation operator of the contract; `linearize` gives a matrix."""

    matrix: jax.Array

    def __call__(self, u):
        return self.matrix @ u

    def linearize(self, u):
        return self.matrix


def _kalman(forecast, obs, h, r, b):
    gain = b @ h.T @ np.linalg.inv(h @ b @ h.T + r)
    return forecast + gain @ (obs - h @ forecast)


def _descent(**options):
    """Gradient descent to convergence, as a solver whose prior says nothing."""
    return tx.solver.FourDVarNet1D(
        tx.solver.IdentityPrior(), tx.solver.GradientDescent(0.05), 1500, **options
    )


STEPS = {
    "linear": as_analysis_step(lx.QR(), background_cov=B, windowed=False),
    "iterative": as_analysis_step(
        optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10),
        background_cov=B,
        windowed=False,
    ),
    "learned": as_analysis_step(_descent(), background_cov=B),
}
_call = eqx.filter_jit(
    lambda step, forecast, obs, obs_op, r: step(
        forecast, obs, obs_op=obs_op, obs_err_cov=r
    )
)


def _analysis(kind, forecast=FORECAST, obs=OBS, h=H, r=R):
    step = STEPS[kind]
    if step.windowed:
        forecast, obs = forecast[None], obs[None]
    found = _call(step, forecast, obs, Linear(jnp.asarray(h)), r)
    return np.asarray(found[0] if step.windowed else found)


@pytest.mark.parametrize("kind", STEPS)
def test_linear_case_is_the_kalman_analysis_in_every_argument(kind):
    """Each argument in turn is another; the analysis follows the formula each time."""
    base = _analysis(kind)
    np.testing.assert_allclose(base, _kalman(FORECAST, OBS, H, R, B), atol=1e-6)
    changes = {
        "forecast": (FORECAST + 1.0, OBS, H, R),
        "obs": (FORECAST, OBS - 2.0, H, R),
        "h": (FORECAST, OBS, 0.5 * H[::-1], R),
        "r": (FORECAST, OBS, H, 3.0 * R),
    }
    for name, arguments in changes.items():
        changed = _analysis(kind, *arguments)
        np.testing.assert_allclose(changed, _kalman(*arguments, B), atol=1e-6)
        assert np.abs(changed - base).max() > 0.05, name


@pytest.mark.parametrize("kind", STEPS)
def test_nan_is_not_observed(kind):
    obs = np.array([OBS[0], np.nan])
    expected = _kalman(FORECAST, obs[:1], H[:1], R[:1, :1], B)
    np.testing.assert_allclose(_analysis(kind, obs=obs), expected, atol=1e-6)
    nothing = _analysis(kind, obs=np.full(SEEN, np.nan))
    np.testing.assert_allclose(nothing, FORECAST, atol=1e-6)


class Square(eqx.Module):
    """Nonlinear; its tangent as a function, at twice the truth, to be told apart."""

    factor: float

    def __call__(self, u):
        return u**2

    def linearize(self, u):
        return lambda du: self.factor * u * du


def test_linearize_of_the_operator_is_what_a_linear_solver_uses():
    step = as_analysis_step(lx.QR(), background_cov=0.5, windowed=False)
    forecast, obs = jnp.array([1.5]), jnp.array([3.0])
    for factor in (2.0, 4.0):
        tangent = factor * 1.5
        expected = 1.5 + 0.5 * tangent / (0.5 * tangent**2 + 0.8) * (3.0 - 1.5**2)
        found = step(forecast, obs, obs_op=Square(factor), obs_err_cov=0.8)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    plain = step(forecast, obs, obs_op=lambda u: u**2, obs_err_cov=0.8)
    known = step(forecast, obs, obs_op=Square(2.0), obs_err_cov=0.8)
    np.testing.assert_allclose(plain, known, rtol=1e-12)


def test_nonlinear_minimiser_is_stationary_and_reported():
    step = as_analysis_step(
        optx.LevenbergMarquardt(1e-7, 1e-7), background_cov=0.5, windowed=False
    )
    obs_op = lambda u: u**2  # noqa: E731
    found = step.analyse(
        jnp.array([1.0]), jnp.array([4.0]), obs_op=obs_op, obs_err_cov=0.8
    )
    x = float(found.state[0])
    assert bool(found.converged)
    np.testing.assert_allclose((x - 1) / 0.5 + 2 * x * (x**2 - 4) / 0.8, 0, atol=1e-6)
    cost = 0.5 * ((x - 1) ** 2 / 0.5 + (x**2 - 4) ** 2 / 0.8)
    np.testing.assert_allclose(found.cost, cost, rtol=1e-9)
    short = as_analysis_step(
        optx.LevenbergMarquardt(1e-7, 1e-7), background_cov=0.5, windowed=False,
        max_steps=1,
    )  # fmt: skip
    args = (jnp.array([1.0]), jnp.array([4.0]))
    assert not short.analyse(*args, obs_op=obs_op, obs_err_cov=0.8).converged


def test_learned_solver_in_its_own_units():
    """With the variance of its training it is the solver itself; R scales from there."""
    keys = jax.random.split(jax.random.key(0))
    modulator = tx.solver.ConvLSTMGradMod1D(SIZE, 4, key=keys[0])
    offset, scale, variance = np.array([0.5, -1.0, 2.0]), 3.0, 2.0
    prior = tx.solver.DynamicalPrior(
        lambda u: 0.9 * u, offset=jnp.asarray(offset), scale=scale
    )
    solver = tx.solver.FourDVarNet1D(prior, modulator, 3, observation_weight=0.7)
    forecast, obs = RNG.normal(size=(6, SIZE)), RNG.normal(size=(6, SIZE))
    obs[::2] = np.nan
    # In standardised units the misfit is 1/scale of the physical one.
    step = as_analysis_step(
        solver, offset=offset, scale=scale, unit_variance=variance / scale**2
    )
    found = step.analyse(
        forecast, obs, obs_op=lambda u: u, obs_err_cov=variance
    )  # fmt: skip

    def alone(weight):
        same = tx.solver.FourDVarNet1D(
            prior, modulator, 3, observation_weight=0.7 * weight
        )
        batch = tx.Batch1D(
            (obs - offset)[None] / scale, ~np.isnan(obs)[None],
            initial=jnp.asarray((forecast - offset)[None] / scale),
        )  # fmt: skip
        return offset + scale * np.asarray(same(batch)[0])

    np.testing.assert_allclose(found.state, alone(1.0), atol=1e-9)
    weaker = step(forecast, obs, obs_op=lambda u: u, obs_err_cov=4 * variance)
    np.testing.assert_allclose(weaker, alone(0.25), atol=1e-9)
    assert np.abs(weaker - found.state).max() > 1e-3
    assert int(found.num_steps) == 3 and bool(found.converged)


def test_learned_solver_2d_takes_forecast_operator_and_covariance():
    solver = tx.solver.FourDVarNet2D(
        tx.solver.IdentityPrior(), tx.solver.GradientDescent(0.1), 200
    )
    step = as_analysis_step(solver, background_cov=0.5)
    forecast, obs = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(2, 4))
    found = step(forecast, obs, obs_op=lambda u: u[1], obs_err_cov=1.5)
    expected = forecast.copy()
    expected[:, 1] += 0.5 / (0.5 + 1.5) * (obs - forecast[:, 1])
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_a_solvers_own_background_stands_for_the_covariance():
    """w_b of states divided by s is B = s² / w_b."""
    solver, scale = _descent(background_weight=0.4), 1.5
    step = as_analysis_step(solver, scale=scale)
    found = step(
        FORECAST[None], OBS[None], obs_op=Linear(jnp.asarray(H)), obs_err_cov=R
    )
    want = _kalman(FORECAST, OBS, H, R, scale**2 / 0.4 * np.eye(SIZE))
    np.testing.assert_allclose(found[0], want, atol=1e-6)


class Forward(eqx.Module):
    """The contract of a forward model."""

    matrix: jax.Array
    dt: float = 2.0

    def step(self, state, dt):
        return dt / 2.0 * self.matrix @ state


def test_cycle_is_the_filter_by_hand():
    obs = RNG.normal(size=(6, SEEN))
    step, operator = STEPS["linear"], Linear(jnp.asarray(H))
    run = cycle(
        step, Forward(jnp.asarray(MODEL)), FORECAST, obs, obs_op=operator,
        obs_err_cov=R, windowed=False, num_steps=2,
    )  # fmt: skip
    u = FORECAST
    for t in range(6):
        u = MODEL @ MODEL @ u
        np.testing.assert_allclose(run.forecast[t], u, atol=1e-10)
        u = _kalman(u, obs[t], H, R, B)
        np.testing.assert_allclose(run.analysis[t], u, atol=1e-10)


def test_windowed_cycle_goes_on_from_the_last_state():
    model = lambda u: jnp.asarray(MODEL) @ u  # noqa: E731
    obs = RNG.normal(size=(3, 4, SEEN))
    step = as_analysis_step(lx.QR(), background_cov=1.3)
    run = cycle(
        step, model, FORECAST, obs, obs_op=Linear(jnp.asarray(H)), obs_err_cov=R
    )
    u = FORECAST
    for c in range(3):
        ahead = []
        for _ in range(4):
            u = MODEL @ u
            ahead.append(u)
        np.testing.assert_allclose(run.forecast[c], np.array(ahead), atol=1e-10)
        b = 1.3 * np.eye(SIZE)
        found = [_kalman(x, y, H, R, b) for x, y in zip(ahead, obs[c], strict=True)]
        np.testing.assert_allclose(run.analysis[c], np.array(found), atol=1e-10)
        u = found[-1]


def test_program_of_a_cycle_does_not_grow():
    def lines(num_cycles):
        fn = lambda obs: cycle(  # noqa: E731
            STEPS["linear"], lambda u: 0.5 * u, jnp.asarray(FORECAST), obs,
            obs_op=lambda u: u[:SEEN], obs_err_cov=1.0, windowed=False,
        ).analysis  # fmt: skip
        obs = jax.ShapeDtypeStruct((num_cycles, SEEN), jnp.float64)
        return len(jax.jit(fn).lower(obs).as_text().splitlines())

    assert lines(3) == lines(40)


def _identity(u):
    return u


CALL = {"obs_op": _identity, "obs_err_cov": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_analysis_step("4dvar"), "`solver` to be a FourDVarNet"),
        (lambda: as_analysis_step(lx.QR()), "`background_cov`, got None"),
        (lambda: as_analysis_step(_descent(), windowed=False), "windowed=True"),
        (lambda: as_analysis_step(_descent(), unit_variance=0.0), "`unit_variance`"),
        (
            lambda: as_analysis_step(
                _descent(background_weight=1.0), background_cov=1.0
            ),
            "got both, which would count the forecast twice",
        ),
        (lambda: as_analysis_step(lx.QR(), background_cov=1.0, windowed=1), "windowed"),
        (
            lambda: as_analysis_step(lx.QR(), background_cov=1.0, max_steps=0),
            "max_steps",
        ),
        (lambda: STEPS["learned"](np.ones((2, 3)), np.ones((3, 3)), **CALL), "as many"),
        (
            lambda: STEPS["linear"](FORECAST, np.full(3, np.inf), **CALL),
            "finite observations or NaN",
        ),
        (lambda: STEPS["linear"](FORECAST, OBS, **CALL), "`obs_op` to map"),
        (
            lambda: STEPS["linear"](
                FORECAST, np.ones(3), obs_op=_identity, obs_err_cov=0.0
            ),
            "`obs_err_cov`",
        ),
        (
            lambda: as_analysis_step(lx.QR(), background_cov=np.eye(4), windowed=False)(
                FORECAST, np.ones(3), **CALL
            ),
            "`background_cov` to be a variance",
        ),
        (
            lambda: cycle(STEPS["linear"], _identity, FORECAST, np.ones(3), **CALL),
            "num_cycles",
        ),
        (
            lambda: cycle(
                STEPS["linear"], lambda u: u[:1], FORECAST, np.ones((2, 1, 3)), **CALL
            ),
            "keep a state",
        ),
        (
            lambda: cycle(
                STEPS["linear"], _identity, FORECAST, np.ones((2, 1, 3)), **CALL,
                num_steps=0,
            ),
            "num_steps",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
