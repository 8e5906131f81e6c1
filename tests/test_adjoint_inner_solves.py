"""Adjoints inside optimistix's solvers: values, gradients, memory, refusals."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import trainax_pk as tx
from trainax_pk.adjoint import (
    ImplicitAdjoint,
    bounded_while_loop,
    to_optimistix_adjoint,
)

A = 0.3
TOLERANCES = {"rtol": 1e-11, "atol": 1e-11}
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _fixed_point(p, adjoint):
    step = lambda x, p: x - A * (x - p)  # noqa: E731
    solver = optx.FixedPointIteration(**TOLERANCES)
    return optx.fixed_point(step, solver, 0.0, p, adjoint=adjoint, max_steps=100)


def _chord(p, adjoint):
    # The slope of the first point, -(1 + 2 c (x0 - p)) = -1 / A, is kept: contraction
    # by 1 - A near the root. The solver's own state holds it.
    residual = lambda x, p: (p - x) * (1 + (x - p))  # noqa: E731
    solver = optx.Chord(**TOLERANCES)
    start = jax.lax.stop_gradient(p) + (1 / A - 1) / 2
    return optx.root_find(residual, solver, start, p, adjoint=adjoint, max_steps=100)


class _DampedNewton(eqx.Module):
    """A descent along the Gauss-Newton direction, A of the way."""

    inner: optx.NewtonDescent = optx.NewtonDescent()

    def init(self, y, f_info_struct):
        return self.inner.init(y, f_info_struct)

    def query(self, y, f_info, state):
        return self.inner.query(y, f_info, state)

    def step(self, step_size, state):
        return self.inner.step(A * step_size, state)


class _DampedGaussNewton(optx.AbstractGaussNewton):
    rtol: float = TOLERANCES["rtol"]
    atol: float = TOLERANCES["atol"]
    norm: object = optx.max_norm
    descent: object = _DampedNewton()
    search: object = optx.LearningRate(1.0)
    verbose: object = lambda **kwargs: None  # noqa: E731


def _least_squares(p, adjoint):
    residual = lambda x, p: jnp.stack([x - p, 2 * (x - p)])  # noqa: E731
    return optx.least_squares(
        residual, _DampedGaussNewton(), 0.0, p, adjoint=adjoint, max_steps=100
    )


def _gradient_descent(p, adjoint):
    solver = optx.GradientDescent(A, **TOLERANCES)
    half_square = lambda x, p: 0.5 * (x - p) ** 2  # noqa: E731
    return optx.minimise(half_square, solver, 0.0, p, adjoint=adjoint, max_steps=100)


def _sgd(p, adjoint):
    solver = optx.OptaxMinimiser(optax.sgd(A), **TOLERANCES)
    half_square = lambda x, p: 0.5 * (x - p) ** 2  # noqa: E731
    return optx.minimise(half_square, solver, 0.0, p, adjoint=adjoint, max_steps=100)


# All contract to x = p by 1 - A per update. Those with a search propose an iterate in
# one step and accept it in the next.
SOLVES = {
    "fixed_point": _fixed_point,
    "root_find": _chord,
    "least_squares": _least_squares,
    "minimise, line search": _gradient_descent,
    "minimise, optax": _sgd,
}
_slow = pytest.mark.slow
solves = pytest.mark.parametrize(
    "name",
    [
        "fixed_point",
        *[pytest.param(x, marks=_slow) for x in ("root_find", "least_squares")],
        "minimise, line search",
        pytest.param("minimise, optax", marks=_slow),
    ],
)
ADJOINTS = {
    "direct": tx.DirectAdjoint(),
    "checkpointed": tx.RecursiveCheckpointAdjoint(),
    "optimistix's": optx.RecursiveCheckpointAdjoint(),
    "implicit": ImplicitAdjoint(),
    **{f"k = {k}": tx.KStepAdjoint(k) for k in (1, 2, 3, 7)},
    "k beyond": tx.KStepAdjoint(1000),
}


@functools.cache
def _results(name):
    solve = SOLVES[name]

    def of(adjoint):
        def value(p):
            solution = solve(p, adjoint)
            return solution.value, solution.stats["num_steps"]

        return lambda p: jax.value_and_grad(value, has_aux=True)(p)

    functions = {n: of(a) for n, a in ADJOINTS.items()}
    everything = lambda p: {n: f(p) for n, f in functions.items()}  # noqa: E731
    return jax.tree.map(np.asarray, _jit(everything)(2.0))


@solves
def test_derivatives_are_those_that_the_contraction_predicts(name):
    results = _results(name)
    for k in (1, 2, 3, 7):
        expected = 1 - (1 - A) ** k
        assert results[f"k = {k}"][1] == pytest.approx(expected, abs=1e-6)
    assert results["implicit"][1] == pytest.approx(1, abs=1e-5)
    assert results["direct"][1] == pytest.approx(1, abs=1e-5)


@solves
def test_the_forward_value_is_the_same_for_every_adjoint(name):
    results = _results(name)
    (value, steps), _ = results["direct"]
    assert value == pytest.approx(2.0, abs=1e-9) and 30 < steps < 100
    for (other, count), _ in results.values():
        # One program, optimisation off: XLA has fused nothing differently.
        assert other == value and count == steps


@solves
def test_exact_adjoints_agree(name):
    results = _results(name)
    exact = results["direct"][1]
    for other in ("checkpointed", "optimistix's", "k beyond"):
        np.testing.assert_allclose(results[other][1], exact, rtol=1e-12)
    truncated = {f"k = {k}": results[f"k = {k}"][1] for k in (1, 2, 3, 7)}
    assert len({float(f"{g:.6f}") for g in truncated.values()}) == 4


# A solve with several leaves, of which the oracle is a loop by hand.


def _tree_map_step(x, args):
    w, b = args
    u = 0.4 * jnp.tanh(w @ x["u"] + b) + 0.1 * x["v"].sum()
    return {"u": u, "v": 0.5 * x["v"] + 0.2 * u[:2]}


def _tree_operands():
    rng = np.random.default_rng(0)
    args = (jnp.asarray(rng.normal(size=(3, 3))), jnp.asarray(rng.normal(size=3)))
    start = {"u": jnp.asarray(rng.normal(size=3)), "v": jnp.asarray(rng.normal(size=2))}
    return start, args


def _objective(x):
    return jnp.sum(x["u"] ** 2) + x["v"][0] * x["u"][1]


def _solved(start, args, adjoint, tolerance=1e-4):
    solver = optx.FixedPointIteration(rtol=tolerance, atol=tolerance)
    solution = optx.fixed_point(
        _tree_map_step, solver, start, args, adjoint=adjoint, max_steps=64
    )
    return solution.value, solution.stats["num_steps"]


def _by_hand(start, args, steps, k):
    x = start
    for i in range(steps):
        if 0 < i == steps - k:
            x = jax.lax.stop_gradient(x)
        live = i >= steps - k
        x = _tree_map_step(x, args if live else jax.lax.stop_gradient(args))
    return x


@functools.cache
def _number_of_steps():
    return int(_jit(lambda *o: _solved(*o, ImplicitAdjoint()))(*_tree_operands())[1])


@_slow
def test_gradients_are_those_of_the_loop_by_hand():
    start, args = _tree_operands()
    steps = _number_of_steps()
    assert steps > 6
    ks = (1, 2, 4, steps - 1, steps, steps + 1)

    def of(run, k):
        return jax.grad(lambda *o: _objective(run(*o, k)), (0, 1))

    def ours_of(start, args, k):
        return _solved(start, args, tx.KStepAdjoint(k))[0]

    def hand_of(start, args, k):
        return _by_hand(start, args, steps, k)

    def everything(*o):
        return [[of(run, k)(*o) for k in ks] for run in (ours_of, hand_of)]

    ours, hand = _jit(everything)(start, args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)
    # The first iterate moves the solution only if every step is live.
    zero = [not any(np.any(x) for x in jax.tree.leaves(g[0])) for g in ours]
    assert zero == [True, True, True, True, False, False]


def test_members_of_a_vmap_stop_each_at_its_own_step():
    start, args = _tree_operands()
    scales = jnp.array([1e-6, 0.1, 1.0, 10.0])
    starts = jax.tree.map(lambda x: jnp.tensordot(scales, x, axes=0), start)
    adjoint = tx.KStepAdjoint(3)

    def loss(start, args):
        value, steps = _solved(start, args, adjoint)
        return _objective(value), steps

    gradient = jax.grad(loss, argnums=1, has_aux=True)
    together, counts = _jit(jax.vmap(gradient, (0, None)))(starts, args)
    assert len(set(counts.tolist())) > 1
    alone = _jit(gradient)
    for i in range(4):
        expected, steps = alone(jax.tree.map(lambda x: x[i], starts), args)  # noqa: B023
        assert steps == counts[i]
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-10, atol=1e-15)


def test_without_jit_and_in_forward_mode():
    adjoint = tx.KStepAdjoint(2)
    last = lambda p: _fixed_point(p, adjoint).value  # noqa: E731
    expected = 1 - (1 - A) ** 2
    assert jax.grad(last)(2.0) == pytest.approx(expected, abs=1e-9)
    assert jax.jvp(last, (2.0,), (1.0,))[1] == pytest.approx(expected, abs=1e-9)


def test_momentum_before_the_live_steps_is_kept_but_not_differentiated():
    """The solver's whole state is carried: momentum is no function of the iterate."""
    momentum, rate, k, steps = 0.6, 0.2, 2, 9

    def solved(p):
        optimizer = optax.sgd(rate, momentum=momentum)
        solver = optx.OptaxMinimiser(optimizer, rtol=1e-14, atol=1e-14)
        return optx.minimise(
            lambda x, p: 0.5 * (x - p) ** 2, solver, 0.0, p,
            adjoint=tx.KStepAdjoint(k), max_steps=steps, throw=False,
        ).value  # fmt: skip

    def by_hand(p):
        x, trace = 0.0, 0.0
        for i in range(steps):
            q = p if i >= steps - k else jax.lax.stop_gradient(p)
            trace = (x - q) + momentum * trace
            x = x - rate * trace
        return x

    ours, hand = (_jit(jax.value_and_grad(f))(2.0) for f in (solved, by_hand))
    np.testing.assert_allclose(ours, hand, rtol=1e-12)


# Memory.


def _temporaries(adjoint, steps):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(0.05 * rng.normal(size=(64, 64)))
    start = jnp.asarray(rng.normal(size=(32, 64)))

    def loss(weights):
        step = lambda x, w: 0.9 * jnp.tanh(x @ w) + 0.1  # noqa: E731
        # No tolerance is met: exactly `steps` steps are taken.
        solver = optx.FixedPointIteration(rtol=0.0, atol=1e-300)
        return jnp.sum(
            optx.fixed_point(
                step, solver, start, weights,
                adjoint=adjoint, max_steps=steps, throw=False,
            ).value
        )  # fmt: skip

    compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@_slow
def test_memory_of_the_backward_pass():
    few, many = 8, 64
    sizes = {
        name: np.array([_temporaries(adjoint, n) for n in (few, many)])
        for name, adjoint in {
            "direct": tx.DirectAdjoint(),
            "checkpointed": tx.RecursiveCheckpointAdjoint(),
            "k = 3": tx.KStepAdjoint(3),
            "implicit": ImplicitAdjoint(lx.Normal(lx.CG(1e-6, 1e-6))),
        }.items()
    }
    state = 32 * 64 * 8
    direct = sizes["direct"]
    # Per step at least one state; linear, but for what a few steps need at any length.
    per_step = (direct[1] - direct[0]) / (many - few)
    assert per_step >= state and direct[0] - few * per_step <= 4 * per_step
    # Online checkpointing keeps about the root of 2 n states.
    grown = sizes["checkpointed"][1] - sizes["checkpointed"][0]
    assert grown <= 1.5 * (np.sqrt(2 * many) - np.sqrt(2 * few)) * state
    assert sizes["checkpointed"][1] < 0.5 * direct[1]
    for flat in ("k = 3", "implicit"):
        assert sizes[flat][1] <= 1.05 * sizes[flat][0]


# While loops by themselves, and refusals.


@pytest.mark.parametrize(
    "adjoint",
    [tx.DirectAdjoint(), tx.RecursiveCheckpointAdjoint(), tx.KStepAdjoint(2)],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("max_steps", [0, 1, 4, 20])
def test_a_while_loop_ends_by_its_condition_or_its_bound(adjoint, max_steps):
    def run(x):
        carry = (x, jnp.array(0), {"key": jax.random.key(3)})
        return adjoint.while_loop(
            lambda c: c[0] < 100.0,
            lambda c: (c[0] * 2, c[1] + 1, c[2]),
            carry,
            max_steps=max_steps,
        )

    value, count, rest = run(jnp.array(3.0))
    steps = min(max_steps, 6)
    assert value == 3 * 2**steps and count == steps
    assert jnp.array_equal(jax.random.key_data(rest["key"]), [0, 3])
    slope = jax.grad(lambda x: run(x)[0])(3.0)
    crosses_all = not isinstance(adjoint, tx.KStepAdjoint) or steps <= adjoint.k
    assert slope == (2**steps if crosses_all else 0)


@pytest.mark.parametrize(
    "adjoint", [tx.DirectAdjoint(), tx.RecursiveCheckpointAdjoint()]
)
def test_a_loop_without_a_bound_is_refused(adjoint):
    with pytest.raises(ValueError, match="max_steps.*Pass `max_steps`"):
        adjoint.while_loop(lambda x: x < 3, lambda x: x + 1, 0.0, max_steps=None)


def test_loops_without_a_bound():
    for adjoint in (tx.KStepAdjoint(3), tx.RecursiveCheckpointAdjoint(4)):
        grow = lambda x, a=adjoint: a.while_loop(  # noqa: E731
            lambda x: x[0] < 100.0,
            lambda x: (x[0] + x[1] ** 2, x[1]),
            x,
            max_steps=None,
        )[0]
        slope = jax.grad(lambda y, g=grow: g((jnp.array(0.0), y)))(5.0)
        # y is carried: it is held fixed before the live steps, like all of the carry.
        assert slope == (0 if isinstance(adjoint, tx.KStepAdjoint) else 4 * 2 * 5.0)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_is_refused_before_anything_is_solved(k):
    with pytest.raises(ValueError, match="`k` to be an integer >= 1"):
        _fixed_point(2.0, tx.KStepAdjoint(k))


def test_bounded_while_loop_is_the_scan_it_is_given():
    lengths = []

    def scan(body, init, xs, length):
        lengths.append(length)
        return jax.lax.scan(body, init, xs, length=length)

    out = bounded_while_loop(scan, lambda x: x < 5, lambda x: x + 2, 0, max_steps=7)
    assert out == 6 and lengths == [7]


class RecursiveCheckpointAdjoint(eqx.Module):
    checkpoints: int | None = 5


class ImplicitSpec(eqx.Module):
    linear_solver: object = None


ForeignImplicit = type("ImplicitAdjoint", (ImplicitSpec,), {})
ForeignBacksolve = type("BacksolveAdjoint", (), {})
ForeignTruncated = type("TruncatedAdjoint", (), {"k": 4})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (tx.KStepAdjoint(2), tx.KStepAdjoint(2)),
        (ForeignTruncated(), tx.KStepAdjoint(4)),
        (RecursiveCheckpointAdjoint(), tx.RecursiveCheckpointAdjoint(5)),
        (diffrax.RecursiveCheckpointAdjoint(7), tx.RecursiveCheckpointAdjoint(7)),
        (diffrax.DirectAdjoint(), tx.DirectAdjoint()),
        (diffrax.ImplicitAdjoint(lx.LU()), ImplicitAdjoint(lx.LU())),
        (ForeignImplicit(lx.GMRES(1e-3, 1e-3)), ImplicitAdjoint(lx.GMRES(1e-3, 1e-3))),
        (ForeignImplicit(), ImplicitAdjoint()),
        (optx.ImplicitAdjoint(lx.SVD()), ImplicitAdjoint(lx.SVD())),
        (optx.RecursiveCheckpointAdjoint(3), optx.RecursiveCheckpointAdjoint(3)),
    ],
)
def test_specifications_are_matched_by_name_and_keep_their_options(spec, expected):
    found = to_optimistix_adjoint(spec)
    assert isinstance(found, optx.AbstractAdjoint)
    assert found == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (diffrax.BacksolveAdjoint(), "inner-solve layer, got BacksolveAdjoint.*Use"),
        (
            ForeignBacksolve(),
            "inner-solve layer, got BacksolveAdjoint.*ImplicitAdjoint",
        ),
        (ForeignImplicit("cg"), "lineax.AbstractLinearSolver, got 'cg'"),
        ("implicit", "inner-solve layer, got 'implicit'.*Use DirectAdjoint"),
        (None, "inner-solve layer, got None"),
        (diffrax.ForwardMode(), "inner-solve layer, got ForwardMode"),
    ],
)
def test_other_specifications_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        to_optimistix_adjoint(spec)
