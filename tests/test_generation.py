"""Generative models of fields against closed forms of Gaussian data."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

C, G = tx.configuration, tx.generation
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
MEAN = jnp.array([[0.7, -0.4, 1.3]])
_ROOT = jnp.array([[1.0, 0.3, -0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 0.35]])
COVARIANCE = _ROOT.T @ _ROOT
VALUES, VECTORS = jnp.linalg.eigh(COVARIANCE)
FINE = jnp.asarray(RNG.normal(0.4, 1.7, (6, 2, 8)))
COARSE = jnp.asarray(RNG.normal(-0.3, 0.9, (6, 1, 4)))
STATIC = jnp.asarray(RNG.normal(0.2, 0.5, (6, 2, 8)))


def _of_eigenvalues(function, x):
    """A matrix function of the covariance, applied to a field (1, 3)."""
    return (VECTORS @ (function(VALUES) * (VECTORS.T @ x[0])))[None]


class Exact(eqx.Module):
    """What an ideal network learns from fields N(MEAN, COVARIANCE) of three points."""

    scales: G.FieldScales = G.FieldScales(1, num_axes=1)
    sigma_data: float = 1.0

    def embed(self, target, condition):
        return self.scales.standard(target, condition)

    def denoise(self, z, sigma, inputs):
        del inputs
        gain = lambda c: c / (c + sigma**2)  # noqa: E731
        return MEAN + _of_eigenvalues(gain, z - MEAN)

    def velocity(self, t, z, inputs):
        del inputs
        # E[z₁ − z₀ | z_t]: Cov(z₁ − z₀, z_t) Cov(z_t)⁻¹.
        gain = lambda c: (t * c - (1 - t)) / (t**2 * c + (1 - t) ** 2)  # noqa: E731
        return MEAN + _of_eigenvalues(gain, z - t * MEAN)


SIGMA_MAX = 20.0


def _edm_map(noise):
    """Where dz/dσ = (z − D) / σ leads: quantiles of Gaussians go into one another."""
    ratio = lambda c: jnp.sqrt(c / (c + SIGMA_MAX**2))  # noqa: E731
    return MEAN + _of_eigenvalues(ratio, SIGMA_MAX * noise - MEAN)


def _flow_map(noise):
    return MEAN + _of_eigenvalues(jnp.sqrt, noise)


# Sampler of so many steps, and the exact map from noise to fields.
SAMPLERS = {
    "edm": (
        lambda n: G.EDMSampler(n, sigma_min=1e-5, sigma_max=SIGMA_MAX, rho=5.0),
        _edm_map,
    ),
    "flow": (G.FlowSampler, _flow_map),
}
samplers = pytest.mark.parametrize("name", SAMPLERS)


@samplers
def test_samplers_solve_their_equation_to_second_order(name):
    make, exact = SAMPLERS[name]
    noise = jnp.array([[0.8, -1.1, 0.5]])
    expected = exact(noise)
    errors = []
    for num_steps in (16, 32, 64):
        found = make(num_steps).carry(Exact(), KEY, noise, jnp.zeros((0, 3)))
        errors.append(float(jnp.max(jnp.abs(found - expected))))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 4e-3 and (orders > 1.7).all() and (orders < 2.5).all(), orders


@samplers
def test_samplers_give_the_mean_and_covariance(name):
    sampler = SAMPLERS[name][0](40)
    carry = lambda n: sampler.carry(Exact(), KEY, n[None], jnp.zeros((0, 3)))[0]  # noqa: E731
    # The map is affine in the noise, so that its derivative is the whole answer.
    matrix = jax.jit(jax.jacfwd(carry))(jnp.zeros(3))
    np.testing.assert_allclose(matrix @ matrix.T, COVARIANCE, atol=0.01)
    shift = carry(jnp.zeros(3))
    # σ_max is not infinite: of the mean a share of c / (c + σ_max²) is not there yet.
    tolerance = 2.0 / SIGMA_MAX if name == "edm" else 1e-2
    np.testing.assert_allclose(shift, MEAN[0], atol=tolerance)


@pytest.mark.slow
def test_churn_keeps_the_distribution_and_needs_its_range():
    plain = G.EDMSampler(80, sigma_min=1e-3, sigma_max=SIGMA_MAX)
    churned = dataclasses.replace(plain, churn=10.0)
    keys = jax.random.split(KEY, 40_000)
    many = lambda s: jax.jit(jax.vmap(lambda k: s(Exact(), k, space=(3,))[0]))(keys)  # noqa: E731
    first, draw, louder = (
        many(s) for s in (plain, churned, dataclasses.replace(churned, churn_noise=1.3))
    )
    np.testing.assert_allclose(draw.mean(axis=0), MEAN[0], atol=0.02)
    np.testing.assert_allclose(np.cov(np.asarray(draw).T), COVARIANCE, atol=0.03)
    assert not np.allclose(draw[0], first[0])
    assert (louder.var(axis=0) > 1.05 * draw.var(axis=0)).all()
    outside = dataclasses.replace(churned, churn_range=(500.0, 600.0))
    np.testing.assert_array_equal(many(outside), first)


def test_noise_levels_are_the_formula():
    sampler = G.EDMSampler(5, sigma_min=0.1, sigma_max=9.0, rho=2.0)
    roots = 3 + np.arange(5) / 4 * (math.sqrt(0.1) - 3)
    np.testing.assert_allclose(sampler.sigmas, [*roots**2, 0.0])
    one = G.EDMSampler(1, sigma_max=2.0)
    found = one.carry(Exact(), KEY, jnp.ones((1, 3)), jnp.zeros((0, 3)))
    expected = Exact().denoise(2.0 * jnp.ones((1, 3)), 2.0, None)
    np.testing.assert_allclose(found, expected)


def _constant(value):
    return lambda field, noise: jnp.full_like(field[:1], value) + 0 * noise


@pytest.mark.parametrize("sigma", [0.01, 0.4, 3.0, 50.0])
def test_preconditioning_of_gaussian_data_is_the_ideal_denoiser(sigma):
    """Of N(0, s²) the ideal network is 0; of another mean it is known, too."""
    s, mean = 0.5, 0.9
    z = jnp.array([[0.3, -1.2, 2.0]])
    plain = G.Denoiser(_constant(0.0), G.FieldScales(1, num_axes=1), s)
    expected = s**2 * z / (s**2 + sigma**2)
    none = jnp.zeros((0, 3))
    np.testing.assert_allclose(plain.denoise(z, sigma, none), expected)

    def ideal(field, noise):
        # From what it is shown, c_in z and ¼ log σ, to (D − c_skip z) / c_out.
        del field
        level = jnp.exp(4 * noise)
        return jnp.full((1, 3), mean) * level / (s * jnp.sqrt(level**2 + s**2))

    moved = G.Denoiser(ideal, G.FieldScales(1, num_axes=1), s)
    expected = (s**2 * z + sigma**2 * mean) / (s**2 + sigma**2)
    np.testing.assert_allclose(moved.denoise(z, sigma, none), expected, rtol=1e-10)


def test_denoising_loss_of_the_ideal_denoiser_is_one():
    """λ s² σ² / (s² + σ²) = 1 at every σ: posterior variance times weight."""
    s = 0.5
    data = s * jax.random.normal(KEY, (20_000, 1, 6))
    model = G.Denoiser(_constant(0.0), G.FieldScales(1, num_axes=1), s)
    for mean, std in ((-3.0, 0.1), (0.0, 0.0), (2.0, 1.0)):
        loss = eqx.filter_jit(C.Denoising(mean, std))(model, data, key=KEY)[0]
        assert abs(loss - 1) < 0.015
    # Any other answer costs its square on top, whatever the noise level.
    other = G.Denoiser(_constant(0.7), G.FieldScales(1, num_axes=1), s)
    assert abs(C.Denoising()(other, data, key=KEY)[0] - 1.49) < 0.02


@pytest.mark.parametrize("sigma", [0.05, 0.7, 6.0])
def test_weight_times_the_square_of_c_out_is_one(sigma):
    """The loss is that of the network's answer, unweighted."""
    s, value = 0.8, 0.3
    batch = FINE[:, :1]
    model = G.Denoiser(_constant(value), G.FieldScales(1, num_axes=1), s)
    loss = C.Denoising(math.log(sigma), 0.0)(model, batch, key=KEY)[0]
    noise = jax.random.normal(jax.random.split(KEY)[1], batch.shape)
    noisy = batch + sigma * noise
    c_out = sigma * s / math.sqrt(sigma**2 + s**2)
    wanted = (batch - s**2 / (sigma**2 + s**2) * noisy) / c_out
    assert np.isclose(loss, jnp.mean((value - wanted) ** 2), rtol=1e-10)


def test_denoising_loss_of_correlated_data_is_the_integral():
    data = MEAN[None] + jax.random.normal(KEY, (30_000, 1, 3)) @ _ROOT
    sigma = 0.6
    loss = eqx.filter_jit(C.Denoising(math.log(sigma), 0.0))(Exact(), data, key=KEY)[0]
    posterior = VALUES * sigma**2 / (VALUES + sigma**2)
    expected = (sigma**2 + 1) / sigma**2 * jnp.mean(posterior)
    assert np.isclose(loss, expected, rtol=0.015)


def test_flow_matching_loss_of_the_exact_velocity_is_the_integral():
    data = MEAN[None] + jax.random.normal(KEY, (60_000, 1, 3)) @ _ROOT
    for exponent in (0.0, 1.0):
        configuration = C.FieldFlowMatching(0.0, exponent)
        loss = eqx.filter_jit(configuration)(Exact(), data, key=KEY)[0]
        t = (np.arange(4000)[:, None] + 0.5) / 4000
        c = np.asarray(VALUES)[None]
        # Var(z₁ − z₀ | z_t) = c + 1 − Cov(z₁ − z₀, z_t)² / Var(z_t).
        left = c + 1 - (t * c - (1 - t)) ** 2 / (t**2 * c + (1 - t) ** 2)
        expected = np.mean((1 + exponent) * t**exponent * left)
        assert np.isclose(loss, expected, rtol=0.02)


def test_flow_matching_of_fields_is_that_of_vectors():
    posterior = tx.amortized.FlowMatchingPosterior(
        tx.amortized.IdentityEncoder(2), 3, width=4, depth=1, key=KEY
    )
    theta, x = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))

    class Same(eqx.Module):
        def embed(self, target, condition):
            return target, condition

        def velocity(self, t, z, inputs):
            return posterior.velocity(t, z[0], inputs[0, :2])[None]

    condition = jnp.pad(jnp.asarray(x), ((0, 0), (0, 1)))[:, None]
    fields = G.Fields(jnp.asarray(theta)[:, None], condition)
    found = C.FieldFlowMatching(0.1, 0.5)(Same(), fields, key=KEY)[0]
    # Noise of (5, 1, 3) and (5, 3) is the same numbers.
    expected = C.FlowMatching(0.1, 0.5)(posterior, (theta, x), key=KEY)[0]
    assert np.isclose(found, expected)


def _unet(in_channels, num_axes=1, **options):
    options = {"hidden_channels": 2, "num_levels": 2} | options
    return G.UNet(in_channels, 2, num_axes=num_axes, key=KEY, **options)


def _filled(*args, **options):
    """A network with other weights, made without compiling its initialisation."""
    rng = np.random.default_rng(5)
    form = eqx.filter_eval_shape(lambda: _unet(*args, **options))
    return jax.tree.map(
        lambda x: (
            jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
            if isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        form,
    )


class Stencil(eqx.Module):
    """A network that compiles in no time."""

    here: jax.Array
    beside: jax.Array
    bent: jax.Array
    loud: jax.Array

    def __init__(self, in_channels, seed):
        rng = np.random.default_rng(seed)
        self.here, self.beside, self.bent = jnp.asarray(
            rng.normal(0, 0.4, (3, 2, in_channels))
        )
        self.loud = jnp.asarray(rng.normal(size=(2, 1)))

    def __call__(self, field, noise):
        moved = jnp.roll(field, 1, axis=-1)
        curve = jnp.tanh(self.bent @ field + noise * self.loud)
        return self.here @ field + self.beside @ moved + curve + self.loud


NETS = Stencil(5, 1), Stencil(3, 2)
FIELDS = G.Fields(FINE, (COARSE, STATIC))


def _models(**options):
    scales = G.FieldScales(2, 3, num_axes=1, **options)
    make = {
        "denoising": (G.Denoiser, NETS[0], C.Denoising()),
        "flow": (G.Velocity, NETS[0], C.FieldFlowMatching()),
        "regression": (G.Regression, NETS[1], C.FieldRegression()),
    }
    return {
        name: (cls(net, scales).standardised(FIELDS), configuration)
        for name, (cls, net, configuration) in make.items()
    }


KINDS = ("denoising", "flow", "regression")


@pytest.mark.parametrize("levels", [1, 3])
def test_a_unet_has_as_many_convolutions_as_it_says(levels):
    net = eqx.filter_eval_shape(lambda: _unet(3, num_levels=levels))
    leaves = jax.tree.leaves(net, is_leaf=lambda x: isinstance(x, eqx.nn.Conv))
    taps = [x.kernel_size for x in leaves if isinstance(x, eqx.nn.Conv)]
    assert taps.count((3,)) == 2 * (2 * levels + 1) + 2
    assert taps.count((1,)) == 2 * levels - 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind):
    model, configuration = _models(residual=False)[kind]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def loss(flat):
        model = eqx.combine(unravel(flat), static)
        return configuration(model, FIELDS, key=KEY)[0]

    direction = jnp.asarray(RNG.normal(size=flat.shape))
    slope = jax.jit(jax.grad(loss))(flat)
    assert jnp.isfinite(slope).all() and (slope != 0).all()
    h = 1e-5
    difference = (loss(flat + h * direction) - loss(flat - h * direction)) / (2 * h)
    assert np.isclose(slope @ direction, difference, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_vmap_and_keys(kind):
    model, configuration = _models()[kind]
    run = eqx.filter_jit(lambda m, b, k: configuration(m, b, key=k)[0])
    loss = run(model, FIELDS, KEY)
    assert loss.shape == () and np.isclose(
        configuration(model, FIELDS, key=KEY)[0], loss
    )
    assert run(model, FIELDS, KEY) == loss
    keys = jax.random.split(KEY, 3)
    members = eqx.filter_vmap(run, in_axes=(None, None, 0))(model, FIELDS, keys)
    single = [run(model, FIELDS, k) for k in keys]
    np.testing.assert_allclose(members, single, rtol=1e-12)
    assert (len({float(x) for x in single}) == 3) == (kind != "regression")
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x,
        (model, FIELDS),
    )
    assert run(*narrow, KEY).dtype == jnp.float32


@samplers
def test_draws_under_jit_and_vmap(name):
    model = _models(residual=False)["denoising" if name == "edm" else "flow"][0]
    sampler = SAMPLERS[name][0](3)
    condition = (COARSE[0], STATIC[0])
    draw = eqx.filter_jit(lambda m, k, c: sampler(m, k, c))
    one = draw(model, KEY, condition)
    assert one.shape == (2, 8) and np.array_equal(one, draw(model, KEY, condition))
    np.testing.assert_allclose(sampler(model, KEY, condition), one, rtol=1e-9)
    keys = jax.random.split(KEY, 4)
    ensemble = jax.jit(
        lambda k: G.generate(model, sampler, k, condition, num_samples=4)
    )(KEY)
    for draws, key in zip(ensemble, keys, strict=True):
        np.testing.assert_allclose(draws, draw(model, key, condition), rtol=1e-8)
    assert np.ptp(np.asarray(ensemble), axis=0).min() > 0
    other = draw(model, KEY, (COARSE[1], STATIC[0]))
    assert not np.allclose(other, one)


@samplers
def test_programs_do_not_grow_with_steps(name):
    make = SAMPLERS[name][0]
    text = [
        len(str(jax.make_jaxpr(lambda k, n=n: make(n)(Exact(), k, space=(3,)))(KEY)))
        for n in (20, 200)
    ]
    assert text[1] < 1.05 * text[0]


def test_scales_are_those_of_the_data_and_never_train():
    scales = G.FieldScales(1, 3, num_axes=1, residual=True)
    target = FINE[:, :1]
    scales = scales.fitted((target, (COARSE, STATIC)))
    raw = np.repeat(np.asarray(COARSE), 2, axis=-1)
    left, right = np.roll(raw, 1, axis=-1), np.roll(raw, -1, axis=-1)
    even = np.arange(8) % 2 == 0
    base = 0.75 * raw + 0.25 * np.where(even, left, right)
    inputs = np.concatenate([base, np.asarray(STATIC)], axis=1)
    rest = np.asarray(target) - base
    z, c = jax.vmap(scales.standard)(target, (COARSE, STATIC))
    np.testing.assert_allclose(z, (rest - rest.mean()) / rest.std(), rtol=1e-9)
    mean = inputs.mean(axis=(0, 2), keepdims=True)
    std = inputs.std(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(c, (inputs - mean) / std, rtol=1e-9, atol=1e-12)
    back = jax.vmap(scales.physical)(z, (COARSE, STATIC))
    np.testing.assert_allclose(back, target, rtol=1e-9)
    assert not jax.tree.leaves(eqx.filter(scales, eqx.is_inexact_array))
    # Without residual, or without condition.
    plain = G.FieldScales(2, num_axes=1).fitted(FINE)
    z, c = jax.vmap(plain.standard, in_axes=(0, None))(FINE, None)
    np.testing.assert_allclose(z.mean(axis=(0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(axis=(0, 2)), 1, rtol=1e-9)
    assert c.shape == (6, 0, 8)


def test_draws_are_in_the_units_of_the_data():
    """A denoiser that knows nothing gives the base and the spread of the data."""
    scales = G.FieldScales(1, 1, num_axes=2, residual=True)
    coarse = jnp.asarray(RNG.normal(50.0, 3.0, (40, 1, 2, 2)))
    base = jax.vmap(lambda c: G.upsample(c, (4, 4)))(coarse)
    rest = jnp.asarray(RNG.normal(2.0, 0.1, base.shape))
    model = G.Denoiser(_constant(0.0), scales).standardised((base + rest, coarse))
    draws = G.generate(
        model, G.EDMSampler(70), KEY, coarse[0], num_samples=4000, space=(4, 4)
    )
    mean = np.asarray(draws.mean(axis=0) - base[0])
    np.testing.assert_allclose(mean, rest.mean(), atol=0.015)
    np.testing.assert_allclose(draws.std(axis=0), rest.std(), rtol=0.06)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 4), (1, 2, 2, 3)])
def test_upsampling_is_linear_between_centres(shape):
    field = jnp.asarray(RNG.normal(size=shape))
    space = tuple(3 * n for n in shape[1:])
    found = G.upsample(field, space, periodic=False)
    expected = jax.image.resize(field, (shape[0], *space), "linear")
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # On a circle no place is special.
    wrapped = G.upsample(field, space)
    moved = G.upsample(jnp.roll(field, 1, axis=1), space)
    np.testing.assert_allclose(moved, jnp.roll(wrapped, 3, axis=1), atol=1e-12)
    inner = tuple(slice(2, -2) for _ in space)
    np.testing.assert_allclose(wrapped[:, *inner], found[:, *inner], atol=1e-12)
    np.testing.assert_allclose(wrapped.mean(), field.mean())
    blocks = jnp.repeat(field, 3, axis=-1)
    for axis in range(1, len(space)):
        blocks = jnp.repeat(blocks, 3, axis=axis)
    np.testing.assert_allclose(G.coarsen(blocks, 3), field)


def test_a_mask_may_be_a_condition():
    mask = jnp.array([[True, False]])
    found = G.FieldScales(1, 1, num_axes=1).inputs(mask, (4,))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, [[0.75, 0.75, 0.25, 0.25]])
    same = G.FieldScales(1, 1, num_axes=1).inputs(jnp.array([[3, 4]]), (2,))
    np.testing.assert_array_equal(same, [[3.0, 4.0]])
    assert same.dtype == jnp.float64


@pytest.mark.parametrize("num_axes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_unet_commutes_with_shifts_and_hears_the_noise(num_axes):
    net = _filled(3, num_axes)
    apply = eqx.filter_jit(lambda net, x, c: net(x, c))
    field = jnp.asarray(RNG.normal(size=(3, *(4,) * num_axes)))
    out = apply(net, field, jnp.array(0.3))
    shifted = apply(net, jnp.roll(field, 2, axis=1), jnp.array(0.3))
    np.testing.assert_allclose(shifted, jnp.roll(out, 2, axis=1), atol=1e-9)
    assert not np.allclose(apply(net, field, jnp.array(-0.9)), out)
    if num_axes == 1:
        border = _filled(3, periodic=False)
        assert not np.allclose(apply(border, field, jnp.array(0.3)), out)


def test_a_unet_begins_at_zero_and_trains_every_weight():
    assert not any(x.any() for x in jax.jit(lambda: jax.tree.leaves(_unet(3).out))())
    model = G.Denoiser(_filled(3), G.FieldScales(2, 1, num_axes=1))
    fields = G.Fields(FINE[:2], COARSE[:2])
    loss = lambda m: C.Denoising()(m, fields, key=KEY)[0]  # noqa: E731
    for leaf in jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(model)):
        assert (leaf != 0).all() and jnp.isfinite(leaf).all()


def test_the_next_step_is_the_pair_of_two_times():
    states = jnp.asarray(RNG.normal(size=(3, 5, 2, 8)))
    net = lambda field, noise: 0.3 * field[:2] - 0.2 * field[2:] + noise  # noqa: E731
    pairs = G.Fields(states[:, 1], states[:, 0])
    scales = G.FieldScales(2, 2, num_axes=1, residual=True).fitted(pairs)
    regression = G.Regression(lambda field, noise: field + noise, scales)
    for model, make in (
        (G.Denoiser(net, scales), C.Denoising),
        (G.Velocity(net, scales), C.FieldFlowMatching),
        (regression, C.FieldRegression),
    ):
        assert make(next_step=True).num_times == 2 and make().num_times == 1
        loss = make(next_step=True)(model, states, key=KEY)[0]
        expected = make()(model, pairs, key=KEY)[0]
        assert np.isclose(loss, expected)
        trainer = tx.trainer.Trainer(
            states, make(next_step=True), optimizer=optax.sgd(1e-3),
            num_training_steps=2, batch_size=4, progress=False,
        )  # fmt: skip
        assert len(trainer.windows) == 12
    generator = G.Generator(G.Denoiser(net, scales), G.EDMSampler(2))
    stepper = tx.Stepper(generator, stochastic=True)
    rollout = tx.rollout(stepper, states[0, 0], 3, key=KEY)
    assert rollout.shape == (3, 2, 8)
    again = tx.rollout(stepper, states[0, 0], 3, key=jax.random.key(8))
    assert not np.allclose(rollout, again)


class Pointwise(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, field, noise):
        rows = jnp.concatenate([field, jnp.full((1, field.shape[1]), noise)])
        return jax.vmap(self.net, in_axes=1, out_axes=1)(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["denoising", "flow"])
def test_a_trained_model_knows_mean_and_spread(kind):
    """u = 1.5 c + (0.5 + 0.3 c²) n at each point: another spread for each condition."""
    c = jax.random.uniform(KEY, (4000, 1, 4), minval=-1.0, maxval=1.0)
    noise = jax.random.normal(jax.random.key(1), c.shape)
    data = G.Fields(1.5 * c + (0.5 + 0.3 * c**2) * noise, c)
    net = Pointwise(eqx.nn.MLP(3, 1, 32, 2, jax.nn.silu, key=KEY))
    scales = G.FieldScales(1, 1, num_axes=1)
    model, configuration, sampler = {
        "denoising": (
            G.Denoiser(net, scales),
            C.Denoising(),
            G.EDMSampler(30, sigma_max=20.0),
        ),
        "flow": (G.Velocity(net, scales), C.FieldFlowMatching(), G.FlowSampler(12)),
    }[kind]
    task = tx.callback.Generation(
        G.Fields(data.target[:200], c[:200]), sampler, every=400, num_samples=4
    )
    trainer = tx.trainer.Trainer(
        tx.data.Samples(data),
        configuration,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 800)),
        num_training_steps=800,
        batch_size=256,
        callbacks=[task],
        progress=False,
    )
    model, history = trainer(model.standardised(data), key=KEY)
    at = jnp.array([[-0.8, -0.2, 0.4, 0.9]])
    draws = jax.jit(lambda k: G.generate(model, sampler, k, at, num_samples=4000))(KEY)
    np.testing.assert_allclose(draws.mean(axis=0), 1.5 * at, atol=0.12)
    np.testing.assert_allclose(draws.std(axis=0), 0.5 + 0.3 * at**2, rtol=0.15)
    scores = history.records["generation"].values["crps"]
    # Of a normal ensemble E CRPS = σ / √π; what it began with knew no condition.
    expected = float(jnp.mean(0.5 + 0.3 * c[:200] ** 2)) / math.sqrt(math.pi)
    assert abs(scores[-1] / expected - 1) < 0.12 and scores[0] > 1.2 * scores[-1]


def _state(model, **options):
    return tx.TrainState.create(model, optax.sgd(1.0), key=KEY, **options)


def test_generation_scores_what_the_sampler_draws():
    model = _models()["denoising"][0]
    sampler = G.EDMSampler(2)
    state = _state(model)
    task = tx.callback.Generation(
        FIELDS, sampler, {"draws": lambda e, r: e}, every=1, num_samples=3, batch_size=4
    )
    found = task(tx.callback.Context(0, state, lambda: None))["draws"]
    keys = jax.random.split(tx.step.stream_key(KEY, "generate", 0), 6)
    one = lambda k, c: G.generate(model, sampler, k, c, num_samples=3, space=(8,))  # noqa: E731
    draws = jax.jit(jax.vmap(one))(keys, FIELDS.condition)
    np.testing.assert_allclose(found, draws, rtol=1e-7)
    heard = []
    polled = tx.callback.Context(0, state, lambda: None, lambda: heard.append(1))
    np.testing.assert_array_equal(task(polled)["draws"], found)
    assert len(heard) == 2
    # Its own metrics.
    metrics = tx.callback.Generation(tx.data.Samples(FIELDS), sampler, every=1).metrics
    assert set(metrics) == {"crps", "spectral_ratio"}
    each = [
        tx.loss.crps_ensemble(d, u) for d, u in zip(draws, FIELDS.target, strict=True)
    ]
    assert np.isclose(metrics["crps"](draws, FINE), np.mean(each))
    assert metrics["spectral_ratio"] is tx.metrics.spectral_ratio


def test_generation_draws_from_an_average():
    state = _state(_models()["denoising"][0], ema=True)
    moved = eqx.tree_at(
        lambda s: s.params, state, jax.tree.map(lambda x: x + 0.2, state.params)
    )
    few = jax.tree.map(lambda x: x[:2], FIELDS)

    def draws(state, **options):
        task = tx.callback.Generation(
            few, G.EDMSampler(1), {"draws": lambda e, r: e}, every=1, num_samples=2,
            **options,
        )  # fmt: skip
        return task(tx.callback.Context(0, state, lambda: None))["draws"]

    kept = draws(moved, use_ema=True)
    np.testing.assert_allclose(kept, draws(state), rtol=1e-9)
    assert not np.allclose(kept, draws(moved))


def test_a_step_of_ones_own():
    model, configuration = _models()["denoising"]
    optimizer = optax.adam(1e-2)
    step = jax.jit(tx.make_train_step(configuration, optimizer, max_grad_norm=1.0))
    state = tx.TrainState.create(model, optimizer, key=KEY)
    losses = []
    for _ in range(25):
        state, info = step(state, FIELDS)
        losses.append(float(info.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    before, after = model.scales, state.model.scales
    assert np.array_equal(before.target_scale.mean.bits, after.target_scale.mean.bits)


def test_ensemble_metrics_are_the_loops():
    members = RNG.normal(size=(3, 4, 2, 8))
    truth = RNG.normal(size=(3, 2, 8))
    power = lambda u: np.asarray(tx.metrics.energy_spectrum(jnp.asarray(u)))  # noqa: E731
    top = np.mean([[power(m) for m in row] for row in members], axis=(0, 1))
    expected = top / np.mean([power(u) for u in truth], axis=0)
    found = tx.metrics.spectral_ratio(jnp.asarray(members), jnp.asarray(truth))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    variance = np.mean(members.var(axis=1, ddof=1))
    error = np.mean((members.mean(axis=1) - truth) ** 2)
    ratio = tx.metrics.spread_error_ratio(jnp.asarray(members), jnp.asarray(truth))
    assert np.isclose(ratio, math.sqrt(1.25 * variance / error))


def test_the_spread_of_a_calibrated_ensemble_is_its_error():
    draws = jax.random.normal(KEY, (4000, 6, 5))
    ratio = tx.metrics.spread_error_ratio(draws[:, 1:], draws[:, 0])
    assert abs(ratio - 1) < 0.02


DENOISER = G.Denoiser(_constant(0.0), G.FieldScales(1, 1, num_axes=1))
VELOCITY = G.Velocity(_constant(0.0), G.FieldScales(1, num_axes=1))
ONE = jnp.ones((2, 1, 8))
BAD = [
    (lambda: G.EDMSampler(0), "`num_steps` to be an integer >= 1, got 0"),
    (
        lambda: G.EDMSampler(sigma_min=2.0, sigma_max=1.0),
        "0 < `sigma_min` < `sigma_max`",
    ),
    (lambda: G.EDMSampler(sigma_min=0.0), "0 < `sigma_min` < `sigma_max`, got 0.0"),
    (lambda: G.EDMSampler(sigma_max=math.inf), "0 < `sigma_min` < `sigma_max`"),
    (lambda: G.EDMSampler(rho=0.0), "`rho` to be a number > 0"),
    (lambda: G.EDMSampler(churn=-1.0), "`churn` >= 0"),
    (lambda: G.EDMSampler(churn_range=(2.0, 1.0)), "`churn_range` that ascends"),
    (lambda: G.EDMSampler(churn_noise=0.0), "`churn_noise`"),
    (lambda: G.FlowSampler(0), "`num_steps` to be an integer >= 1"),
    (lambda: G.FlowSampler(2)(DENOISER, KEY, ONE[0]), "model with `velocity`"),
    (lambda: G.EDMSampler(2)(VELOCITY, KEY, ONE[0]), "model with `denoise`"),
    (lambda: G.EDMSampler(2)(DENOISER, KEY), "points along each axis"),
    (lambda: G.EDMSampler(2)(DENOISER, KEY, space=(8,)), "condition of 1 channels"),
    (lambda: G.EDMSampler(2)(DENOISER, KEY, jnp.ones((2, 8))), "of 1 channels, got 2"),
    (
        lambda: G.EDMSampler(2)(DENOISER, KEY, jnp.ones((1, 3)), space=(8,)),
        r"grid that divides \(8,\), got the shape \(1, 3\)",
    ),
    (lambda: G.EDMSampler(2)(DENOISER, KEY, ONE[0], space=(8, 8)), "`space` of 1 axes"),
    (lambda: G.FlowSampler(2)(VELOCITY, KEY, space=(0,)), "`space` to be an integer"),
    (
        lambda: G.generate(DENOISER, G.EDMSampler(), KEY, ONE[0], num_samples=0),
        "`num_samples`",
    ),
    (lambda: G.generate(DENOISER, "heun", KEY, num_samples=1), "Expected a sampler"),
    (lambda: C.Denoising(math.nan), "finite `log_sigma_mean`"),
    (lambda: C.Denoising(log_sigma_std=-1.0), "`log_sigma_std` >= 0"),
    (lambda: C.Denoising(next_step=1), "`next_step`"),
    (lambda: C.Denoising()(VELOCITY, ONE, key=KEY), "model with `denoise`"),
    (lambda: C.Denoising()(DENOISER, (ONE, ONE)), "Expected a key for Denoising"),
    (lambda: C.Denoising()(DENOISER, ONE, key=KEY), "condition of 1 channels, got 0"),
    (
        lambda: C.Denoising(next_step=True)(DENOISER, ONE[:, None], key=KEY),
        "windows of 2 consecutive times",
    ),
    (
        lambda: C.Denoising(next_step=True)(DENOISER, {"u": ONE}, key=KEY),
        "windows|one array",
    ),
    (
        lambda: C.Denoising(next_step=True)(
            DENOISER, tx.Window(jnp.ones((2, 2, 1, 8)), sample=jnp.ones(2)), key=KEY
        ),
        "trajectories of states alone",
    ),
    (lambda: C.FieldFlowMatching(1.0), r"`sigma` in \[0, 1\)"),
    (lambda: C.FieldFlowMatching(time_exponent=-0.1), "`time_exponent` >= 0"),
    (lambda: C.FieldFlowMatching()(DENOISER, ONE, key=KEY), "model with `velocity`"),
    (lambda: C.FieldFlowMatching()(VELOCITY, ONE), "Expected a key"),
    (lambda: C.FieldRegression("mae"), "`loss` to be callable"),
    (lambda: C.FieldRegression()(DENOISER, (ONE, ONE)), "tx.generation.Regression"),
    (
        lambda: C.FieldRegression()(
            G.Regression(_constant(0.0), G.FieldScales(1, 1, num_axes=1)),
            (jnp.ones((2, 2, 8)), ONE),
        ),
        r"model's shape \(2, 1, 8\)",
    ),
    (
        lambda: G.Fields(jnp.ones((4, 8))),
        "fields .samples, channels, .space. as target",
    ),
    (lambda: G.Fields(jnp.ones((4, 1, 8), int)), "Expected real fields, got int64"),
    (lambda: G.Fields(ONE, jnp.ones((3, 1, 8))), "of 2 samples"),
    (lambda: G.Fields(ONE, jnp.ones((2, 1, 3))), "grid that divides"),
    (lambda: G.Fields(ONE, {"a": ONE, "b": jnp.ones((2, 1))}), r"condition\['b'\]"),
    (
        lambda: G.Fields(ONE.at[1, 0, 3].set(jnp.nan)),
        r"finite fields, got nan at index \(1, 0, 3\) of target",
    ),
    (
        lambda: G.Fields(ONE, ONE.at[0, 0, 2].set(jnp.inf)),
        r"got inf at index \(0, 0, 2\) of condition",
    ),
    (lambda: G.as_fields("fields"), "as target, got str"),
    (lambda: G.Denoiser(None, G.FieldScales(1)), "takes a field and a noise level"),
    (lambda: G.Denoiser(_constant(0.0), None), "`scales` to be FieldScales"),
    (lambda: G.Denoiser(_constant(0.0), G.FieldScales(1), 0.0), "`sigma_data`"),
    (lambda: G.Velocity(_constant(0.0), 1.0), "`scales` to be FieldScales"),
    (lambda: G.Regression(_constant(0.0), G.FieldScales(1)), "scales with a condition"),
    (
        lambda: DENOISER.embed(jnp.ones((2, 8)), ONE[0]),
        "1 channels and 1 axes of space",
    ),
    (
        lambda: G.Denoiser(lambda f, n: f, G.FieldScales(1, 1, num_axes=1)).denoise(
            ONE[0], 1.0, ONE[0]
        ),
        r"return the field's shape \(1, 8\), got \(2, 8\)",
    ),
    (lambda: G.FieldScales(0), "`num_channels`"),
    (lambda: G.FieldScales(2, 1, residual=True), "condition of at least 2 channels"),
    (lambda: G.FieldScales(1, residual=1), "`residual`"),
    (lambda: _filled(3)(jnp.ones((3, 7)), jnp.array(0.0)), "multiples of 2 points"),
    (
        lambda: _filled(3)(jnp.ones((2, 8)), jnp.array(0.0)),
        "field of 3 channels and 1 axes",
    ),
    (lambda: _unet(3, hidden_channels=0), "`hidden_channels`"),
    (lambda: _unet(3, num_levels=0), "`num_levels`"),
    (lambda: G.coarsen(ONE[0], 3), "multiples of 3 points"),
    (lambda: G.coarsen(ONE[0], 0), "`factor`"),
    (lambda: G.upsample(ONE[0], (12,)), "grid that divides"),
    (
        lambda: tx.callback.Generation(FIELDS, None, every=1),
        "Expected a sampler, got None",
    ),
    (
        lambda: tx.callback.Generation(FIELDS, G.EDMSampler(), {}, every=1),
        "functions by name",
    ),
    (
        lambda: tx.callback.Generation(FIELDS, G.EDMSampler(), every=0),
        "`every`",
    ),
    (
        lambda: tx.callback.Generation(FIELDS, G.EDMSampler(), every=1, num_samples=0),
        "`num_samples`",
    ),
    (lambda: tx.callback.Generation(3.0, G.EDMSampler(), every=1), "as target"),
    (
        lambda: tx.metrics.spread_error_ratio(jnp.ones((2, 1, 8)), jnp.ones((2, 8))),
        "at least 2 members",
    ),
    (
        lambda: tx.metrics.spectral_ratio(jnp.ones((2, 3, 1, 8)), jnp.ones((3, 1, 8))),
        "Expected an ensemble and a reference",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_wrong_is_said(number):
    make, match = BAD[number]
    with pytest.raises(ValueError, match=match):
        make()


def test_metrics_refuse_what_is_no_real_array():
    with pytest.raises(TypeError, match="ensemble to be a real floating array"):
        tx.metrics.spectral_ratio([1.0], jnp.ones((1, 1, 4)))


@pytest.mark.parametrize("condition", [jnp.float16, jnp.int32, jnp.float32])
def test_draws_are_of_the_dtype_of_the_weights(condition):
    """In double precision of JAX, a network of single precision, and any condition."""
    net = G.UNet(2, 1, num_axes=1, hidden_channels=4, num_levels=1, key=KEY)
    net = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, net)
    scales = G.FieldScales(1, 1, num_axes=1)
    coarse = jnp.arange(4)[None].astype(condition)
    for sampler, model in (
        (G.EDMSampler(2), G.Denoiser(net, scales)),
        (G.FlowSampler(2), G.Velocity(net, scales)),
    ):
        draw = sampler(model, KEY, coarse, space=(8,))
        assert draw.dtype == jnp.float32 and bool(jnp.isfinite(draw).all())
    single = G.UNet(1, 1, num_axes=1, hidden_channels=4, num_levels=1, key=KEY)
    single = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, single
    )
    assert G.Regression(single, scales)(coarse, space=(8,)).dtype == jnp.float32
    free = G.Denoiser(single, G.FieldScales(1, num_axes=1))
    assert G.EDMSampler(2)(free, KEY, space=(8,)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jnp.ones((3, 2, 8)), "1 channels and 1 axes"),
        (jnp.full((3, 1, 8), jnp.nan), "finite fields"),
        (jnp.ones((3, 1, 8)), "condition of 1 channels to learn"),
    ],
    ids=["channels", "NaN", "no condition"],
)
def test_scales_are_learned_from_data_that_fit(data, message):
    with pytest.raises(ValueError, match=message):
        G.FieldScales(1, 1, num_axes=1).fitted(data)
