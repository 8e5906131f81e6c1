"""Sample data against trainax, closed forms, numpy and orders of convergence."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax
from trainax import sample_data as theirs

from trainax_pk import sample_data as sd
from trainax_pk.sample_data._initial import RandomFourier

pytestmark = pytest.mark.slow

KEY = jax.random.key(7)

# Name: generator, small settings, shape of a state, constructor of its stepper, the
# settings that the constructor shares.
CASES = {
    "advection": (
        sd.advection_1d_periodic,
        {"num_points": 17, "cfl": 0.6, "highest_init_mode": 4},
        (1, 17),
        sd.make_advection_1d_stepper,
        ["num_points", "cfl"],
    ),
    "lorenz_63": (
        sd.lorenz_63,
        {"dt": 0.02, "num_warmup_steps": 3, "rho": 26.0},
        (3,),
        sd.make_lorenz_63_stepper,
        ["dt", "rho"],
    ),
    "lorenz_96": (
        sd.lorenz_96,
        {"num_dofs": 6, "dt": 0.04, "num_warmup_steps": 3, "forcing": 7.0},
        (6,),
        sd.make_lorenz_96_stepper,
        ["num_dofs", "dt", "forcing"],
    ),
    "burgers": (
        sd.burgers_1d,
        {"num_points": 20, "num_substeps": 2, "diffusivity": 0.2},
        (1, 20),
        sd.make_burgers_1d_stepper,
        ["num_points", "num_substeps", "diffusivity"],
    ),
    "kuramoto_sivashinsky": (
        sd.kuramoto_sivashinsky_1d,
        {"num_points": 48, "domain_extent": 22.0, "num_warmup_steps": 4},
        (1, 48),
        sd.make_kuramoto_sivashinsky_1d_stepper,
        ["num_points", "domain_extent"],
    ),
    "advection_diffusion": (
        sd.advection_diffusion_2d,
        {"num_points": 12, "velocity": (0.3, -1.1), "diffusivity": 0.02},
        (1, 12, 12),
        sd.make_advection_diffusion_2d_stepper,
        ["num_points", "velocity", "diffusivity"],
    ),
    "kolmogorov": (
        sd.kolmogorov_flow_2d,
        {"num_points": 14, "num_warmup_steps": 2, "injection_mode": 2},
        (1, 14, 14),
        sd.make_kolmogorov_flow_2d_stepper,
        ["num_points", "injection_mode"],
    ),
}


@eqx.filter_jit
def _run(step, state, num_steps):
    return jax.lax.fori_loop(0, num_steps, lambda _, u: step(u), state)


def _num_compiles(fn):
    events = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(fn())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(events)


@pytest.mark.parametrize("name", CASES)
def test_generator(name):
    generator, settings, state_shape, make, shared = CASES[name]
    settings = settings | {"num_samples": 3, "temporal_horizon": 4}
    data = generator(key=KEY, **settings)
    assert data.shape == (3, 4, *state_shape)
    assert data.dtype == jnp.float64
    assert jnp.all(jnp.isfinite(data))
    # The stepper of the same settings is the one that made the data.
    step = jax.vmap(make(**{k: settings[k] for k in shared}))
    for t in range(3):
        np.testing.assert_allclose(step(data[:, t]), data[:, t + 1], rtol=1e-10)
    # Samples differ, keys differ, and the same key gives the same data.
    assert not np.allclose(data[0], data[1])
    assert not np.allclose(data, generator(key=jax.random.key(8), **settings))
    np.testing.assert_array_equal(data, generator(key=KEY, **settings))
    # The program is kept: another key compiles nothing at all.
    key = jax.random.key(9)
    assert _num_compiles(lambda: generator(key=key, **settings)) == 0


def test_another_shape_compiles():
    # That the count above can be other than zero.
    settings = {"num_dofs": 5, "temporal_horizon": 2, "num_warmup_steps": 1}
    assert _num_compiles(lambda: sd.lorenz_96(3, key=KEY, **settings)) > 0


def test_generator_under_jit():
    generator, settings, *_ = CASES["burgers"]
    settings = settings | {"num_samples": 3, "temporal_horizon": 4}
    under_jit = jax.jit(lambda key: generator(key=key, **settings))(KEY)
    data = generator(key=KEY, **settings)
    np.testing.assert_allclose(under_jit, data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["lorenz_96", "kuramoto_sivashinsky"])
def test_warm_up_is_the_dropped_beginning(name):
    generator, settings, *_ = CASES[name]
    settings = settings | {"num_samples": 2}
    late = generator(**settings | {"num_warmup_steps": 5}, temporal_horizon=3, key=KEY)
    whole = generator(**settings | {"num_warmup_steps": 0}, temporal_horizon=8, key=KEY)
    np.testing.assert_allclose(late, whole[:, 5:], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["advection", "lorenz_63", "burgers"])
def test_stepper_is_a_pytree_with_a_gradient(name):
    generator, settings, shape, make, shared = CASES[name]
    step = make(**{k: settings[k] for k in shared})
    u = generator(num_samples=1, temporal_horizon=1, key=KEY, **settings)[0, 0]
    assert u.shape == shape
    direction = jax.random.normal(jax.random.key(3), shape)
    weights = jax.random.normal(jax.random.key(4), shape)
    loss = eqx.filter_jit(lambda s, v: jnp.sum(weights * s(v)))
    slope = jnp.sum(direction * jax.grad(lambda v: loss(step, v))(u))
    h = 1e-5
    difference = loss(step, u + h * direction) - loss(step, u - h * direction)
    np.testing.assert_allclose(slope, difference / (2 * h), rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "peer", "settings"),
    [
        (
            sd.advection_1d_periodic,
            theirs.advection_1d_periodic,
            {
                "num_points": 47,
                "num_samples": 3,
                "cfl": -1.3,
                "highest_init_mode": 9,
                "temporal_horizon": 11,
            },
        ),
        (
            sd.lorenz_rk4,
            theirs.lorenz_rk4,
            {
                "num_samples": 3,
                "dt": 0.02,
                "temporal_horizon": 70,
                "num_warmup_steps": 30,
                "sigma": 9.0,
                "rho": 25.0,
                "beta": 2.0,
                "init_std": 2.0,
            },
        ),
    ],
)
def test_trainax_data_come_back(ours, peer, settings):
    key = jax.random.PRNGKey(11)
    expected = peer(key=key, **settings)
    np.testing.assert_allclose(ours(key=key, **settings), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        (sd.advection_1d_periodic, theirs.advection_1d_periodic),
        (sd.lorenz_rk4, theirs.lorenz_rk4),
    ],
)
def test_trainax_data_come_back_in_single_precision(ours, peer):
    # The Lorenz system blows a difference in the last bit up to 1e-2 over this horizon.
    with jax.enable_x64(False):
        key = jax.random.key(3)
        data, expected = ours(key=key), peer(key=key)
    assert data.dtype == jnp.float32
    np.testing.assert_allclose(data, expected, atol=1e-6)


def test_signatures_are_those_of_trainax():
    for name in ("advection_1d_periodic", "lorenz_rk4", "make_lorenz_stepper_rk4"):
        ours, peer = getattr(sd, name), getattr(trainax.sample_data, name, None)
        peer = peer or getattr(trainax._sample_data, name)
        describe = lambda fn: [  # noqa: E731
            (p.name, p.kind, p.default)
            for p in inspect.signature(fn).parameters.values()
        ]
        assert describe(ours) == describe(peer)


def test_advection_shifts():
    data = sd.advection_1d_periodic(31, 3, cfl=0.75, temporal_horizon=9, key=KEY)
    for t in (4, 8):
        shifted = np.roll(data[:, 0], 3 * t // 4, axis=-1)
        np.testing.assert_allclose(data[:, t], shifted, atol=1e-12)


def test_lorenz_step_is_the_published_one():
    # Lorenz (1963), rhs at (1, 2, 3): (10, 23, -6); Taylor to second order in dt.
    u = np.array([1.0, 2.0, 3.0])
    rate = np.array([10.0, 23.0, -6.0])
    jacobian = np.array([[-10, 10, 0], [28 - 3, -1, -1], [2, 1, -8 / 3]])
    dt = 1e-4
    expected = u + dt * rate + dt**2 / 2 * jacobian @ rate
    step = sd.make_lorenz_63_stepper(dt)
    np.testing.assert_allclose(step(jnp.asarray(u)), expected, atol=1e-8)


def test_lorenz_96_is_the_loop():
    rng = np.random.default_rng(0)
    u = rng.normal(2.0, 3.0, 7)
    rate = np.array(
        [(u[(i + 1) % 7] - u[i - 2]) * u[i - 1] - u[i] + 6.5 for i in range(7)]
    )
    dt = 1e-6
    step = sd.make_lorenz_96_stepper(7, dt=dt, forcing=6.5)
    np.testing.assert_allclose((step(jnp.asarray(u)) - u) / dt, rate, rtol=1e-3)


def test_lorenz_96_of_a_uniform_state_decays_to_the_forcing():
    # u' = F - u: one step multiplies the distance by the Taylor polynomial of exp(-dt).
    dt = 0.1
    factor = sum((-dt) ** k / f for k, f in enumerate([1, 1, 2, 6, 24]))
    step = sd.make_lorenz_96_stepper(5, dt=dt, forcing=3.0)
    np.testing.assert_allclose(step(jnp.full(5, 5.0)), 3.0 + 2.0 * factor, rtol=1e-14)


def _order(make, state, final_time, num_steps):
    """Observed order from errors against a solution with steps eight times shorter."""

    def solve(n):
        return _run(make(final_time / n), state, n)

    exact = solve(8 * num_steps)
    errors = [jnp.max(jnp.abs(solve(k * num_steps) - exact)) for k in (1, 2)]
    return jnp.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("make", "state", "final_time", "num_steps"),
    [
        (sd.make_lorenz_63_stepper, jnp.array([1.0, 3.0, 20.0]), 0.4, 40),
        (
            lambda dt: sd.make_lorenz_96_stepper(6, dt=dt),
            jnp.array([1.0, 3.0, -2.0, 5.0, 8.0, 0.5]),
            0.4,
            16,
        ),
        (
            # A coarse grid: stiffer linear terms show the order at shorter steps only.
            lambda dt: sd.make_kuramoto_sivashinsky_1d_stepper(
                48, domain_extent=60.0, dt=dt
            ),
            RandomFourier(1, 48, 3, 0.5)(KEY, 1)[0],
            4.0,
            16,
        ),
        (
            lambda dt: sd.make_burgers_1d_stepper(64, dt=dt, diffusivity=0.2),
            RandomFourier(1, 64, 2, 0.6)(KEY, 1)[0],
            1.0,
            16,
        ),
        (
            lambda dt: sd.make_kolmogorov_flow_2d_stepper(
                20, dt=dt, injection_mode=2, num_substeps=1, diffusivity=0.05
            ),
            RandomFourier(2, 20, 3, 1.5)(KEY, 1)[0],
            1.0,
            16,
        ),
    ],
    ids=["lorenz_63", "lorenz_96", "kuramoto_sivashinsky", "burgers", "kolmogorov"],
)
def test_time_stepping_is_of_order_four(make, state, final_time, num_steps):
    assert 3.7 < _order(make, state, final_time, num_steps) < 4.4


def test_burgers_is_cole_hopf():
    # u = -2 nu phi_x / phi with phi a positive solution of the heat equation.
    extent, nu, dt, num_steps = 3.0, 0.08, 0.02, 25
    x = extent * np.arange(96) / 96
    k = 2 * np.pi / extent

    def solution(t):
        modes = [(1, 1.1, 0.3), (2, -0.5, 1.0), (3, 0.2, -0.4)]
        phi, phi_x = 2.0, 0.0
        for m, a, shift in modes:
            decay = a * np.exp(-nu * (m * k) ** 2 * t)
            phi = phi + decay * np.cos(m * k * x + shift)
            phi_x = phi_x - m * k * decay * np.sin(m * k * x + shift)
        return -2 * nu * phi_x / phi

    step = sd.make_burgers_1d_stepper(96, domain_extent=extent, dt=dt, diffusivity=nu)
    u = jnp.asarray(solution(0.0))[None]
    u = _run(step, u, num_steps)
    exact = solution(dt * num_steps)
    assert np.max(np.abs(exact - solution(0.0))) > 0.1
    np.testing.assert_allclose(u[0], exact, atol=2e-8)


def test_substeps_are_shorter_steps():
    u = RandomFourier(1, 32, 3, 0.5)(KEY, 1)[0]
    coarse = sd.make_burgers_1d_stepper(32, dt=0.3, num_substeps=3)
    fine = sd.make_burgers_1d_stepper(32, dt=0.1)
    np.testing.assert_allclose(coarse(u), fine(fine(fine(u))), rtol=1e-12)


@pytest.mark.parametrize("mode", [1, 2, 5])
def test_kuramoto_sivashinsky_grows_linearly(mode):
    extent, dt, num_steps, size = 22.0, 0.25, 8, 1e-7
    x = extent * np.arange(48) / 48
    q = 2 * np.pi * mode / extent
    step = sd.make_kuramoto_sivashinsky_1d_stepper(48, domain_extent=extent, dt=dt)
    wave = np.cos(q * x + 0.4)
    u = size * jnp.asarray(wave)[None]
    u = _run(step, u, num_steps)
    growth = np.exp((q**2 - q**4) * dt * num_steps)
    np.testing.assert_allclose(u[0], size * growth * wave, atol=1e-6 * size * growth)


def test_kuramoto_sivashinsky_reaches_its_attractor():
    settings = {"num_samples": 4, "temporal_horizon": 200, "key": KEY}
    weak = sd.kuramoto_sivashinsky_1d(96, init_std=0.3, **settings)
    strong = sd.kuramoto_sivashinsky_1d(96, init_std=3.0, **settings)
    np.testing.assert_allclose(jnp.mean(weak, axis=-1), 0.0, atol=1e-10)
    # Measured with 20 samples over 2000 steps: 1.3.
    assert 1.15 < jnp.std(weak) < 1.45
    assert 1.15 < jnp.std(strong) < 1.45


def test_advection_diffusion_is_the_fourier_solution():
    extent, dt, velocity, nu = 2.0, 0.07, (0.8, -0.3), 0.015
    x = extent * np.arange(12) / 12
    k = 2 * np.pi / extent
    xx, yy = np.meshgrid(x, x, indexing="ij")

    def solution(t):
        u = 0.6
        for a, m, n, shift in [(1.0, 1, 2, 0.3), (-0.7, 3, 0, 1.2), (0.4, 2, -3, 0.0)]:
            phase = m * k * (xx - velocity[0] * t) + n * k * (yy - velocity[1] * t)
            decay = np.exp(-nu * k**2 * (m**2 + n**2) * t)
            u = u + a * decay * np.cos(phase + shift)
        return u

    step = sd.make_advection_diffusion_2d_stepper(
        12, domain_extent=extent, dt=dt, velocity=velocity, diffusivity=nu
    )
    u = jnp.asarray(solution(0.0))[None]
    u = _run(step, u, 6)
    np.testing.assert_allclose(u[0], solution(6 * dt), atol=1e-13)


def test_kolmogorov_without_force_is_taylor_green():
    # cos(ax) cos(ay) is advected by its own flow without change: it only decays.
    extent, nu, drag, dt = 3.0, 0.03, -0.2, 0.1
    x = extent * np.arange(16) / 16
    k = 2 * np.pi / extent
    vortices = np.cos(2 * k * x)[:, None] * np.cos(2 * k * x)[None, :]
    step = sd.make_kolmogorov_flow_2d_stepper(
        16,
        domain_extent=extent,
        dt=dt,
        diffusivity=nu,
        drag=drag,
        injection_mode=3,
        injection_scale=0.0,
        num_substeps=2,
    )
    u = jnp.asarray(vortices)[None]
    u = _run(step, u, 5)
    decay = np.exp((drag - nu * 8 * k**2) * 5 * dt)
    np.testing.assert_allclose(u[0], decay * vortices, atol=1e-13)


def test_kolmogorov_keeps_its_laminar_flow():
    # Along x: 0 = nu v'' + drag v + gamma sin(ky), and the vorticity is -dv/dy.
    extent, nu, drag, gamma = 3.0, 0.05, -0.1, 0.7
    k = 2 * np.pi * 2 / extent
    y = extent * np.arange(16) / 16
    speed = gamma / (nu * k**2 - drag)
    vorticity = np.tile(-speed * k * np.cos(k * y), (16, 1))
    step = sd.make_kolmogorov_flow_2d_stepper(
        16,
        domain_extent=extent,
        dt=0.1,
        diffusivity=nu,
        drag=drag,
        injection_mode=2,
        injection_scale=gamma,
    )
    u = jnp.asarray(vorticity)[None]
    np.testing.assert_allclose(step(u), u, atol=1e-13)


def test_kolmogorov_is_the_curl_of_navier_stokes():
    """One short step against the momentum equation, evaluated in numpy."""
    num_points, extent, nu, drag, gamma, mode = 18, 5.0, 0.04, -0.3, 0.9, 2
    omega = np.asarray(RandomFourier(2, num_points, 2, 1.3)(KEY, 1)[0, 0])
    wave = 2 * np.pi / extent * np.fft.fftfreq(num_points, 1 / num_points)
    kx, ky = np.meshgrid(wave, wave, indexing="ij")
    k2 = np.where(kx**2 + ky**2 == 0, 1.0, kx**2 + ky**2)

    def derive(f, k):
        return np.fft.ifft2(1j * k * np.fft.fft2(f)).real

    stream = np.fft.ifft2(-np.fft.fft2(omega) / k2).real
    vx, vy = -derive(stream, ky), derive(stream, kx)
    np.testing.assert_allclose(derive(vy, kx) - derive(vx, ky), omega, atol=1e-12)

    def rate(v):
        advection = vx * derive(v, kx) + vy * derive(v, ky)
        laplacian = derive(derive(v, kx), kx) + derive(derive(v, ky), ky)
        return -advection + nu * laplacian + drag * v

    y = extent * np.arange(num_points) / num_points
    force = np.tile(gamma * np.sin(2 * np.pi * mode / extent * y), (num_points, 1))
    # The pressure gradient has no curl.
    expected = derive(rate(vy), kx) - derive(rate(vx) + force, ky)
    dt = 1e-5
    step = sd.make_kolmogorov_flow_2d_stepper(
        num_points,
        domain_extent=extent,
        dt=dt,
        diffusivity=nu,
        drag=drag,
        injection_mode=mode,
        injection_scale=gamma,
        num_substeps=1,
    )
    measured = (step(jnp.asarray(omega)[None])[0] - omega) / dt
    np.testing.assert_allclose(measured, expected, atol=1e-3)


@pytest.mark.parametrize("num_space_axes", [1, 2])
def test_random_fourier_is_a_function_of_space(num_space_axes):
    coarse, fine = (RandomFourier(num_space_axes, n, 3, 0.7)(KEY, 2) for n in (8, 24))
    every_third = (slice(None), slice(None), *[slice(None, None, 3)] * num_space_axes)
    np.testing.assert_allclose(fine[every_third], coarse, atol=1e-12)
    space = tuple(range(2, 2 + num_space_axes))
    np.testing.assert_allclose(jnp.mean(coarse, axis=space), 0.0, atol=1e-12)
    np.testing.assert_allclose(jnp.std(coarse, axis=space), 0.7, rtol=1e-12)
    modes = np.abs(np.fft.fftn(fine, axes=space))
    assert np.all(modes.take(range(4, 21), axis=2) < 1e-9)


def test_single_precision():
    generator, settings, _, make, shared = CASES["kuramoto_sivashinsky"]
    settings = settings | {"num_samples": 2, "temporal_horizon": 2}
    with jax.enable_x64(False):
        single = generator(key=KEY, **settings)
    assert single.dtype == jnp.float32
    # The draws differ between precisions, so the stepper is compared and not the data.
    double = jax.vmap(make(**{k: settings[k] for k in shared}))(
        jnp.asarray(single[:, 0], jnp.float64)
    )
    np.testing.assert_allclose(single[:, 1], double, atol=2e-6 * np.max(double))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: sd.advection_1d_periodic(num_samples=0, key=KEY), ValueError, "num_s"),
        (
            lambda: sd.advection_1d_periodic(30, highest_init_mode=15, key=KEY),
            ValueError,
            "highest_init_mode` below num_points // 2 = 15",
        ),
        (
            lambda: sd.advection_1d_periodic(highest_init_mode=0, key=KEY),
            ValueError,
            "highest_init_mode` of at least 1",
        ),
        (
            lambda: sd.advection_1d_periodic(temporal_horizon=0, key=KEY),
            ValueError,
            "temporal_horizon` of at least 1",
        ),
        (
            lambda: sd.advection_1d_periodic(temporal_horizon=2.0, key=KEY),
            TypeError,
            "integer for `temporal_horizon`",
        ),
        (lambda: sd.advection_1d_periodic(key=0), TypeError, "JAX random key"),
        (
            lambda: sd.advection_1d_periodic(key=jax.random.split(KEY)),
            TypeError,
            "JAX random key",
        ),
        (lambda: sd.make_advection_1d_stepper(1), ValueError, "num_points"),
        (lambda: sd.make_advection_1d_stepper(True), TypeError, "num_points"),
        (lambda: sd.make_advection_1d_stepper(cfl=np.inf), ValueError, "finite `cfl`"),
        (
            lambda: sd.make_advection_1d_stepper(5)(jnp.ones((1, 6))),
            ValueError,
            "5 points on the last axis",
        ),
        (lambda: sd.make_lorenz_63_stepper(0.0), ValueError, "positive `dt`"),
        (lambda: sd.make_lorenz_63_stepper("1e-2"), TypeError, "number for `dt`"),
        (
            lambda: sd.make_lorenz_63_stepper()(jnp.ones(4)),
            ValueError,
            r"shape \(3,\), got \(4,\)",
        ),
        (lambda: sd.lorenz_63(init_std=-1.0, key=KEY), ValueError, "init_std"),
        (
            lambda: sd.lorenz_63(num_warmup_steps=-1, key=KEY),
            ValueError,
            "num_warmup_steps` of at least 0",
        ),
        (lambda: sd.make_lorenz_96_stepper(3), ValueError, "num_dofs` of at least 4"),
        (
            lambda: sd.make_lorenz_96_stepper(5)(jnp.ones(4)),
            ValueError,
            r"shape \(5,\), got \(4,\)",
        ),
        (
            lambda: sd.make_burgers_1d_stepper(diffusivity=0.0),
            ValueError,
            "positive `diffusivity`",
        ),
        (
            lambda: sd.make_burgers_1d_stepper(num_substeps=0),
            ValueError,
            "num_substeps` of at least 1",
        ),
        (lambda: sd.burgers_1d(10, key=KEY), ValueError, "highest_init_mode` below"),
        (lambda: sd.burgers_1d(init_std=0.0, key=KEY), ValueError, "positive `init_s"),
        (
            lambda: sd.make_kuramoto_sivashinsky_1d_stepper(domain_extent=-1.0),
            ValueError,
            "positive `domain_extent`",
        ),
        (
            lambda: sd.make_advection_diffusion_2d_stepper(velocity=1.0),
            TypeError,
            "pair of numbers",
        ),
        (
            lambda: sd.make_advection_diffusion_2d_stepper(velocity=(1.0,)),
            ValueError,
            "2 entries of `velocity`",
        ),
        (
            lambda: sd.make_advection_diffusion_2d_stepper(diffusivity=-0.1),
            ValueError,
            "diffusivity` of at least 0",
        ),
        (
            lambda: sd.make_kolmogorov_flow_2d_stepper(8, injection_mode=4),
            ValueError,
            "injection_mode` below num_points // 2 = 4",
        ),
        (
            lambda: sd.make_kolmogorov_flow_2d_stepper(drag=0.1),
            ValueError,
            "`drag` of at most 0",
        ),
        (
            lambda: sd.make_kolmogorov_flow_2d_stepper(16)(jnp.ones((1, 16, 15))),
            ValueError,
            "Expected shape",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
