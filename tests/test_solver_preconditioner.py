"""Second-order directions against dense linear algebra, differences and 4D-Var."""

import functools

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import trainax_pk as tx

S = tx.solver
T, N, K = 8, 3, 4
SOLVERS = {"blocks": S.BlockTridiagonal(), "products": lx.CG(rtol=1e-13, atol=1e-13)}
solvers = pytest.mark.parametrize("name", SOLVERS)
OPERATORS = {"identity": None, "mixing": lambda u: jnp.sin(u) + u[:, :1]}

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _stepper(rate=1.0):
    inner = tx.sample_data.make_lorenz_63_stepper(0.02)
    return lambda u: u + rate * (inner(u) - u)


def _window(seed=0):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(3 * rng.normal(size=(T, N))) for _ in range(2))
    mask = jnp.asarray(rng.uniform(size=(T, N)) < 0.5)
    return x, jnp.where(mask, y, jnp.nan), mask


def _cost(operator=None, *, weighted=False, rate=1.0):
    """With weights of times there is a background too."""
    weights = jnp.linspace(0.5, 2.0, T - 1) if weighted else None
    prior = S.DynamicalPrior(
        _stepper(rate), time_weights=weights, offset=1.0, scale=2.0
    )
    cost = S.VariationalCost(
        prior, operator, observation_weight=0.7, prior_weight=3.0,
        background_weight=0.9 if weighted else 0.0,
    )  # fmt: skip
    return cost.about(jnp.arange(1.0, N + 1)) if weighted else cost


def _direction(solver, cost, x, y, mask, damping=0.1):
    newton = S.GaussNewton(damping, linear_solver=solver)
    return newton(cost.gradient(x, y, mask), cost, x, y, mask)


@solvers
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_direction_is_that_of_the_dense_normal_equations(name, operator, weighted):
    cost, window = _cost(OPERATORS[operator], weighted=weighted), _window()

    def residuals(x):
        y = jnp.nan_to_num(window[1])
        seen = x if OPERATORS[operator] is None else OPERATORS[operator](x)
        parts = [
            0.7**0.5 * jnp.where(window[2], seen - y, 0.0),
            3.0**0.5 * (x - cost.prior(x)),
        ]
        if weighted:
            parts.append(0.9**0.5 * (x[0] - jnp.arange(1.0, N + 1)))
        return jnp.concatenate([part.reshape(-1) for part in parts])

    x = window[0]
    matrix = _jit(jax.jacfwd(residuals))(x).reshape(-1, T * N)
    normal = matrix.T @ matrix + 0.1 * np.eye(T * N)
    want = np.linalg.solve(normal, matrix.T @ residuals(x)).reshape(T, N)
    got = _jit(lambda x: _direction(SOLVERS[name], cost, x, *window[1:]))(x)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@solvers
@pytest.mark.parametrize("operator", OPERATORS)
def test_derivative_through_a_direction(name, operator):
    """Of state, model, weights and damping, against central differences."""
    x, y, mask = _window(1)
    rng = np.random.default_rng(2)
    cotangent = jnp.asarray(rng.normal(size=x.shape))

    def value(x, rate, log_weights, log_damping, background):
        where = lambda c: (c.prior_weight, c.background_weight)  # noqa: E731
        cost = eqx.tree_at(
            where,
            _cost(OPERATORS[operator], weighted=True, rate=rate).about(background),
            (S.Weight(1.0, learned=True),) * 2,
        )
        cost = eqx.tree_at(
            lambda c: tuple(weight.logarithm for weight in where(c)),
            cost,
            tuple(log_weights),
        )
        newton = S.GaussNewton(1.0, learned=True, linear_solver=SOLVERS[name])
        newton = eqx.tree_at(lambda p: p.damping.logarithm, newton, log_damping)
        found = newton(cost.gradient(x, y, mask), cost, x, y, mask)
        return jnp.vdot(cotangent, found)

    at = (
        x, jnp.asarray(0.9), jnp.asarray([0.4, -0.3]), jnp.asarray(-1.5),
        jnp.asarray(rng.normal(size=N)),
    )  # fmt: skip
    along = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), at)
    slope = _jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))(*at)
    compiled = _jit(value)
    moved = lambda h: compiled(*(a + h * b for a, b in zip(at, along, strict=True)))  # noqa: E731
    want = (moved(1e-5) - moved(-1e-5)) / 2e-5
    got = sum(jnp.vdot(a, b) for a, b in zip(slope, along, strict=True))
    np.testing.assert_allclose(got, want, rtol=2e-6)


@solvers
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_one_step_solves_a_linear_problem(name, weight):
    """The smoother of a linear model, without damping to speak of."""
    x, y, mask = _window()
    a = jnp.asarray(
        0.4 * np.random.default_rng(3).normal(size=(N, N)) + 0.5 * np.eye(N)
    )
    stepper = lambda u: a @ u  # noqa: E731
    mask = mask.at[0].set(True)
    y = jnp.where(mask, jnp.nan_to_num(y), jnp.nan)
    known = {"background": x[0], "background_cov": 1 / weight} if weight else {}
    found = S.weak_4dvar(
        stepper, y, mask, initial=x, obs_err_cov=0.5, model_err_cov=0.2,
        max_steps=200, **known,
    )  # fmt: skip
    net = S.FourDVarNet1D(
        S.DynamicalPrior(stepper), S.GradientDescent(1.0), 1,
        preconditioner=S.GaussNewton(1e-11, linear_solver=SOLVERS[name]),
        observation_weight=2.0, prior_weight=5.0, background_weight=weight,
    )  # fmt: skip
    got = _jit(lambda b: net(b))(tx.Batch1D(y[None], mask[None], initial=x[None]))[0]
    np.testing.assert_allclose(got, found.state, atol=1e-6)


def test_steps_converge_to_the_minimiser_of_weak_4dvar():
    """Of Lorenz-63, from linear interpolation, where the gradient is 0."""
    truth = tx.sample_data.lorenz_63(1, temporal_horizon=39, key=jax.random.key(0))
    truth = jnp.asarray(np.asarray(truth[0], np.float64))
    noise = np.random.default_rng(0).normal(size=truth.shape)
    mask = jnp.zeros(truth.shape, bool).at[::4].set(True)
    y = jnp.where(mask, truth + 0.5 * noise, jnp.nan)
    stepper = tx.sample_data.make_lorenz_63_stepper()
    start = S.linear_interpolation(y, mask)
    found = S.weak_4dvar(
        stepper, y, mask, initial=start, obs_err_cov=0.25, model_err_cov=0.01
    )
    net = S.FourDVarNet1D(
        S.DynamicalPrior(stepper), S.GradientDescent(1.0), 60,
        preconditioner=S.GaussNewton(0.05, linear_solver=S.BlockTridiagonal()),
        observation_weight=4.0, prior_weight=100.0,
    )  # fmt: skip
    batch = tx.Batch1D(y[None], mask[None], initial=start[None])
    got = _jit(lambda b: net(b))(batch)[0]
    assert bool(found.converged)
    np.testing.assert_allclose(got, found.state, atol=1e-3)
    assert jnp.abs(net.cost.gradient(got, y, mask)).max() < 1e-6


ADJOINTS = {
    "direct": tx.DirectAdjoint(),
    "checkpointed": tx.RecursiveCheckpointAdjoint(),
    "k = K": tx.KStepAdjoint(K),
    "k = 2": tx.KStepAdjoint(2),
    "one-step": tx.OneStepAdjoint(),
}


def _net(adjoint, num_steps=K, weights=(1.0, 3.0, 10.0, 30.0)):
    modulator = S.ConvLSTMGradMod1D(
        N, 4, direct=0.8, normalise="none", key=jax.random.key(1)
    )
    # As after some training: the last layer starts at 0, and would hide the others.
    modulator = eqx.tree_at(
        lambda m: (m.out.weight, m.out.bias),
        modulator,
        replace_fn=lambda x: 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
    )
    return S.FourDVarNet1D(
        S.DynamicalPrior(_stepper(), scale=3.0), modulator, num_steps,
        solver_adjoint=adjoint,
        preconditioner=S.GaussNewton(
            [0.4, 0.3, 0.2, 0.1], learned=True, linear_solver=S.BlockTridiagonal()
        ),
        prior_weight=list(weights), background_weight=0.6, learn_weights=True,
    )  # fmt: skip


def _batch():
    windows = [_window(seed) for seed in (4, 5)]
    x, y, mask = (jnp.stack(parts) for parts in zip(*windows, strict=True))
    return tx.Batch1D(y, mask, x + 0.1, x)


@functools.cache
def _results(name):
    net, batch = _net(ADJOINTS[name]), _batch()
    arrays, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(arrays):
        states = eqx.combine(arrays, static)(batch)
        return jnp.mean((states - batch.target) ** 2), states

    gradient, states = _jit(jax.grad(loss, has_aux=True))(arrays)
    return np.asarray(states), gradient


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoints_change_the_gradient_and_never_the_states(name):
    (states, gradient), (exact_states, exact) = _results(name), _results("direct")
    gradient, exact = (jax.flatten_util.ravel_pytree(g)[0] for g in (gradient, exact))
    # To rounding: these are the states inside the programs of the gradients.
    np.testing.assert_allclose(states, exact_states, rtol=1e-12, atol=1e-12)
    if name in ("checkpointed", "k = K"):
        np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-12)
    elif name != "direct":
        assert np.linalg.norm(gradient - exact) > 1e-3 * np.linalg.norm(exact)


def test_steps_are_those_of_a_loop_with_the_weights_of_each_step():
    """Written out: cost, damping and direction of every step, the direct path."""
    net, batch = _net(tx.DirectAdjoint()), _batch()
    dense = np.asarray(_results("direct")[0])
    plain = eqx.tree_at(lambda m: m.direct, net.modulator, None)
    for i in range(2):
        x, memory = batch.initial[i], net.modulator.init(batch.initial[i])
        y, mask = jnp.nan_to_num(batch.input[i]), batch.mask[i]
        for w, damping in zip(
            (1.0, 3.0, 10.0, 30.0), (0.4, 0.3, 0.2, 0.1), strict=True
        ):
            cost = S.VariationalCost(
                net.prior, prior_weight=w, background_weight=0.6
            ).about(batch.initial[i][0])
            d = _direction(lx.CG(rtol=1e-13, atol=1e-13), cost, x, y, mask, damping)
            step, memory = plain(d, x, memory)
            x = x - (0.8 * d + step)
        np.testing.assert_allclose(dense[i], x, rtol=1e-6, atol=1e-8)


def test_beside_a_direct_path_a_network_starts_at_nothing():
    modulator = S.ConvLSTMGradMod1D(N, 4, direct=0.8, key=jax.random.key(1))
    x = _window()[0]
    step, _ = modulator(2 * x, x, modulator.init(x))
    np.testing.assert_allclose(step, 1.6 * x, rtol=1e-12)


def test_every_weight_is_trained():
    gradient = _results("direct")[1]
    for part in (
        gradient.modulator.cell.gates.bias,
        gradient.modulator.out.weight,
        gradient.cost.prior_weight.logarithm,
        gradient.cost.background_weight.logarithm,
        gradient.preconditioner.damping.logarithm,
        gradient.modulator.direct.logarithm,
    ):
        assert np.all(np.abs(np.asarray(part)) > 1e-9)
    assert gradient.preconditioner.damping.logarithm.shape == (K,)


def test_fields_take_conjugate_gradients():
    """A bilinear prior in 2D: 8 steps reach what 2000 gradients reach."""
    keys = jax.random.split(jax.random.key(0), 2)
    y = jax.random.normal(keys[0], (1, 2, 4, 4))
    batch = tx.Batch2D(y, jnp.ones(y.shape, bool), initial=jnp.zeros_like(y))
    prior = S.BilinAEPrior2D(2, 3, activation=jnp.tanh, key=keys[1])

    def cost_after(**options):
        net = S.FourDVarNet2D(prior, S.GradientDescent(1.0), 8, **options)
        x = _jit(lambda b: net(b))(batch)[0]
        gradient = net.cost.gradient(x, y[0], batch.mask[0])
        return float(net.cost(x, y[0], batch.mask[0])), float(jnp.abs(gradient).max())

    newton = S.GaussNewton(1e-3, linear_solver=lx.CG(rtol=1e-10, atol=1e-10))
    value, slope = cost_after(preconditioner=newton)
    assert slope < 1e-3
    net = S.FourDVarNet2D(prior, S.GradientDescent(0.05), 2000)
    x = _jit(lambda b: net(b))(batch)[0]
    np.testing.assert_allclose(value, net.cost(x, y[0], batch.mask[0]), rtol=1e-4)


@solvers
def test_what_blows_up_is_nan_and_raises_nothing(name):
    """In its own sample alone, states and gradients: trainers decide what to do."""
    x, y, mask = _window()
    starts = jnp.stack([x, 1e200 * x])
    batch = tx.Batch1D(jnp.stack([y, y]), jnp.stack([mask, mask]), initial=starts)

    def loss(scale):
        net = S.FourDVarNet1D(
            S.DynamicalPrior(lambda u: scale * u * (1 + u * u)), S.GradientDescent(1.0), 2,
            preconditioner=S.GaussNewton(0.1, linear_solver=SOLVERS[name]),
        )  # fmt: skip
        states = net(batch)
        return states[0].sum() + states[1].sum(), states

    slope, states = _jit(jax.grad(loss, has_aux=True))(0.1)
    assert np.isfinite(states[0]).all() and not np.isfinite(states[1]).all()
    assert np.isnan(slope)


def test_batches_one_by_one_are_batches_at_once(monkeypatch):
    """What is run on one CPU, and what on several devices as in this process."""
    net, batch = _net(tx.DirectAdjoint()), _batch()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    got = _jit(lambda b: net(b))(batch)
    np.testing.assert_allclose(got, _results("direct")[0], rtol=1e-9, atol=1e-9)


@solvers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_other_precisions_keep_theirs(name, dtype):
    """Beside double-precision weights: that of the states is kept."""
    x, y, mask = _window()
    batch = tx.Batch1D(y[None], mask[None], initial=x[None])
    small = jax.tree.map(lambda a: a if a.dtype == bool else a.astype(dtype), batch)
    net = S.FourDVarNet1D(
        S.DynamicalPrior(_stepper()), S.GradientDescent(1.0), 2,
        preconditioner=S.GaussNewton([0.2, 0.1], linear_solver=SOLVERS[name]),
        prior_weight=[1.0, 2.0], learn_weights=True,
    )  # fmt: skip
    if name == "products":
        net = eqx.tree_at(
            lambda n: n.preconditioner.linear_solver, net, lx.CG(1e-6, 1e-6)
        )
    loss = lambda w, b: (  # noqa: E731
        eqx.tree_at(lambda n: n.cost.prior_weight.logarithm, net, w)(b).sum()
    )
    slope = jax.grad(loss)(net.cost.prior_weight.logarithm, small)
    assert np.isfinite(slope).all()
    got, want = net(small), net(batch)
    assert got.dtype == dtype
    scale = float(jnp.abs(want).max())
    loose = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=loose, atol=loose * scale
    )


@solvers
def test_an_analysis_step_has_the_directions_of_its_solver(name):
    """With unit variances and no background: the solver's own states."""
    x, y, mask = _window()
    net = S.FourDVarNet1D(
        S.DynamicalPrior(_stepper()), S.GradientDescent(1.0), 3,
        preconditioner=S.GaussNewton(0.3, linear_solver=SOLVERS[name]),
        prior_weight=[1.0, 2.0, 4.0],
    )  # fmt: skip
    step = S.as_analysis_step(net)
    got = step(x, y, obs_op=lambda u: u, obs_err_cov=1.0)
    want = net(tx.Batch1D(y[None], mask[None], initial=x[None]))[0]
    np.testing.assert_allclose(getattr(got, "state", got), want, rtol=1e-8, atol=1e-8)


def test_operators_that_mix_times_are_refused_beside_blocks():
    x, y, mask = _window()
    cost = _cost(lambda u: jnp.cumsum(u, axis=0))
    with pytest.raises(RuntimeError, match="acts on each time by itself"):
        jax.block_until_ready(_direction(SOLVERS["blocks"], cost, x, y, mask))
    _direction(SOLVERS["products"], cost, x, y, mask)


class _Mixing(S.DynamicalPrior):
    def __call__(self, x):
        return 0.5 * super().__call__(x) + 0.5 * x[::-1]


def test_strong_damping_is_gradient_descent():
    x, y, mask = _window()
    cost = _cost()
    got = _direction(S.BlockTridiagonal(), cost, x, y, mask, damping=1e9)
    np.testing.assert_allclose(got, cost.gradient(x, y, mask) / 2e9, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.GaussNewton(0.0), "`damping` > 0"),
        (lambda: S.GaussNewton(-1.0), "`damping` to be a finite number"),
        (lambda: S.GaussNewton([0.1, 0.0]), "`damping` > 0"),
        (lambda: S.GaussNewton("much"), "`damping` to be a finite number"),
        (lambda: S.GaussNewton(linear_solver="lu"), "a solver of lineax, got 'lu'"),
        (
            lambda: S.GaussNewton(linear_solver=lx.Normal(S.BlockTridiagonal())),
            "of the normal equations, got lx.Normal",
        ),
        (lambda: _net(tx.DirectAdjoint(), num_steps=5), "num_steps = 5 steps, got 4"),
        (lambda: _net(tx.DirectAdjoint(), weights=(1.0, 2.0)), "4 steps, got 2"),
        (
            lambda: S.VariationalCost(
                S.IdentityPrior(), observation_weight=[1.0], prior_weight=[1.0, 2.0]
            ),
            "as many weights of each kind",
        ),
        (
            lambda: S.FourDVarNet1D(
                S.IdentityPrior(), S.GradientDescent(), preconditioner=lx.CG(1, 1)
            ),
            "`preconditioner` to be a preconditioner",
        ),
        (
            lambda: S.ConvLSTMGradMod1D(3, direct=0.0, key=jax.random.key(0)),
            "`direct` > 0 where it is learned",
        ),
        (lambda: S.GradientDescent([0.1, 0.2]), "`step_size` to be one number > 0"),
        (
            lambda: S.GradientDescent(np.array([0.1, 0.2])),
            "`step_size` to be one number > 0",
        ),
        (lambda: S.Weight([[1.0], [1.0, 2.0]]), "to be a finite number"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("cost", "shape", "message"),
    [
        (
            lambda: S.VariationalCost(S.IdentityPrior()),
            (T, N),
            "a DynamicalPrior beside",
        ),
        (
            lambda: S.VariationalCost(
                S.DynamicalPrior(_stepper()), lambda u: u[:2].sum(0, keepdims=True)
            ),
            (1, N),
            "observations of each of 8 times",
        ),
    ],
)
def test_blocks_without_neighbours_are_refused(cost, shape, message):
    x, y, mask = jnp.ones((T, N)), jnp.ones(shape), jnp.ones(shape, bool)
    with pytest.raises(ValueError, match=message):
        _direction(S.BlockTridiagonal(), cost(), x, y, mask)
