"""Adjoints of differential equations: gradients, save times, the defect upstream."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix
import pytest

import trainax_pk as tx
from trainax_pk.adjoint import (
    BacksolveAdjoint,
    ImplicitAdjoint,
    probe_checkpointed_gradients,
    solve_ode,
    to_diffrax_adjoint,
)

STEPS = 24
END = 2.4
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
ENDS = np.linspace(0, END, 9)  # Every third step ends there.


def _saves():
    # Made where they are used, in the precision that is set there.
    return {
        "last": diffrax.SaveAt(t1=True),
        "both ends": diffrax.SaveAt(t0=True, t1=True),
        "step ends": diffrax.SaveAt(ts=ENDS),
        "between": diffrax.SaveAt(ts=ENDS[:-1] + 0.03),
        "mixed": diffrax.SaveAt(ts=np.array([0.0, 0.25, 0.25, 0.3, 2.4])),
        "every third": diffrax.SaveAt(steps=3),
        "every fifth and the last": diffrax.SaveAt(steps=5, t1=True, t0=True),
        "a function": diffrax.SaveAt(ts=ENDS, fn=lambda t, y, args: (y**2).sum() + t),
        "two": diffrax.SaveAt(
            subs={"a": diffrax.SubSaveAt(ts=ENDS), "b": diffrax.SubSaveAt(t1=True)}
        ),
    }


NAMES = tuple(_saves())
# The plans that 24 steps allow: each state, 2 x 3 x 4, 4 x 6.
CHECKPOINTS = (None, 9, 10)


def _field(t, y, w):
    return jnp.tanh(w @ y) - 0.1 * y + 0.2 * jnp.sin(t)


def _operands(dtype=None):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(3, 3)), dtype)
    return weights, jnp.asarray([0.7, -0.4, 1.1], dtype)


def _solve(
    weights,
    y0,
    adjoint,
    saveat,
    *,
    solver=None,
    solve_fn=solve_ode,
    steps=STEPS,
    max_steps=STEPS,
    **options,
):
    return solve_fn(
        diffrax.ODETerm(_field), diffrax.Tsit5() if solver is None else solver,
        0.0, END, END / steps, y0, weights,
        saveat=saveat, adjoint=adjoint, max_steps=max_steps, **options,
    )  # fmt: skip


def _gradient(adjoint, saveat, **options):
    def loss(weights, y0):
        ys = _solve(weights, y0, adjoint, saveat, **options).ys
        leaves = jax.tree.leaves(ys)
        return sum(
            jnp.sum(jnp.cos(jnp.arange(x.size)) * x.ravel() ** 2) for x in leaves
        )

    return jax.value_and_grad(loss, (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_checkpoints_gives_the_direct_gradient(name):
    with jax.enable_x64(False):
        operands, saveat = _operands("f4"), _saves()[name]

        def everything(weights, y0):
            adjoints = [tx.RecursiveCheckpointAdjoint(c) for c in CHECKPOINTS]
            adjoints = [tx.DirectAdjoint(), *adjoints]
            return [_gradient(a, saveat)(weights, y0) for a in adjoints]

        exact, *found = jax.tree.map(np.asarray, jax.jit(everything)(*operands))
        assert exact[0].dtype == np.float32
        for (value, gradient), checkpoints in zip(found, CHECKPOINTS, strict=True):
            np.testing.assert_allclose(value, exact[0], rtol=1e-6)
            for a, b in zip(gradient, exact[1], strict=True):
                off = np.linalg.norm(a - b) / np.linalg.norm(b)
                assert off < 1e-5, (checkpoints, off)


@pytest.mark.parametrize("pattern", ["step ends", "between"])
def test_a_number_of_steps_without_factors(pattern):
    steps = 23
    ends = np.linspace(0, END, steps + 1)[::4]
    shift = {"step ends": 0.0, "between": 0.02}[pattern]

    def everything(weights, y0):
        saveat = diffrax.SaveAt(ts=ends + shift)
        specs = (tx.DirectAdjoint(), tx.RecursiveCheckpointAdjoint(10))
        return [_gradient(a, saveat, steps=steps)(weights, y0) for a in specs]

    exact, found = _jit(everything)(*_operands())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_diffrax(name):
    saveat = _saves()[name]

    def both(*operands):
        found = (
            _solve(*operands, tx.DirectAdjoint(), saveat),
            _solve(
                *operands, diffrax.ForwardMode(), saveat, solve_fn=diffrax.diffeqsolve
            ),
        )
        return [((x.ts, x.ys), x.stats["num_steps"]) for x in found]

    (ours, steps), (native, native_steps) = _jit(both)(*_operands())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(native), strict=True):
        # diffrax pads what was saved by steps.
        kept = np.isfinite(np.asarray(b)).reshape(len(b), -1).all(axis=1)
        np.testing.assert_allclose(a, b[kept], rtol=1e-10, atol=1e-12)
    assert steps == native_steps == STEPS


def test_gradients_are_finite_differences():
    weights, y0 = _operands()
    value = _jit(lambda *o: _gradient(tx.DirectAdjoint(), _saves()["mixed"])(*o)[0])
    checkpointed = tx.RecursiveCheckpointAdjoint(9)
    gradient = _jit(_gradient(checkpointed, _saves()["mixed"]))(weights, y0)[1]
    along = np.random.default_rng(1).normal(size=(3, 3))

    def moved(eps):
        return value(weights + eps * along, y0)

    numeric = (8 * (moved(1e-3) - moved(-1e-3)) - moved(2e-3) + moved(-2e-3)) / 12e-3
    np.testing.assert_allclose(jnp.vdot(gradient[0], along), numeric, rtol=1e-8)


@pytest.mark.parametrize(
    ("solver", "order"),
    [(diffrax.Euler(), 1), (diffrax.Heun(), 2), (diffrax.LeapfrogMidpoint(), 2)],
    ids=lambda x: type(x).__name__,
)
def test_backwards_in_time_and_other_methods(solver, order):
    decay = diffrax.ODETerm(lambda t, y, a: -a * y)

    def at(steps):
        out = solve_ode(
            decay, solver, 1.0, 0.0, -1 / steps, jnp.ones(2), 0.8,
            saveat=diffrax.SaveAt(ts=np.array([0.5, 0.0])),
        )  # fmt: skip
        return np.abs(out.ys[:, 0] - np.exp(0.8 * (1 - out.ts)))

    assert (at(40) < 0.02).all()
    ratio = at(20) / at(40)
    np.testing.assert_allclose(ratio, 2.0**order, rtol=0.15)


def test_a_last_step_that_does_not_fit_makes_all_of_them_smaller():
    out = solve_ode(
        diffrax.ODETerm(lambda t, y, a: -y), diffrax.Euler(), 0, 1, 0.3, 1.0,
        saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    np.testing.assert_allclose(out.ts, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(out.ys, 0.75 ** np.arange(1, 5))


def test_save_times_that_are_known_at_run_time_only():
    weights, y0 = _operands()

    def of(ts, weights):
        saveat = diffrax.SaveAt(ts=ts)
        return _solve(weights, y0, tx.RecursiveCheckpointAdjoint(), saveat).ys

    ts = _saves()["mixed"].subs.ts
    known = _solve(weights, y0, tx.DirectAdjoint(), _saves()["mixed"]).ys
    jitted = eqx.filter_jit(of)
    np.testing.assert_allclose(jitted(ts, weights), known, rtol=1e-12)
    for wrong, message in ((ts[::-1], "lead from"), (ts + 1, "between t0 and t1")):
        with pytest.raises(eqx.EquinoxRuntimeError, match=message):
            jax.block_until_ready(jitted(wrong, weights))


@pytest.mark.slow
def test_memory_is_one_state_per_step_and_less_with_fewer_checkpoints():
    width, steps = 64, 256
    weights = jnp.ones((width, width)) / width
    y0 = jnp.ones((256, width))

    def temporaries(adjoint):
        def loss(weights):
            term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w))
            out = solve_ode(
                term, diffrax.Heun(), 0, 1, 1 / steps, y0, weights, adjoint=adjoint
            )
            return jnp.sum(out.ys)

        compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    direct = temporaries(tx.DirectAdjoint())
    each = temporaries(tx.RecursiveCheckpointAdjoint())
    root = temporaries(tx.RecursiveCheckpointAdjoint(32))
    assert each <= 0.5 * direct and root <= 0.3 * each
    # Heun carries its state and a stage: the last of which a step starts with.
    assert each <= steps * 3 * y0.nbytes + 8 * weights.nbytes


@pytest.mark.slow
def test_adaptive_steps_backsolve_and_steady_states_go_to_diffrax():
    weights, y0 = _operands()
    tolerances = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    saveat = diffrax.SaveAt(ts=ENDS)

    def of(adjoint):
        options = {"stepsize_controller": tolerances, "max_steps": 512}
        return _jit(_gradient(adjoint, saveat, **options))(weights, y0)[1]

    specs = (tx.RecursiveCheckpointAdjoint(), BacksolveAdjoint())
    exact = _jit(_gradient(tx.DirectAdjoint(), saveat))(weights, y0)[1]
    for found in map(of, specs):
        for a, b in zip(found, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_implicit_derivative_of_a_steady_state():
    def steady(p):
        term = diffrax.ODETerm(lambda t, y, p: p - y**3)
        return solve_ode(
            term, diffrax.Tsit5(), 0.0, jnp.inf, None, jnp.array(1.0), p,
            adjoint=ImplicitAdjoint(), max_steps=512,
            stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
            event=diffrax.Event(diffrax.steady_state_event(rtol=1e-6, atol=1e-6)),
        ).ys[-1]  # fmt: skip

    value, slope = jax.value_and_grad(steady)(8.0)
    assert value == pytest.approx(2, abs=1e-5)
    assert slope == pytest.approx(1 / 12, abs=1e-5)


def test_in_a_configuration_the_equation_and_the_rollout_take_adjoints_apart():
    weights, _ = _operands()
    windows = jax.random.normal(jax.random.key(0), (2, 4, 3))

    def gradient(inner, outer):
        def loss(weights):
            def step(u):
                term = diffrax.ODETerm(_field)
                solution = solve_ode(
                    term, diffrax.Heun(), 0, 0.2, 0.1, u, weights, adjoint=inner
                )
                return solution.ys[-1]

            return tx.configuration.Supervised(3, adjoint=outer)(step, windows)[0]

        return jax.grad(loss)

    checkpoint = tx.RecursiveCheckpointAdjoint()
    exact = _jit(gradient(tx.DirectAdjoint(), tx.DirectAdjoint()))(weights)
    found = _jit(gradient(checkpoint, checkpoint))(weights)
    np.testing.assert_allclose(found, exact, rtol=1e-12)


# The defect upstream.


@pytest.mark.slow
def test_the_probe_finds_the_defect_upstream_and_not_here():
    with jax.enable_x64(False):
        native = probe_checkpointed_gradients(
            diffrax.diffeqsolve, [13], saves=["step ends"]
        )
        ours = probe_checkpointed_gradients(checkpoints=[None, 13], saves=["step ends"])
    assert len(ours) == 2 and max(ours.values()) < 1e-5
    # If this fails because diffrax or JAX is repaired, the refusal can go.
    assert native["step ends", 13] > 1e-2


def test_what_diffrax_differentiates_wrongly_is_refused():
    weights, y0 = _operands()
    adjoint = to_diffrax_adjoint(tx.RecursiveCheckpointAdjoint(12))
    native = functools.partial(
        _solve, weights, y0, adjoint, solve_fn=diffrax.diffeqsolve
    )
    expected = _solve(weights, y0, tx.DirectAdjoint(), _saves()["last"]).ys
    np.testing.assert_allclose(native(_saves()["last"]).ys, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="wrong by 20 %.*Use.*solve_ode"):
        native(_saves()["step ends"])
    # Unknown ends of the interval leave the steps to diffrax.
    with pytest.raises(ValueError, match="wrong by 20 %"):
        jax.jit(
            lambda t1: solve_ode(
                diffrax.ODETerm(_field), diffrax.Heun(), 0.0, t1, 0.1, y0, weights,
                saveat=_saves()["step ends"],
            ).ys
        )(END)  # fmt: skip


# Specifications and refusals.

ForeignBacksolve = type("BacksolveAdjoint", (), {})
ForeignCheckpoint = type("RecursiveCheckpointAdjoint", (), {"checkpoints": 6})
ForeignImplicit = type("ImplicitAdjoint", (), {"linear_solver": "gmres"})
ForeignTruncated = type("TruncatedAdjoint", (), {"k": 4})


def test_specifications_are_matched_by_name_and_keep_their_options():
    for native in (
        diffrax.RecursiveCheckpointAdjoint(3),
        diffrax.ForwardMode(),
        BacksolveAdjoint(solver=diffrax.Heun()),
    ):
        assert to_diffrax_adjoint(native) is native
    assert to_diffrax_adjoint(tx.DirectAdjoint()) == diffrax.DirectAdjoint()
    implicit = to_diffrax_adjoint(optimistix.ImplicitAdjoint(lx.LU()))
    assert isinstance(implicit, diffrax.ImplicitAdjoint)
    assert implicit.linear_solver == lx.LU()
    assert isinstance(to_diffrax_adjoint(ForeignBacksolve()), diffrax.BacksolveAdjoint)
    assert to_diffrax_adjoint(ForeignCheckpoint()).checkpoints == 6
    assert to_diffrax_adjoint(tx.RecursiveCheckpointAdjoint()).checkpoints is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (tx.KStepAdjoint(2), "ODE layer, got KStepAdjoint.*rollouts and inner.*Use"),
        (ForeignTruncated(), "ODE layer, got .*rollouts and inner solves"),
        (
            ForeignImplicit(),
            "ODE layer to be a lineax.AbstractLinearSolver, got 'gmres'",
        ),
        ("direct", "ODE layer, got 'direct'. Use DirectAdjoint"),
        (optimistix.AbstractAdjoint, "ODE layer, got <class"),
    ],
)
def test_other_specifications_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        to_diffrax_adjoint(spec)
    with pytest.raises(ValueError, match=message):
        _solve(*_operands(), spec, _saves()["last"])


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ((0.0, 1.0, -0.1), {}, "steps that lead from t0 to t1.*sign"),
        ((0.0, 1.0, 0.0), {}, "steps that lead from t0 to t1"),
        ((0.0, float("nan"), 0.1), {}, "steps that lead from t0 to t1"),
        ((0.0, 1.0, 0.01), {"max_steps": 99}, "at most max_steps=99 steps, got 100"),
        (
            (0.0, 1.0, 0.1),
            {"saveat": diffrax.SaveAt(ts=[0.5, 0.2])},
            "lead from t0 to t1",
        ),
        (
            (0.0, 1.0, 0.1),
            {"saveat": diffrax.SaveAt(ts=[0.5, 1.2])},
            "between t0 and t1",
        ),
        ((0.0, 1j, 0.1), {}, "real times"),
    ],
)
def test_bad_times_are_refused(times, options, message):
    weights, y0 = _operands()
    with pytest.raises(ValueError, match=message):
        solve_ode(
            diffrax.ODETerm(_field), diffrax.Heun(), *times, y0, weights, **options
        )


def test_unknown_patterns_are_refused():
    with pytest.raises(ValueError, match="patterns out of.*got 'often'"):
        probe_checkpointed_gradients(saves=["often"])
