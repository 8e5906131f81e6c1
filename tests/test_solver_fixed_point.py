"""Fixed points of the variational cost against closed forms."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import trainax_pk as tx

S = tx.solver

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _linear(rank):
    """A prior and an operator that are matrices, and a batch of two windows."""
    rng = np.random.default_rng(rank)
    shape = (3, 2) if rank == 1 else (2, 2, 2)
    seen = (4, 1) if rank == 1 else (2, 1, 2)
    n, m = int(np.prod(shape)), int(np.prod(seen))
    theta = {
        "prior": jnp.asarray(0.4 * rng.normal(size=(n, n)) / np.sqrt(n)),
        "observe": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(n)),
        "y": jnp.asarray(rng.normal(size=(2, *seen))),
        "log": jnp.asarray([0.3, -0.2]),
    }
    mask = jnp.asarray(rng.uniform(size=(2, *seen)) < 0.8)
    start = jnp.asarray(rng.normal(size=(2, *shape)))
    return theta, mask, start, shape, seen


def _linear_cost(theta, shape, seen):
    def apply(matrix, out):
        return lambda x: (matrix @ x.reshape(-1)).reshape(out)

    cost = S.VariationalCost(
        apply(theta["prior"], shape),
        apply(theta["observe"], seen),
        learn_weights=True,
    )
    return eqx.tree_at(
        lambda c: (c.observation_weight.logarithm, c.prior_weight.logarithm),
        cost,
        (theta["log"][0], theta["log"][1]),
    )


def _closed_form(theta, mask, shape):
    """(w_o HᵀMH + w_p (1 − A)ᵀ(1 − A)) x = w_o HᵀM y, sample by sample."""
    w_o, w_p = jnp.exp(theta["log"])
    residual = jnp.eye(len(theta["prior"])) - theta["prior"]
    out = []
    for y, m in zip(theta["y"], mask, strict=True):
        h = theta["observe"] * m.reshape(-1, 1)
        hessian = w_o * h.T @ h + w_p * residual.T @ residual
        right = w_o * h.T @ jnp.where(m, y, 0.0).reshape(-1)
        out.append(jnp.linalg.solve(hessian, right).reshape(shape))
    return jnp.stack(out)


def test_a_background_moves_the_fixed_point():
    """(M + (1 − A)ᵀ(1 − A) + w_b P_0) x = M y + w_b P_0 x^b, a background a window."""
    theta, _, start, shape, _ = _linear(1)
    rng = np.random.default_rng(7)
    y = jnp.asarray(rng.normal(size=start.shape))
    mask = jnp.asarray(rng.uniform(size=start.shape) < 0.5)
    prior = lambda x: (theta["prior"] @ x.reshape(-1)).reshape(shape)  # noqa: E731
    residual = np.eye(y[0].size) - theta["prior"]
    first = np.diag(np.arange(y[0].size) < shape[1]) * 0.8
    want = [
        np.linalg.solve(
            np.diag(m.reshape(-1)) + residual.T @ residual + first,
            jnp.where(m, y, 0.0).reshape(-1) + first @ x.reshape(-1),
        ).reshape(shape)
        for y, m, x in zip(y, mask, start, strict=True)
    ]
    cost = S.VariationalCost(prior, background_weight=0.8)
    solve = lambda x: S.solve_4dvarnet_1d_fixedpoint(  # noqa: E731
        tx.Batch1D(y, mask, initial=x), cost, S.GradientDescent(0.1),
        rtol=1e-12, atol=1e-12, max_steps=5000,
    )  # fmt: skip
    found = _jit(solve)(start)
    np.testing.assert_allclose(found.state, np.stack(want), atol=1e-9)
    # The background is data, and has a derivative.
    along = jnp.asarray(rng.normal(size=start.shape))
    value = lambda x: jnp.vdot(along, solve(x).state)  # noqa: E731
    slope = _jit(jax.grad(value))(start)
    for i, m in enumerate(mask):
        hessian = np.diag(m.reshape(-1)) + residual.T @ residual + first
        want = first @ np.linalg.solve(hessian, along[i].reshape(-1))
        np.testing.assert_allclose(slope[i].reshape(-1), want, atol=1e-8)


MODULATORS = {
    "descent": lambda: S.GradientDescent(0.1),
    "descent, GMRES": lambda: S.GradientDescent(0.1),
    "network": lambda: S.MLPGradMod(
        3, normalise=False, step_size=0.05, key=jax.random.key(1)
    ),
}


@pytest.mark.parametrize(
    ("rank", "name"),
    [(1, "descent"), (1, "network"), (2, "descent, GMRES"), (2, "network")],
)
def test_fixed_point_and_its_derivative_are_those_of_the_closed_form(rank, name):
    theta, mask, start, shape, seen = _linear(rank)
    solve = {1: S.solve_4dvarnet_1d_fixedpoint, 2: S.solve_4dvarnet_2d_fixedpoint}
    kind = {1: tx.Batch1D, 2: tx.Batch2D}[rank]
    gmres = lx.GMRES(rtol=1e-10, atol=1e-10) if "GMRES" in name else None
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=start.shape))

    def found(theta, start):
        out = solve[rank](
            kind(theta["y"], mask, initial=start),
            _linear_cost(theta, shape, seen),
            MODULATORS[name](),
            rtol=1e-11,
            atol=1e-11,
            linear_solver=gmres,
        )
        return jnp.sum(cotangent * out.state), out

    def exact(theta):
        state = _closed_form(theta, mask, shape)
        return jnp.sum(cotangent * state), state

    value = jax.value_and_grad(found, argnums=(0, 1), has_aux=True)
    (_, out), (slope, from_start) = _jit(value)(theta, start)
    (_, state), expected = jax.value_and_grad(exact, has_aux=True)(theta)
    np.testing.assert_allclose(out.state, state, rtol=1e-8, atol=1e-9)
    assert out.converged.all() and (out.residual < 1e-9).all()
    assert (out.num_steps > 10).all() and out.num_steps.shape == (2,)
    for name, want in expected.items():
        np.testing.assert_allclose(slope[name], want, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(from_start, 0)


def test_tolerances_of_the_linear_solve_are_relative():
    """A cotangent of 1e-12 has the same derivative as one of 1, 1e-12 times as large."""
    theta, mask, start, shape, seen = _linear(1)

    def value(log, scale):
        out = S.solve_4dvarnet_1d_fixedpoint(
            tx.Batch1D(theta["y"], mask, initial=start),
            _linear_cost(theta | {"log": log}, shape, seen),
            S.GradientDescent(0.1),
            rtol=1e-6,
            atol=1e-6,
        )
        return scale * jnp.sum(out.state**2)

    slope = _jit(jax.grad(value))
    small, large = slope(theta["log"], 1e-12), slope(theta["log"], 1.0)
    assert np.linalg.norm(large) > 0.01
    np.testing.assert_allclose(1e12 * small, large, rtol=1e-9)


def test_implicit_memory_does_not_grow_with_the_number_of_steps():
    def temporaries(max_steps):
        def value(w, y):
            out = S.solve_4dvarnet_1d_fixedpoint(
                tx.Batch1D(y, jnp.ones(y.shape, bool)),
                S.VariationalCost(lambda x: w * jnp.roll(x, 1, axis=0)),
                S.GradientDescent(0.1),
                max_steps=max_steps,
            )
            return jnp.sum(out.state**2)

        y = jax.ShapeDtypeStruct((8, 50, 3), jnp.float64)
        compiled = _jit(jax.grad(value)).lower(0.5, y).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) <= 1.05 * temporaries(8)


def test_an_iteration_that_does_not_contract_is_reported():
    """The Hessian is 2 without observations and 2 + 2 w_o with them."""
    y = jnp.ones((2, 4, 1))
    batch = tx.Batch1D(y, y * jnp.array([0, 1])[:, None, None], initial=2 * y)
    cost = S.VariationalCost(lambda x: 0 * x, observation_weight=4.0)
    solve = functools.partial(S.solve_4dvarnet_1d_fixedpoint, batch, cost)
    out = solve(S.GradientDescent(0.3), throw=False)
    assert out.converged.tolist() == [True, False]
    assert out.residual[0] < 1e-5 < 1 < out.residual[1]
    slow = solve(S.GradientDescent(0.01), throw=False, max_steps=5)
    assert slow.converged.tolist() == [False, False]
    assert slow.num_steps.tolist() == [5, 5]
    for step, limit in ((0.3, 10_000), (0.01, 5)):
        with pytest.raises(RuntimeError, match="Expected every sample's iteration"):
            solve(S.GradientDescent(step), max_steps=limit)


def test_observed_nan_at_run_time_is_reported():
    y = jnp.array([[[jnp.nan]], [[1.0]]])
    cost = S.VariationalCost(lambda x: 0 * x)

    @jax.jit
    def solve(y):
        batch = tx.Batch1D(y, jnp.ones(y.shape, bool))
        return S.solve_4dvarnet_1d_fixedpoint(
            batch, cost, S.GradientDescent(0.1), throw=False
        )

    assert solve(y).converged.tolist() == [False, True]


def test_cost_and_its_gradient_in_closed_form():
    theta, mask, start, shape, seen = _linear(1)
    cost = _linear_cost(theta, shape, seen)
    a, h = np.asarray(theta["prior"]), np.asarray(theta["observe"])
    w_o, w_p = np.exp(theta["log"])
    x, m = np.asarray(start[0]).reshape(-1), np.asarray(mask[0]).reshape(-1)
    y = np.asarray(theta["y"][0]).reshape(-1)
    misfit, departure = m * (h @ x - y), x - a @ x
    expected = w_o * misfit @ misfit + w_p * departure @ departure
    slope = 2 * w_o * h.T @ misfit + 2 * w_p * (departure - a.T @ departure)
    args = (start[0], theta["y"][0], mask[0])
    np.testing.assert_allclose(cost(*args), expected, rtol=1e-13)
    np.testing.assert_allclose(cost.gradient(*args).reshape(-1), slope, rtol=1e-12)
