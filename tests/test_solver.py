"""4DVarNet against unrolled loops, finite differences and closed forms."""

import functools

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx

S = tx.solver
K = 7
ADJOINTS = {
    "direct": tx.DirectAdjoint(),
    "checkpoint": tx.RecursiveCheckpointAdjoint(),
    "checkpoint, few": tx.RecursiveCheckpointAdjoint(6),
    "k = 1": tx.OneStepAdjoint(),
    "k = 2": tx.KStepAdjoint(2),
    "k = K": tx.KStepAdjoint(K),
}
LIVE = {"k = 1": 1, "k = 2": 2}
rows = pytest.mark.parametrize("name", ADJOINTS)

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _batch():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 6, 3))
    mask = rng.uniform(size=x.shape) < 0.6
    y = np.where(mask, x + 0.1 * rng.normal(size=x.shape), np.nan)
    return tx.Batch1D(jnp.asarray(y), jnp.asarray(mask), jnp.asarray(x))


def _parts():
    keys = jax.random.split(jax.random.key(5))
    # A smooth activation, for finite differences.
    prior = S.BilinAEPrior1D(3, 2, activation=jnp.tanh, key=keys[0])
    return prior, S.ConvLSTMGradMod1D(3, 2, key=keys[1])


def _solver(adjoint, num_steps=K):
    options = {"observation_weight": 0.7, "prior_weight": 1.3, "learn_weights": True}
    return S.FourDVarNet1D(*_parts(), num_steps, solver_adjoint=adjoint, **options)


def _loss(model, batch):
    return S.train_loss_fn(model, batch, prior_weight=0.2)


def _flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(eqx.filter(tree, eqx.is_array))[0])


@functools.cache
def _run(name):
    """States, loss and flat gradient of the parameters."""
    dynamic, static = eqx.partition(_solver(ADJOINTS[name]), eqx.is_array)

    def value(dynamic):
        return _loss(eqx.combine(dynamic, static), _batch())

    states = _jit(lambda d: eqx.combine(d, static)(_batch()))(dynamic)
    loss, gradient = _jit(jax.value_and_grad(value))(dynamic)
    return np.asarray(states), float(loss), _flat(gradient)


class _Unrolled(eqx.Module):
    """The iteration as a Python loop over one sample after another."""

    solver: S.FourDVarNet1D
    live: int

    @property
    def prior(self):
        return self.solver.prior

    def __call__(self, batch):
        return jnp.stack([self._one(batch, i) for i in range(batch.batch_size)])

    def _one(self, batch, i):
        y, mask = jnp.where(batch.mask, batch.input, 0.0)[i], batch.mask[i]
        x = y
        memory = self.solver.modulator.init(x)
        for n in range(K):
            model = self.solver
            if n < K - self.live:
                model = jax.lax.stop_gradient(eqx.filter(model, eqx.is_array))
                model = eqx.combine(model, self.solver)
            if n == K - self.live:
                x, memory = jax.lax.stop_gradient((x, memory))
            gradient = jax.grad(
                lambda x, c=model.cost: (
                    c.observation_weight.value()
                    * jnp.sum(jnp.where(mask, x - y, 0.0) ** 2)
                    + c.prior_weight.value() * jnp.sum((x - c.prior(x)) ** 2)
                )
            )(x)
            step, memory = model.modulator(gradient, x, memory)
            x = x - step
        return x


@functools.cache
def _oracle(live):
    model = _Unrolled(_solver(tx.DirectAdjoint()), live)
    dynamic, static = eqx.partition(model, eqx.is_array)

    def value(dynamic):
        model = eqx.combine(dynamic, static)
        states = model(_batch())
        loss = jnp.mean((states - _batch().target) ** 2)
        own = jax.vmap(model.prior)(states)
        return loss + 0.2 * jnp.mean((states - own) ** 2), states

    (loss, states), gradient = _jit(jax.value_and_grad(value, has_aux=True))(dynamic)
    return np.asarray(states), float(loss), _flat(gradient)


@rows
def test_the_adjoint_does_not_change_the_value(name):
    """Bitwise where one loop runs all steps; to rounding where two loops share them."""
    states, loss, _ = _run(name)
    direct, exact, _ = _run("direct")
    if name not in LIVE:
        np.testing.assert_array_equal(states, direct)
    np.testing.assert_allclose(states, direct, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(loss, exact, rtol=1e-13)


@pytest.mark.parametrize("name", ["direct", "k = 2"])
def test_value_and_gradient_are_those_of_the_unrolled_loop(name):
    states, loss, gradient = _run(name)
    expected = _oracle(LIVE.get(name, K))
    np.testing.assert_allclose(states, expected[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[2], rtol=1e-8, atol=1e-11)


def test_gradient_is_that_of_finite_differences():
    dynamic, static = eqx.partition(_solver(tx.DirectAdjoint()), eqx.is_array)
    flat, unravel = jax.flatten_util.ravel_pytree(dynamic)
    value = _jit(lambda p: _loss(eqx.combine(unravel(p), static), _batch()))
    gradient = _run("direct")[2]
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=flat.shape)
        direction = direction / np.linalg.norm(direction)
        ahead, behind = value(flat + 1e-5 * direction), value(flat - 1e-5 * direction)
        slope = float(ahead - behind) / 2e-5
        np.testing.assert_allclose(slope, gradient @ direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint, few", "k = K"])
def test_exact_adjoints_agree(name):
    exact, gradient = _run("direct")[2], _run(name)[2]
    assert np.linalg.norm(gradient - exact) <= 1e-11 * np.linalg.norm(exact)


def test_more_live_steps_than_there_are_is_direct():
    def trace(adjoint):
        body = lambda x: jnp.sin(x) + 0.1  # noqa: E731
        last = lambda x: tx.adjoint.iterate(adjoint, body, x, 5)  # noqa: E731
        return str(jax.make_jaxpr(jax.value_and_grad(last))(0.3))

    assert trace(tx.KStepAdjoint(9)) == trace(tx.DirectAdjoint())


def test_truncated_gradients_differ_pairwise():
    names = ["k = 1", "k = 2", "direct"]
    gradients = [_run(name)[2] for name in names]
    size = np.linalg.norm(gradients[-1])
    for i, a in enumerate(gradients):
        for b in gradients[:i]:
            assert np.linalg.norm(a - b) > 1e-3 * size


def test_one_step_function_is_the_one_step_adjoint():
    solver, batch = _solver(tx.OneStepAdjoint()), _batch()

    def slope(solve):
        def value(log_weight):
            cost = eqx.tree_at(
                lambda c: c.prior_weight.logarithm, solver.cost, log_weight
            )
            return jnp.sum(solve(batch, cost, solver.modulator, K) ** 2)

        return _jit(jax.grad(value))(solver.cost.prior_weight.logarithm)

    assert slope(S.one_step_solve_4dvarnet_1d) == slope(
        functools.partial(S.solve_4dvarnet_1d, solver_adjoint=tx.KStepAdjoint(1))
    )
    assert slope(S.one_step_solve_4dvarnet_1d) != slope(S.solve_4dvarnet_1d)


def test_2d_is_1d_along_space_and_its_one_step_function_too():
    keys = jax.random.split(jax.random.key(2))
    flat = S.ConvLSTMGradMod1D(3, 2, along="space", padding="periodic", key=keys[1])
    modulator = S.ConvLSTMGradMod2D(
        3, 2, kernel_size=(1, 3), padding="periodic", key=keys[1]
    )
    # One row of points: only the kernel's middle row acts.
    gates = flat.cell.gates.weight[None]
    modulator = eqx.tree_at(
        lambda m: (m.cell.gates.weight, m.out.weight),
        modulator,
        (gates, flat.out.weight[None]),
    )
    y = jax.random.normal(keys[0], (2, 3, 5))
    cost = S.VariationalCost(lambda x: 0.3 * jnp.roll(x, 1, axis=0))
    batch_1d, batch_2d = (
        tx.Batch1D(y, y > 0),
        tx.Batch2D(y[:, :, None], y[:, :, None] > 0),
    )
    line = S.solve_4dvarnet_1d(batch_1d, cost, flat, 4)
    plane = S.solve_4dvarnet_2d(batch_2d, cost, modulator, 4)
    np.testing.assert_allclose(plane[:, :, 0], line, rtol=1e-12, atol=1e-13)
    one = S.one_step_solve_4dvarnet_2d(batch_2d, cost, modulator, 4)
    np.testing.assert_allclose(one, plane, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_derivative_of_a_relaxation(k):
    """x ← x − a (x − p): 1 − (1 − a)^k of the exact 1."""

    def last(p):
        body = lambda x: x - 0.3 * (x - p)  # noqa: E731
        return tx.adjoint.iterate(tx.KStepAdjoint(k), body, 5.0, 80)

    value, slope = jax.value_and_grad(last)(2.0)
    np.testing.assert_allclose(value, 2.0, rtol=1e-10)
    np.testing.assert_allclose(slope, 1 - 0.7**k, rtol=1e-12)


def test_nothing_reaches_the_start_through_a_warm_up():
    body = lambda x: {"u": 0.9 * x["u"], "n": x["n"] + 1}  # noqa: E731

    def last(u, adjoint):
        return tx.adjoint.iterate(adjoint, body, {"u": u, "n": jnp.array(0)}, 5)["u"]

    assert jax.grad(last)(1.0, tx.KStepAdjoint(4)) == 0.0
    np.testing.assert_allclose(jax.grad(last)(1.0, tx.KStepAdjoint(5)), 0.9**5)


def test_what_stands_under_the_mask_is_never_read():
    batch = _batch()

    def run(fill):
        y = jnp.where(batch.mask, batch.input, fill)
        model = _solver(tx.DirectAdjoint(), 2)
        value = lambda m, y: _loss(m, tx.Batch1D(y, batch.mask, batch.target))  # noqa: E731
        return _run_gradient(value, model, y)

    plain, hidden = run(0.0), run(jnp.nan)
    assert np.isfinite(_flat(hidden)).all()
    np.testing.assert_array_equal(_flat(plain), _flat(hidden))
    assert (np.asarray(hidden[1])[~np.asarray(batch.mask)] == 0).all()


def _run_gradient(value, model, y):
    dynamic, static = eqx.partition(model, eqx.is_array)
    gradient = jax.grad(lambda d, y: value(eqx.combine(d, static), y), argnums=(0, 1))
    return _jit(gradient)(dynamic, y)


def test_an_ensemble_of_solvers_under_vmap():
    make = lambda key: S.FourDVarNet1D(  # noqa: E731
        S.BilinAEPrior1D(3, 2, key=key), S.ConvLSTMGradMod1D(3, 2, key=key), 3
    )
    keys = jax.random.split(jax.random.key(0), 2)
    solve = eqx.filter_jit(lambda model: model(_batch()))
    together = eqx.filter_vmap(solve)(eqx.filter_vmap(make)(keys))
    alone = [solve(make(key)) for key in keys]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-10, atol=1e-12)


# Bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _solver(tx.KStepAdjoint(0)), "`k` to be an integer >= 1, got 0"),
        (lambda: _solver("direct"), "Expected an adjoint"),
        (lambda: _solver(tx.DirectAdjoint(), 0), "`num_steps` to be an integer >= 1"),
        (lambda: S.FourDVarNet1D(3, _parts()[1]), "`prior` to be a function"),
        (lambda: S.FourDVarNet1D(_parts()[0], jnp.sin), "to be a gradient modulator"),
        (
            lambda: S.FourDVarNet2D(*_parts(), observation=2),
            "`observation` to be a function",
        ),
        (lambda: _solver(_named("ImplicitAdjoint")), "solve_4dvarnet_1d_fixedpoint"),
        (lambda: _solver(_named("BacksolveAdjoint")), "continuous-time dynamics"),
        (lambda: _solver(_named("SomeAdjoint")), "Expected an adjoint"),
        (
            lambda: S.VariationalCost(jnp.sin, prior_weight=-1.0),
            "`prior_weight` to be a finite number >= 0, or one for each step, got -1.0",
        ),
        (
            lambda: S.VariationalCost(jnp.sin, background_weight=-1.0),
            "`background_weight` to be a finite number >= 0",
        ),
        (
            lambda: S.VariationalCost(
                jnp.sin, prior_weight=[1.0] * 2, background_weight=[1.0] * 3
            ),
            r"as many weights of each kind .* got \[2, 3\]",
        ),
        (
            lambda: S.VariationalCost(jnp.sin).about(jnp.ones(3)),
            "a `background_weight` > 0 before a background",
        ),
        (
            lambda: S.VariationalCost(jnp.sin, learn_weights=1),
            "Expected `learn_weights` to be",
        ),
        (
            lambda: S.VariationalCost(jnp.sin, background_weight=1.0)(
                jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3), bool)
            ),
            r"a background of the shape \[3\] beside `background_weight`, got None",
        ),
        (
            lambda: S.VariationalCost(jnp.sin, background_weight=1.0).about(
                jnp.ones(2)
            )(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3), bool)),
            r"a background of the shape \[3\] beside `background_weight`, got \[2\]",
        ),
        (
            lambda: S.VariationalCost(jnp.sin, prior_weight=0.0, learn_weights=True),
            "`prior_weight` > 0 where it is learned",
        ),
        (lambda: S.GradientDescent(0.0), "`step_size` to be one number > 0"),
        (lambda: S.GradientDescent(float("nan")), "`step_size` to be a finite"),
    ],
)
def test_bad_solvers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_background_is_the_start_unless_it_is_set():
    """Persistence and nothing observed: states end where the background is."""
    cost = S.VariationalCost(
        lambda x: jnp.concatenate([x[:1], x[:-1]]), background_weight=1.0
    )
    y = jnp.ones((2, 3, 1))
    start = jnp.array([1.0, 2.0])[:, None, None] * y
    batch = tx.Batch1D(y, y < 0, initial=start)
    descent = S.GradientDescent(0.2)
    solve = lambda cost: S.solve_4dvarnet_1d(batch, cost, descent, 300)  # noqa: E731
    np.testing.assert_allclose(solve(cost), start, atol=1e-9)
    five = jnp.array([5.0])
    np.testing.assert_allclose(solve(cost.about(five)), 5.0, atol=1e-6)
    fixed = S.solve_4dvarnet_1d_fixedpoint(
        batch, cost.about(five), descent, rtol=1e-9, atol=1e-9, max_steps=1000
    )
    np.testing.assert_allclose(fixed.state, 5.0, atol=1e-6)
    for solve in (S.solve_4dvarnet_1d, S.solve_4dvarnet_1d_fixedpoint):
        with pytest.raises(ValueError, match="`initial` beside `background_weight`"):
            solve(tx.Batch1D(y, y > 0), cost, descent)


def test_no_background_stays_none_where_weights_are_learned():
    for zero in (0, 0.0, np.float32(0), jnp.zeros(())):
        cost = S.VariationalCost(jnp.sin, background_weight=zero, learn_weights=True)
        assert not cost.has_background
        assert len(jax.tree.leaves(eqx.filter(cost, eqx.is_array))) == 2


def _named(name):
    return type(name, (), {})()


def _cost(**options):
    return S.VariationalCost(lambda x: 0.5 * x, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: _solver(tx.DirectAdjoint())(b.input), "to get a Batch1D, got"),
        (
            lambda b: S.solve_4dvarnet_2d(b, _cost(), S.GradientDescent(0.1)),
            "to get a Batch2D, got Batch1D",
        ),
        (
            lambda b: S.solve_4dvarnet_1d(
                b, S.VariationalCost(lambda x: x[1:]), S.GradientDescent(0.1)
            ),
            r"Expected Φ\(x\) to have the shape \[6, 3\], got \[5, 3\]",
        ),
        (
            lambda b: S.solve_4dvarnet_1d(
                b, _cost(observation=lambda x: x[:, :1]), S.GradientDescent(0.1)
            ),
            r"Expected H\(x\) to have the shape \[6, 3\], got \[6, 1\]",
        ),
        (
            lambda b: S.solve_4dvarnet_1d_fixedpoint(b, _cost(), _parts()[1]),
            "without a state, got ConvLSTMGradMod1D",
        ),
        (
            lambda b: S.solve_4dvarnet_1d_fixedpoint(
                b, _cost(), S.GradientDescent(0.1), rtol=0.0
            ),
            "`rtol` to be a number between 0 and 1",
        ),
        (
            lambda b: S.solve_4dvarnet_1d_fixedpoint(
                b, _cost(), S.GradientDescent(0.1), max_steps=0
            ),
            "`max_steps` to be an integer >= 1",
        ),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(_batch())
