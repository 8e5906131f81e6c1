"""Layers, modulators and priors against hand-written references."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk.solver._layers import Convolution, make_layout

S = tx.solver

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
KEY = jax.random.key(4)


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _moved(modulator):
    """Off the zeros that its last layer starts at."""
    where = lambda m: (m.out.weight, m.out.bias)  # noqa: E731
    return eqx.tree_at(where, modulator, replace_fn=lambda x: x + 0.1)


# One row per modulator: how it is made for N variables, and a state.
MODULATORS = {
    "descent": (lambda: S.GradientDescent(0.3), (6, 3)),
    "descent, learned": (lambda: S.GradientDescent(0.3, learned=True), (6, 3)),
    "network": (lambda: S.MLPGradMod(4, key=KEY), (6, 3)),
    "network, raw": (lambda: S.MLPGradMod(4, normalise=False, key=KEY), (6, 3)),
    "time": (lambda: S.ConvLSTMGradMod1D(3, 2, key=KEY), (6, 3)),
    "time, each": (
        lambda: S.ConvLSTMGradMod1D(3, 2, normalise="each", key=KEY),
        (6, 3),
    ),
    "time, blind": (
        lambda: S.ConvLSTMGradMod1D(3, 2, with_state=False, key=KEY),
        (6, 3),
    ),
    "time, direct": (
        lambda: _moved(
            S.ConvLSTMGradMod1D(3, 2, normalise="none", direct=0.7, key=KEY)
        ),
        (6, 3),
    ),
    "space": (
        lambda: S.ConvLSTMGradMod1D(
            6, 2, along="space", padding="periodic", kernel_size=5, key=KEY
        ),
        (6, 5),
    ),
    "both": (
        lambda: S.ConvLSTMGradMod1D(
            1,
            2,
            along="both",
            padding=("zero", "periodic"),
            kernel_size=(3, 1),
            key=KEY,
        ),
        (6, 3),
    ),
    "time, patches": (lambda: S.ConvLSTMGradMod1D(3, 2, patch=2, key=KEY), (6, 3)),
    "fields": (lambda: S.ConvLSTMGradMod2D(3, 2, key=KEY), (3, 4, 5)),
    "fields, 3D": (
        lambda: S.ConvLSTMGradMod2D(1, 2, along="both", key=KEY),
        (3, 4, 5),
    ),
    "fields, patches": (
        lambda: S.ConvLSTMGradMod2D(3, 2, patch=(2, 3), key=KEY),
        (3, 4, 6),
    ),
}
PRIORS = {
    "identity": (S.IdentityPrior, (6, 3)),
    "dynamics": (lambda: S.DynamicalPrior(tx.sample_data.make_lorenz_63_stepper()), (6, 3)),
    "network of dynamics": (
        lambda: S.DynamicalPrior(eqx.nn.MLP(3, 3, 4, 1, key=KEY), num_steps=2),
        (6, 3),
    ),
    "bilinear, time": (lambda: S.BilinAEPrior1D(3, 2, key=KEY), (6, 3)),
    "bilinear, space": (
        lambda: S.BilinAEPrior1D(6, 2, along="space", padding="periodic", key=KEY),
        (6, 4),
    ),
    "bilinear, both": (
        lambda: S.BilinAEPrior1D(1, 2, along="both", downsample=2, key=KEY),
        (6, 4),
    ),
    "bilinear, fields": (lambda: S.BilinAEPrior2D(3, 2, downsample=2, key=KEY), (3, 4, 6)),
    "code": (lambda: S.ConvAEPrior1D(3, 2, latent_dim=1, key=KEY), (6, 3)),
    "code, fields": (
        lambda: S.ConvAEPrior2D(3, 2, padding=("zero", "periodic"), key=KEY),
        (3, 4, 4),
    ),
    "code, 3D": (lambda: S.ConvAEPrior2D(1, 2, along="both", key=KEY), (2, 4, 4)),
}  # fmt: skip


@functools.cache
def _steps(name):
    """Two calls of a modulator, the second on another gradient."""
    make, shape = MODULATORS[name]
    modulator = make()

    @_jit
    def run(g, h, x):
        first, memory = modulator(g, x, modulator.init(x))
        return first, *modulator(h, x - first, memory)

    return modulator, run, [_data(*shape, seed=i) for i in range(3)]


@pytest.mark.parametrize("name", MODULATORS)
def test_modulators_keep_shape_dtype_and_structure(name):
    modulator, run, (g, h, x) = _steps(name)
    first, second, memory = run(g, h, x)
    assert first.shape == second.shape == x.shape and first.dtype == g.dtype
    assert float(jnp.abs(second).max()) > 0
    start = modulator.init(x)
    assert jax.tree.structure(memory) == jax.tree.structure(start)
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(start), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    low = jax.eval_shape(
        lambda g, x: modulator(g, x, modulator.init(x))[0],
        *(jax.ShapeDtypeStruct(x.shape, jnp.float32),) * 2,
    )
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("name", ["network", "time", "time, each", "both", "fields"])
def test_normalised_steps_do_not_know_the_gradients_scale(name):
    modulator, run, (g, h, x) = _steps(name)
    expected = run(g, h, x)[:2]
    scaled = run(1e-7 * g, 1e-7 * h, x)[:2]
    for a, b in zip(scaled, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    # "first" sees that the second gradient is another size, "each" does not.
    ratio = run(g, 3 * h, x)[1] - expected[1]
    knows = name not in ("network", "time, each")
    assert (float(jnp.abs(ratio).max()) > 1e-4) == knows


def test_descent_steps_along_the_gradient():
    g = _data(6, 3)
    for modulator in (S.GradientDescent(0.3), S.GradientDescent(0.3, learned=True)):
        np.testing.assert_allclose(modulator(g, g, None)[0], 0.3 * g, rtol=1e-12)
    fixed, learned = S.GradientDescent(0.3), S.GradientDescent(0.3, learned=True)
    assert not jax.tree.leaves(fixed) and len(jax.tree.leaves(learned)) == 1


def test_a_network_without_normalisation_stops_where_the_gradient_does():
    modulator = S.MLPGradMod(4, normalise=False, key=KEY)
    x = _data(6, 3)
    assert not modulator(0 * x, x, None)[0].any()
    step = modulator(x, x, None)[0]
    # The factor lies between 0 and 2.
    assert (step * x > 0).all() and (jnp.abs(step) < 0.2 * jnp.abs(x)).all()


def test_scale_of_a_gradient_and_its_derivative():
    g = _data(6, 3)
    np.testing.assert_allclose(S.rms_scale(g), np.sqrt(np.mean(g**2)), rtol=1e-14)
    slope = jax.grad(S.rms_scale)(g)
    np.testing.assert_allclose(slope, g / g.size / S.rms_scale(g), rtol=1e-12)
    tiny = jnp.float32(1e-30) * jnp.ones(4, jnp.float32)
    np.testing.assert_allclose(S.rms_scale(tiny), 1e-30, rtol=1e-6)
    assert float(S.rms_scale(0 * g)) == 1 and not jax.grad(S.rms_scale)(0 * g).any()
    assert np.isnan(S.rms_scale(g.at[0, 0].set(jnp.nan)))


def _numpy_convolution(x, weight, bias, padding):
    kernel, out = weight.shape[:-2], np.zeros((*x.shape[:-1], weight.shape[-1]))
    for point in np.ndindex(*x.shape[:-1]):
        for tap in np.ndindex(*kernel):
            source = [
                p + t - k // 2 for p, t, k in zip(point, tap, kernel, strict=True)
            ]
            inside = True
            for axis, border in enumerate(padding):
                if border == "periodic":
                    source[axis] %= x.shape[axis]
                inside &= 0 <= source[axis] < x.shape[axis]
            if inside:
                out[point] += x[tuple(source)] @ weight[tap]
    return out + bias


@pytest.mark.parametrize(
    ("kernel", "padding"),
    [
        ((5,), ("zero",)),
        ((3,), ("periodic",)),
        ((3, 5), ("zero", "periodic")),
        ((3, 1), ("periodic", "zero")),
        ((3, 1, 3), ("zero", "zero", "periodic")),
    ],
)
def test_convolution_is_the_sum_over_taps(kernel, padding):
    layer = Convolution((2, 3), kernel, padding, key=KEY)
    x = _data(*(5, 6, 4)[: len(kernel)], 2)
    parts = (np.asarray(layer.weight), np.asarray(layer.bias))
    expected = _numpy_convolution(np.asarray(x), *parts, padding)
    np.testing.assert_allclose(jax.jit(layer.__call__)(x), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("along", "patch", "shape"),
    [
        ("time", (4,), (8, 3)),
        ("space", (2,), (3, 6)),
        ("space", (3, 2), (5, 6, 8)),
        ("both", (4, 1), (8, 5)),
        ("both", (2, 3), (8, 6)),
        ("both", (2, 1, 3), (4, 5, 6)),
    ],
)
def test_patches_are_points_and_come_back(along, patch, shape):
    channels = {"time": shape[-1], "space": shape[0], "both": 1}[along]
    layout = make_layout(along, len(shape), channels, patch)
    fine = make_layout(along, len(shape), channels)
    x = _data(*shape)
    points, singles = layout.points(x), np.asarray(fine.points(x))
    assert layout.widening == np.prod(patch)
    for where in np.ndindex(*points.shape[:-1]):
        block = [
            singles[
                tuple(p * w + o for p, w, o in zip(patch, where, offset, strict=True))
            ]
            for offset in np.ndindex(*patch)
        ]
        np.testing.assert_array_equal(points[where], np.concatenate(block))
    np.testing.assert_array_equal(layout.state(points), x)


def test_a_step_with_patches_is_that_of_the_folded_window():
    modulator = S.ConvLSTMGradMod1D(3, 4, patch=2, key=KEY)
    folded = S.ConvLSTMGradMod1D(6, 4, key=KEY)
    x, g = _data(8, 3), _data(8, 3, seed=1)
    step, memory = modulator(g, x, modulator.init(x))
    wide = x.reshape(4, 6)
    expected, other = folded(g.reshape(4, 6), wide, folded.init(wide))
    np.testing.assert_allclose(step, expected.reshape(8, 3), rtol=1e-12)
    np.testing.assert_allclose(memory.cell, other.cell, rtol=1e-12)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_cell_is_the_one_written_by_hand():
    cell = S.ConvLSTMCell(2, 3, (3,), ("periodic",), key=KEY)
    x, h, c = _data(5, 2), _data(5, 3, seed=1), _data(5, 3, seed=2)
    weight, bias = np.asarray(cell.gates.weight), np.asarray(cell.gates.bias)
    gates = np.zeros((5, 12))
    joined = np.concatenate([x, h], axis=1)
    for p in range(5):
        for t in range(3):
            gates[p] += joined[(p + t - 1) % 5] @ weight[t]
    i, f, o, q = np.split(gates + bias, 4, axis=1)
    new = _sigmoid(f) * np.asarray(c) + _sigmoid(i) * np.tanh(q)
    hidden, memory = cell(x, h, c)
    np.testing.assert_allclose(memory, new, rtol=1e-12)
    np.testing.assert_allclose(hidden, _sigmoid(o) * np.tanh(new), rtol=1e-12)


def test_modulator_is_its_cell_between_scale_and_map():
    modulator, run, (g, h, x) = _steps("time")
    first, second, memory = run(g, h, x)
    scale = np.sqrt(np.mean(g**2))
    hidden = cell = jnp.zeros((6, 2))
    state = x
    for gradient, step in ((g, first), (h, second)):
        seen = jnp.concatenate([gradient / scale, state], axis=-1)
        hidden, cell = modulator.cell(seen, hidden, cell)
        expected = hidden @ modulator.out.weight[0] + modulator.out.bias[None]
        np.testing.assert_allclose(step, expected, rtol=1e-11, atol=1e-13)
        state = state - step
    np.testing.assert_allclose(memory.cell, cell, rtol=1e-11)
    np.testing.assert_allclose(memory.scale, scale, rtol=1e-13)


RINGS = {
    "modulator, patches": (
        lambda padding: S.ConvLSTMGradMod1D(
            4, 2, along="space", padding=padding, patch=2, key=KEY
        ),
        -1,
        (4, 6),
    ),
    "modulator, space": (
        lambda padding: S.ConvLSTMGradMod1D(
            4, 2, along="space", padding=padding, key=KEY
        ),
        -1,
        (4, 7),
    ),
    "modulator, ring of a plane": (
        lambda padding: S.ConvLSTMGradMod1D(
            1, 2, along="both", padding=("zero", padding), key=KEY
        ),
        -1,
        (4, 7),
    ),
    "modulator, fields": (
        lambda padding: S.ConvLSTMGradMod2D(3, 2, padding=(padding, "zero"), key=KEY),
        1,
        (3, 5, 4),
    ),
    "prior, time": (
        lambda padding: S.BilinAEPrior1D(3, 2, padding=padding, key=KEY),
        0,
        (7, 3),
    ),
    "prior, fields": (
        lambda padding: S.ConvAEPrior2D(
            2, 2, padding=("zero", padding), downsample=1, key=KEY
        ),
        2,
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("name", RINGS)
def test_periodic_axes_have_no_beginning_and_zero_borders_have(name):
    make, axis, shape = RINGS[name]

    @eqx.filter_jit
    def apply(part, x):
        if isinstance(part, S.AbstractGradMod):
            return part(jnp.sin(x), x, part.init(x))[0]
        return part(x)

    x = _data(*shape)
    for padding, equivariant in (("periodic", True), ("zero", False)):
        part = make(padding)
        rolled = apply(part, jnp.roll(x, 2, axis))
        gap = float(jnp.abs(rolled - jnp.roll(apply(part, x), 2, axis)).max())
        assert (gap < 1e-12) == equivariant
        # The other axis of points has a border in both cases.
        if isinstance(part, S.ConvLSTMGradMod2D | S.ConvAEPrior2D):
            other = 3 - axis
            rolled = apply(part, jnp.roll(x, 2, other))
            assert (
                float(jnp.abs(rolled - jnp.roll(apply(part, x), 2, other)).max()) > 1e-6
            )


@pytest.mark.parametrize("name", PRIORS)
def test_priors_keep_shape_and_dtype(name):
    make, shape = PRIORS[name]
    prior, x = make(), _data(*shape)
    out = jax.eval_shape(prior, x)
    assert out.shape == x.shape and out.dtype == x.dtype
    low = jax.eval_shape(prior, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert low.shape == shape and (low.dtype == jnp.float32 or jax.tree.leaves(prior))


@pytest.mark.parametrize("name", ["dynamics", "bilinear, fields", "code"])
def test_costs_of_priors_are_twice_differentiable(name):
    make, shape = PRIORS[name]
    prior, x = make(), _data(*shape)
    cost = lambda x: jnp.sum((x - prior(x)) ** 2)  # noqa: E731
    v = _data(*shape, seed=1)
    slope, bend = _jit(lambda x: jax.jvp(jax.grad(cost), (x,), (v,)))(x)
    ahead, behind = _jit(jax.vmap(cost))(jnp.stack([x + 1e-5 * v, x - 1e-5 * v]))
    np.testing.assert_allclose(
        (ahead - behind) / 2e-5, jnp.sum(slope * v), rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(bend).all()


@pytest.mark.parametrize("name", ["bilinear, time", "bilinear, fields", "code, fields"])
def test_weights_do_not_depend_on_the_size_of_the_field(name):
    make, shape = PRIORS[name]
    prior = make()
    larger = (20, 3) if len(shape) == 2 else (3, 12, 10)
    out = jax.eval_shape(prior, jax.ShapeDtypeStruct(larger, float))
    assert out.shape == larger
    # In the interior of a larger field stands what stands in a smaller one.
    if name == "bilinear, time":
        x = _data(*larger)
        np.testing.assert_allclose(prior(x)[6:12], prior(x[3:15])[3:9], rtol=1e-12)


def test_pooling_averages_blocks_and_repeats_them():
    prior = S.BilinAEPrior1D(2, 2, downsample=3, kernel_size=1, key=KEY)
    fine = S.BilinAEPrior1D(2, 2, kernel_size=1, key=KEY)
    x = _data(6, 2)
    means = x.reshape(2, 3, 2).mean(axis=1)
    np.testing.assert_allclose(prior(x), np.repeat(fine(means), 3, axis=0), rtol=1e-12)


def test_dynamical_prior_costs_what_weak_constraint_4d_var_does():
    stepper = tx.sample_data.make_lorenz_63_stepper()
    offset, scale = jnp.array([0.1, -0.2, 23.0]), jnp.array([8.0, 9.0, 8.5])
    weights = np.array([0.5, 2.0, 0.0, 1.5])
    prior = S.DynamicalPrior(
        stepper, num_steps=2, time_weights=weights, offset=offset, scale=scale
    )
    z = _data(5, 3)
    expected = 0.0
    for t in range(4):
        ahead = stepper(stepper(offset + scale * z[t]))
        error = z[t + 1] - (ahead - offset) / scale
        expected += weights[t] * float(error @ error)
    np.testing.assert_allclose(jnp.sum((z - prior(z)) ** 2), expected, rtol=1e-12)
    model = S.VariationalCost(prior)
    slope = eqx.filter_grad(lambda m: m(z, z, jnp.ones(z.shape, bool)))(model)
    assert all(not leaf.any() for leaf in jax.tree.leaves(slope))


def test_trajectories_cost_a_dynamical_prior_nothing():
    truth = tx.sample_data.lorenz_96(1, num_dofs=6, temporal_horizon=5, key=KEY)[0]
    stepper = tx.sample_data.make_lorenz_96_stepper(6)
    np.testing.assert_allclose(S.DynamicalPrior(stepper)(truth), truth, rtol=1e-10)
