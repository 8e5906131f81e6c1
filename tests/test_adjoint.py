"""Adjoints against `lax.scan`, unrolled oracles and finite differences."""

import dataclasses
import functools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import trainax_pk as tx
from trainax_pk.adjoint import to_rollout_adjoint
from trainax_pk.adjoint._recursive_checkpoint import _factors

# To add an adjoint: one row, with the number of steps that its gradient may cross
# (None: all). Every contract test below runs on every row.
ADJOINTS = {
    "direct": (tx.DirectAdjoint(), None),
    "checkpoint": (tx.RecursiveCheckpointAdjoint(), None),
    "checkpoint, exact factors": (tx.RecursiveCheckpointAdjoint(8), None),
    "checkpoint, rounded up": (tx.RecursiveCheckpointAdjoint(9), None),
    "checkpoint, deep": (tx.RecursiveCheckpointAdjoint(12), None),
    "one step": (tx.OneStepAdjoint(), 1),
    "k = 3": (tx.KStepAdjoint(3), 3),
    "k = 4": (tx.KStepAdjoint(4), 4),
    "k = 16": (tx.KStepAdjoint(16), 16),
    "k beyond": (tx.KStepAdjoint(40), 40),
}
# Lengths that take each through its cases: no step to cross, none left over, some left
# over, one left over, all crossed.
LENGTHS = {
    "direct": (1, 13),
    "checkpoint": (1, 13),
    "checkpoint, exact factors": (2, 16),
    "checkpoint, rounded up": (13, 17),
    "checkpoint, deep": (13, 16, 17),
    "one step": (1, 2, 13),
    "k = 3": (2, 13, 16),
    "k = 4": (1, 13, 16, 17),
    "k = 16": (13, 16, 17),
    "k beyond": (1, 17),
}
rows = pytest.mark.parametrize("name", ADJOINTS)


def _operands(length, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(0.6 * rng.normal(size=(3, 3))),
        "b": jnp.asarray(0.2 * rng.normal(size=3)),
    }
    init = {"u": jnp.asarray(rng.normal(size=3)), "v": (jnp.array(0.3 + 0.7j),)}
    xs = jnp.asarray(rng.normal(size=(length, 3)))
    keys = jax.random.wrap_key_data(
        jnp.asarray(rng.integers(9, size=(length, 2)), "u4")
    )
    fixed = (jnp.asarray(rng.integers(3, size=length)), keys)
    return params, init, xs, fixed


def _body(params):
    """A step over a tree with an integer and a complex leaf, and keys among its xs."""

    def body(carry, x):
        target, number, key = x
        u = jnp.tanh(params["w"] @ carry["u"] + params["b"]) + 0.3 * carry["u"]
        v = carry["v"][0] * (0.9 + 0.1j * u[0])
        weight = number + 0.1 * jax.random.key_data(key)[1]
        error = weight * jnp.sum((u - target) ** 2) + v.real
        count = carry["count"] + number
        return {"u": u, "v": (v,), "count": count}, (error, {"u": u, "count": count})

    return body


def _summary(last, ys):
    return jnp.sum(ys[0]) + last["u"][0] * last["v"][0].imag + jnp.sum(ys[1]["u"] ** 3)


def _value(scan, length, params, init, xs, fixed):
    init = init | {"count": jnp.array(2)}
    last, ys = scan(_body(params), init, (xs, *fixed), length)
    return _summary(last, ys), (last, ys)


def _cut_scan(k):
    """`lax.scan` with every k-th state behind a stopped gradient."""

    def scan(body, init, xs, length):
        def cut_body(carry, x):
            cut, x = x
            stopped = jax.lax.stop_gradient(carry)
            carry = jax.tree.map(lambda a, b: jnp.where(cut, a, b), stopped, carry)
            return body(carry, x)

        steps = np.arange(length)
        cuts = (steps > 0) & (steps % (k or length) == 0)
        return jax.lax.scan(cut_body, init, (jnp.asarray(cuts), xs), length)

    return scan


def _unrolled(k):
    """The same as a Python loop."""

    def scan(body, carry, xs, length):
        ys = []
        for t in range(length):
            if k is not None and t > 0 and t % k == 0:
                carry = jax.lax.stop_gradient(carry)
            carry, y = body(carry, jax.tree.map(lambda x: x[t], xs))  # noqa: B023
            ys.append(y)
        return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)

    return scan


# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _assert_close(a, b, rtol=1e-11):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


def _gradient(scan, length):
    return jax.value_and_grad(
        lambda *args: _value(scan, length, *args), argnums=(0, 1, 2), has_aux=True
    )


@functools.cache
def _oracle(k, length):
    (value, out), grads = _jit(_gradient(_cut_scan(k), length))(*_operands(length))
    return value, out, grads


@pytest.mark.parametrize("k", [None, 1, 3])
def test_the_oracle_is_the_unrolled_loop(k):
    expected = _jit(_gradient(_unrolled(k), 7))(*_operands(7))
    _assert_close(_jit(_gradient(_cut_scan(k), 7))(*_operands(7)), expected)


@pytest.mark.parametrize(
    ("name", "length"), [(n, length) for n in ADJOINTS for length in LENGTHS[n]]
)
def test_value_is_that_of_scan_and_gradient_that_of_the_unrolled_loop(name, length):
    adjoint, k = ADJOINTS[name]
    operands = _operands(length)
    (value, out), grads = _jit(_gradient(adjoint.scan, length))(*operands)
    init = operands[1] | {"count": jnp.array(2)}
    exact = jax.lax.scan(_body(operands[0]), init, (operands[2], *operands[3]), length)
    _assert_close(out, exact, rtol=1e-14)
    crosses_all = k is None or k >= length
    value_u, out_u, grads_u = _oracle(None if crosses_all else k, length)
    _assert_close(out, out_u, rtol=1e-13)
    np.testing.assert_allclose(value, value_u, rtol=1e-13)
    _assert_close(grads, grads_u)


@pytest.mark.parametrize("length", [2, 13, 16, 17])
def test_every_feasible_number_of_checkpoints_is_exact(length):
    operands = _operands(length)
    plans = {}
    for checkpoints in range(1, length):
        try:
            plans[_factors(length, checkpoints)] = checkpoints
        except ValueError:
            with pytest.raises(ValueError, match="checkpoints for a loop"):
                tx.RecursiveCheckpointAdjoint(checkpoints).scan(
                    _body(operands[0]), None, None, length
                )
            assert not plans  # More checkpoints never make a loop impossible.
    for checkpoints in (*plans.values(), length, length + 1):
        adjoint = tx.RecursiveCheckpointAdjoint(checkpoints)
        _, grads = _jit(_gradient(adjoint.scan, length))(*operands)
        _assert_close(grads, _oracle(None, length)[2])


@pytest.mark.parametrize("name", ["checkpoint, rounded up", "k = 4"])
def test_with_respect_to_one_operand_alone(name):
    adjoint, k = ADJOINTS[name]
    operands = _operands(13)
    loss = lambda *args: _value(adjoint.scan, 13, *args)[0]  # noqa: E731
    for i in range(3):
        _assert_close(_jit(jax.grad(loss, i))(*operands), _oracle(k, 13)[2][i])


@pytest.mark.parametrize("name", ["checkpoint, rounded up", "k = 4"])
def test_without_jit(name):
    adjoint, k = ADJOINTS[name]
    operands = _operands(13)
    loss = lambda *args: _value(adjoint.scan, 13, *args)[0]  # noqa: E731
    _assert_close(jax.grad(loss)(*operands), _oracle(k, 13)[2][0])


@functools.cache
def _oracle_of_members(k, length):
    k = None if k is None or k >= length else k
    loss = lambda *args: _value(_cut_scan(k), length, *args)[0]  # noqa: E731
    return _jit(jax.grad(loss, (0, 1)))


@rows
def test_vmap_of_grad_and_grad_of_vmap(name):
    adjoint, k = ADJOINTS[name]
    length = 10
    params, init, xs, fixed = _operands(length)
    inits = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -2 * x]), init)

    def gradients(scan):
        loss = lambda p, i: _value(scan, length, p, i, xs, fixed)[0]  # noqa: E731
        mean = lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, inits))  # noqa: E731
        each = jax.vmap(jax.grad(loss, (0, 1)), (None, 0))
        return _jit(lambda p: (each(p, inits), jax.grad(mean)(p)))(params)

    grad_u = _oracle_of_members(k, length)
    alone = [jax.tree.map(lambda x: x[i], inits) for i in range(3)]  # noqa: B023
    expected = [grad_u(params, i, xs, fixed) for i in alone]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    each, shared = gradients(adjoint.scan)
    _assert_close(each, expected)
    _assert_close(shared, jax.tree.map(lambda x: jnp.mean(x, 0), expected[0]))


@rows
def test_integer_and_weak_carries_settle_as_in_scan(name):
    adjoint, _ = ADJOINTS[name]
    for start in (0, 1.0, jnp.array(2), jnp.array(1.0, jnp.float32)):
        if getattr(start, "dtype", None) == jnp.int64:
            body = lambda u, _: (u * 3, u)  # noqa: E731
        else:
            body = lambda u, _: (u * 0.5 + 1.25, u)  # noqa: E731
        expected = jax.lax.scan(body, start, None, 13)
        _assert_close(adjoint.scan(body, start, None, 13), expected, rtol=0)


@rows
def test_no_inputs_no_outputs_and_unused_gradients(name):
    adjoint, _ = ADJOINTS[name]

    def last(a):
        return adjoint.scan(lambda u, _: (u * a, None), jnp.array(1.0), None, 6)[0]

    def outputs_only(a):
        return adjoint.scan(lambda u, x: (u, a * x), jnp.array(1.0), jnp.ones(6), 6)[1]

    assert last(jnp.array(2.0)) == 64
    _, k = ADJOINTS[name]
    crossed = 6 if k is None else (6 - 1) % k + 1
    # d/da a^6 through the last `crossed` factors only.
    assert jax.grad(last)(2.0) == pytest.approx(crossed * 2.0**5, rel=1e-12)
    assert jax.grad(lambda a: outputs_only(a).sum())(2.0) == pytest.approx(6.0)


@pytest.mark.parametrize("name", [n for n, (_, k) in ADJOINTS.items() if k is None])
def test_exact_gradients_are_finite_differences(name):
    adjoint, _ = ADJOINTS[name]
    operands = _operands(13)
    loss = lambda *args: _value(adjoint.scan, 13, *args, operands[3])[0]  # noqa: E731
    fn = _jit(loss)
    point = operands[:3]
    grads = _jit(jax.grad(loss, (0, 1, 2)))(*point)
    directions = _operands(13, seed=7)[:3]

    def along(eps):
        return fn(*jax.tree.map(lambda x, d: x + eps * d, point, directions))

    numeric = (8 * (along(1e-4) - along(-1e-4)) - along(2e-4) + along(-2e-4)) / 12e-4
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(directions), strict=True)
    # JAX's gradient is conjugated: the pairing is Re(g d), without a conjugate.
    analytic = sum(jnp.sum(g * d).real for g, d in pairs)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-9)


@pytest.mark.parametrize("k", [2, 5])
def test_truncated_gradients_are_finite_differences_of_frozen_segments(k):
    length = 11
    params, init, xs, fixed = _operands(length)
    start = init | {"count": jnp.array(2)}
    inputs = (xs, *fixed)
    states = [start]
    for t in range(length):
        x = jax.tree.map(lambda x: x[t], inputs)  # noqa: B023
        states.append(_body(params)(states[-1], x)[0])

    @_jit
    def frozen(params):
        """Every segment starts from a state that does not move with `params`."""
        ys = []
        for first in range(0, length, k):
            size = min(k, length - first)
            xs = jax.tree.map(lambda x: x[first : first + size], inputs)  # noqa: B023
            last, y = jax.lax.scan(_body(params), states[first], xs)
            ys.append(y)
        return _summary(last, jax.tree.map(lambda *y: jnp.concatenate(y), *ys))

    scan = tx.KStepAdjoint(k).scan
    grads = jax.grad(lambda p: _value(scan, length, p, init, xs, fixed)[0])(params)
    for leaf in ("w", "b"):
        for entry in np.ndindex(params[leaf].shape):

            def shifted(eps, leaf=leaf, entry=entry):
                moved = params[leaf].at[entry].add(eps)
                return frozen(params | {leaf: moved})

            numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
            np.testing.assert_allclose(grads[leaf][entry], numeric, rtol=2e-7)


def test_bias_at_a_fixed_point_is_the_power_of_the_spectral_radius():
    # x <- x - a (x - p) has dx*/dp = 1; k steps of it give 1 - (1 - a)^k.
    a = 0.3
    for k in (1, 2, 3, 7):

        def solve(p, k=k):
            step = lambda x, _: (x - a * (x - p), None)  # noqa: E731
            return tx.KStepAdjoint(k).scan(step, jnp.array(0.0), None, 30 * k)[0]

        expected = 1 - (1 - a) ** k
        assert jax.grad(solve)(2.0) == pytest.approx(expected, rel=1e-12)


def test_forward_mode_and_second_derivatives_of_checkpointed_loops():
    operands = _operands(11)
    direction = _operands(11, seed=3)[0]

    def of(adjoint):
        def loss(params):
            return _value(adjoint.scan, 11, params, *operands[1:])[0]

        def product(params):
            return jax.jvp(jax.grad(loss), (params,), (direction,))

        return _jit(product)(operands[0])

    exact = of(tx.DirectAdjoint())
    for checkpoints in (None, 7):  # 11 steps are 4 times 3 less 1.
        _assert_close(of(tx.RecursiveCheckpointAdjoint(checkpoints)), exact)


def test_second_derivatives_of_truncated_loops_are_those_of_the_gradient_map():
    operands = _operands(7)
    params, direction = operands[0], _operands(7, seed=5)[0]

    def loss(params):
        return _value(tx.KStepAdjoint(2).scan, 7, params, *operands[1:])[0]

    def squared(params):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(params)))

    def shifted(eps):
        moved = jax.tree.map(lambda x, d: x + eps * d, params, direction)
        return value(moved)

    value = _jit(squared)
    numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    products = jax.tree.map(jnp.vdot, _jit(jax.grad(squared))(params), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), numeric, rtol=1e-7)


def test_truncated_loops_have_no_forward_mode():
    def last(u):
        return tx.KStepAdjoint(2).scan(lambda u, _: (2 * u, None), u, None, 5)[0]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(last, (1.0,), (1.0,))


@pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
def test_k_steps_equal_cut_bptt_every_k(k):
    model = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.key(0))
    windows = jax.random.normal(jax.random.key(1), (4, 7, 3))
    weights = jnp.linspace(0.4, 1.9, 6)

    def of(**options):
        configuration = tx.configuration.Supervised(
            6, time_level_weights=weights, **options
        )
        loss = lambda m: configuration(m, windows)[0]  # noqa: E731
        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)

    truncated = of(adjoint=tx.KStepAdjoint(k))
    cut = of(cut_bptt=True, cut_bptt_every=k)
    _assert_close(
        eqx.filter(truncated, eqx.is_array), eqx.filter(cut, eqx.is_array), rtol=1e-13
    )


# Memory and program size.


def _residual_mlp():
    mlp = eqx.nn.MLP(8, 8, 96, 3, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_array)
    return (
        params,
        lambda p, u: u + 0.1 * jax.vmap(eqx.combine(p, static))(u),
        jnp.ones((16, 8)),
    )


def _residual_conv():
    def conv(channels_in, channels_out, i):
        return eqx.nn.Conv1d(
            channels_in,
            channels_out,
            3,
            padding="SAME",
            padding_mode="CIRCULAR",
            key=jax.random.key(i),
        )

    net = eqx.nn.Sequential(
        [
            conv(1, 24, 0),
            eqx.nn.Lambda(jax.nn.gelu),
            conv(24, 1, 1),
        ]
    )
    params, static = eqx.partition(net, eqx.is_array)
    return (
        params,
        lambda p, u: u + 0.1 * jax.vmap(eqx.combine(p, static))(u),
        jnp.ones((4, 1, 48)),
    )


def _lowered(adjoint, length, problem):
    params, step, u0 = problem

    def loss(params):
        body = lambda u, _: (step(params, u), jnp.mean(u**2))  # noqa: E731
        return jnp.sum(adjoint.scan(body, u0, None, length)[1])

    return jax.jit(jax.grad(loss)).lower(params)


def _temporaries(adjoint, length, problem):
    analysis = _lowered(adjoint, length, problem).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("problem", [_residual_mlp, _residual_conv])
def test_memory_of_the_backward_pass(problem):
    problem = problem()
    direct = _temporaries(tx.DirectAdjoint(), 128, problem)
    checkpointed = _temporaries(tx.RecursiveCheckpointAdjoint(), 128, problem)
    k_steps = _temporaries(tx.KStepAdjoint(4), 128, problem)
    assert checkpointed <= 0.05 * direct
    assert k_steps <= 0.1 * direct


def test_memory_of_k_steps_does_not_grow_with_the_loop():
    problem = _residual_mlp()
    sizes = [_temporaries(tx.KStepAdjoint(4), t, problem) for t in (64, 512)]
    # One number per step is what the loss itself returns.
    assert abs(sizes[1] - sizes[0]) <= 3 * 8 * (512 - 64)
    assert sizes[1] <= 1.05 * sizes[0]


def test_memory_of_nested_scans_follows_the_number_of_states():
    problem = _residual_mlp()
    state = problem[2].nbytes
    weights = sum(x.nbytes for x in jax.tree.leaves(problem[0]))
    flat = _temporaries(tx.RecursiveCheckpointAdjoint(), 4096, problem)
    nested = _temporaries(tx.RecursiveCheckpointAdjoint(128), 4096, problem)
    rounded = _temporaries(tx.RecursiveCheckpointAdjoint(129), 4099, problem)
    assert flat - nested >= (4096 - 128) * state - 2 * weights
    # Behind the test, a step's gradient is not added in place.
    assert rounded - nested <= 2 * weights


@pytest.mark.parametrize(
    ("adjoint", "short", "long"),
    [
        (tx.DirectAdjoint(), 2, 128),
        (tx.RecursiveCheckpointAdjoint(), 2, 128),
        (tx.RecursiveCheckpointAdjoint(24), 25, 128),
        (tx.RecursiveCheckpointAdjoint(24), 37, 127),
        (tx.OneStepAdjoint(), 2, 128),
        (tx.KStepAdjoint(4), 8, 128),
        (tx.KStepAdjoint(4), 5, 127),
    ],
)
def test_program_size_does_not_depend_on_the_length(adjoint, short, long):
    problem = _residual_mlp()
    lines = [_lowered(adjoint, t, problem).as_text().count("\n") for t in (short, long)]
    assert abs(lines[1] - lines[0]) <= 0.05 * lines[0]


@pytest.mark.parametrize(
    ("adjoint", "length", "most"),
    [
        # Bodies in the program: value, recomputation and gradient of each.
        (tx.RecursiveCheckpointAdjoint(14), 128, 4),
        (tx.RecursiveCheckpointAdjoint(14), 127, 4),
        (tx.KStepAdjoint(3), 128, 3),
    ],
)
def test_deep_nests_and_remainders_stay_small_programs(adjoint, length, most):
    problem = _residual_mlp()
    direct = _lowered(tx.DirectAdjoint(), length, problem).as_text().count("\n")
    lines = _lowered(adjoint, length, problem).as_text().count("\n")
    assert lines <= most * direct


@pytest.mark.parametrize("length", [5, 12, 16, 100, 127, 128, 1000, 1001])
def test_factors_cover_the_loop_within_the_budget(length):
    fewest = None
    for checkpoints in range(1, length):
        try:
            factors = _factors(length, checkpoints)
        except ValueError:
            assert fewest is None
            continue
        fewest = checkpoints if fewest is None else fewest
        assert sum(factors) <= checkpoints
        excess = math.prod(factors) - length
        assert 0 <= excess < max(length // factors[0] + 1, factors[0] * length)
        assert min(factors) >= 2
    if length >= 16:
        assert fewest is not None and fewest <= 3 * math.log2(length)


# Refusals and foreign specifications.


@dataclasses.dataclass
class TruncatedAdjoint:
    k: int


@dataclasses.dataclass
class RecursiveCheckpointAdjoint:
    checkpoints: int | None = None


@dataclasses.dataclass
class KStepAdjoint:
    num_steps: int = 3


@dataclasses.dataclass
class ImplicitAdjoint:
    linear_solver: str = "cg"


@dataclasses.dataclass
class BacksolveAdjoint:
    pass


@dataclasses.dataclass
class DirectAdjoint:
    def __bool__(self):
        return False


@dataclasses.dataclass
class OneStepAdjoint:
    pass


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TruncatedAdjoint(3), tx.KStepAdjoint(3)),
        (RecursiveCheckpointAdjoint(5), tx.RecursiveCheckpointAdjoint(5)),
        (RecursiveCheckpointAdjoint(), tx.RecursiveCheckpointAdjoint()),
        (OneStepAdjoint(), tx.KStepAdjoint(1)),
        (DirectAdjoint(), tx.DirectAdjoint()),
        (diffrax.DirectAdjoint(), tx.DirectAdjoint()),
        (diffrax.RecursiveCheckpointAdjoint(7), tx.RecursiveCheckpointAdjoint(7)),
        (
            optimistix.RecursiveCheckpointAdjoint(),
            tx.RecursiveCheckpointAdjoint(),
        ),
        (tx.KStepAdjoint(2), tx.KStepAdjoint(2)),
    ],
)
def test_specifications_are_matched_by_name(spec, expected):
    assert to_rollout_adjoint(spec) == expected
    configuration = tx.configuration.Supervised(3, adjoint=spec)
    assert configuration.adjoint == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ImplicitAdjoint(), "rollout layer, got ImplicitAdjoint.*inner solves.*Use"),
        (optimistix.ImplicitAdjoint(), "ImplicitAdjoint.*inner solves"),
        (BacksolveAdjoint(), "rollout layer, got BacksolveAdjoint.*continuous.*Use"),
        (diffrax.BacksolveAdjoint(), "BacksolveAdjoint.*continuous-time"),
        (KStepAdjoint(), "KStepAdjoint to have a field `k`"),
        (TruncatedAdjoint(0), "`k` to be an integer >= 1, got 0"),
        (RecursiveCheckpointAdjoint(-1), "`checkpoints` to be an integer >= 1"),
        (tx.DirectAdjoint, "an adjoint of the rollout layer, got <class"),
        (0, "an adjoint of the rollout layer, got 0"),
        ("direct", "an adjoint of the rollout layer, got 'direct'"),
    ],
)
def test_other_specifications_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        to_rollout_adjoint(spec)
    with pytest.raises(ValueError, match=message):
        tx.configuration.Supervised(3, adjoint=spec)
    with pytest.raises(ValueError, match=message):
        tx.rollout(lambda u: u, jnp.ones(2), 3, adjoint=spec)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, "3"])
def test_k_is_a_positive_integer(k):
    with pytest.raises(ValueError, match="`k` to be an integer >= 1.*Pass"):
        tx.KStepAdjoint(k)


@pytest.mark.parametrize("checkpoints", [0, -2, 1.5, True, "8"])
def test_checkpoints_are_a_positive_integer(checkpoints):
    with pytest.raises(ValueError, match="`checkpoints` to be an integer >= 1"):
        tx.RecursiveCheckpointAdjoint(checkpoints)


def test_too_few_checkpoints_are_refused_with_the_number_that_would_do():
    body = lambda u, _: (u, u)  # noqa: E731
    with pytest.raises(ValueError, match="at least 15 checkpoints.*200 steps, got 14"):
        tx.RecursiveCheckpointAdjoint(14).scan(body, 1.0, None, 200)
    tx.RecursiveCheckpointAdjoint(15).scan(body, 1.0, None, 200)


@rows
def test_what_scan_refuses_is_refused(name):
    adjoint, _ = ADJOINTS[name]
    with pytest.raises(TypeError, match="carry"):
        adjoint.scan(lambda u, _: (u[None], u), jnp.ones(2), None, 13)
    with pytest.raises(ValueError, match="length|leading axis"):
        adjoint.scan(lambda u, x: (u, x), jnp.ones(2), jnp.ones(12), 13)
