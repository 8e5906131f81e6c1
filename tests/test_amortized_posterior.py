"""Posteriors: support, standardisation, PyTrees, the conjugate problem, bad input."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

pytestmark = pytest.mark.slow

A = tx.amortized
KEY = jax.random.key(7)

# θ ~ N(0, 1), x = F θ + 0.5 ε: the posterior is normal.
FORWARD = np.array([[1.0, -0.4], [0.3, 0.8], [0.5, 0.5]])
PRECISION = np.eye(2) + FORWARD.T @ FORWARD / 0.25
COVARIANCE = np.linalg.inv(PRECISION)
GAIN = COVARIANCE @ FORWARD.T / 0.25
PRIOR = tx.data.Normal(jnp.zeros(2), 1.0)


def simulate(key, theta):
    return jnp.asarray(FORWARD) @ theta + 0.5 * jax.random.normal(key, (3,))


def draw_pairs(key, num):
    theta_key, x_key = jax.random.split(key)
    theta = jax.vmap(PRIOR.sample)(jax.random.split(theta_key, num))
    return theta, jax.vmap(simulate)(jax.random.split(x_key, num), theta)


def train(model, configuration, pairs, num_steps=1500, batch_size=500, rate=2e-2):
    trainer = tx.trainer.Trainer(
        tx.data.Samples(pairs),
        configuration,
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
        num_training_steps=num_steps,
        batch_size=batch_size,
        progress=False,
    )
    return trainer(model, key=KEY)[0]


@functools.cache
def conjugate():
    """A trained posterior of the conjugate problem."""
    pairs = draw_pairs(jax.random.key(0), 60_000)
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3), A.FullGaussian(2, 3, depth=0, key=KEY), prior=PRIOR
    ).standardised(pairs)
    return train(model, tx.configuration.AmortizedNLL(), A.Pairs(*pairs))


def _moments(model, x):
    """Mean and covariance of θ: those of z, scaled back."""
    mean, covariance = model.head.mean_and_covariance(model.features(x))
    scale = model.theta_scale
    std = scale.std.value
    return scale.inverse(mean), covariance * jnp.outer(std, std)


def test_conjugate_posterior_is_learned_within_two_percent():
    xs = np.asarray(draw_pairs(jax.random.key(1), 50)[1])
    model = conjugate()
    moments = jax.jit(jax.vmap(lambda x: _moments(model, x)))
    mean, covariance = map(np.asarray, moments(xs))
    errors = (mean - xs @ GAIN.T) / np.sqrt(np.diag(COVARIANCE))
    assert np.sqrt(np.mean(np.square(errors))) < 0.02
    relative = np.linalg.norm(covariance - COVARIANCE, axis=(1, 2))
    assert relative.mean() < 0.02 * np.linalg.norm(COVARIANCE)


def test_map_of_the_conjugate_posterior_is_its_mean():
    model = conjugate()
    x = jnp.array([0.7, -0.2, 0.4])
    found = model.map_estimate(KEY, x, num_candidates=32)
    assert np.allclose(found, _moments(model, x)[0], atol=1e-3)


class HalfLine:
    """Bounds of every kind."""

    def bounds(self):
        return jnp.array([0.0, -jnp.inf, -1.0, -jnp.inf]), jnp.array(
            [jnp.inf, 3.0, 2.0, jnp.inf]
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_million_samples_stay_within_the_support(dtype):
    with jax.enable_x64(dtype == "float64"):
        prior = tx.data.BoxUniform([-1.0, 0.0], [1.0, 1e-3])
        head = A.FullGaussian(2, 1, key=KEY)
        # A density that lies almost wholly beyond where z can be resolved.
        wide = eqx.tree_at(
            lambda h: h.network.layers[-1].bias,
            head,
            jnp.array([9.0, -9.0, -4.0, -4.0, 0.0]),
        )
        model = A.AmortizedPosterior(A.IdentityEncoder(1), wide, prior=prior)
        sample = jax.jit(lambda k: model.sample(k, jnp.ones(1), 1_000_000))
        theta = sample(KEY)
        inside = jax.jit(jax.vmap(prior.log_prob))(theta)
        assert bool(jnp.all(jnp.isfinite(inside)))
        density = jax.jit(jax.vmap(lambda t: model.log_prob(t, jnp.ones(1))))
        assert bool(jnp.all(jnp.isfinite(density(theta))))
        beyond = jnp.array([[1.1, 5e-4], [0.0, -1e-3]])
        assert density(beyond).tolist() == [-jnp.inf, -jnp.inf]


def test_bijection_inverts_and_its_determinant_is_that_of_autodiff():
    support = A.Support(*HalfLine().bounds())
    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)) * 4)

    @jax.jit
    @jax.vmap
    def there_and_back(z):
        theta = support.constrain(z)
        return *support.unconstrain(theta), jax.jacfwd(support.constrain)(z)

    back, log_det, jacobian = there_and_back(z)
    assert np.allclose(back, z, atol=1e-9)
    assert np.allclose(log_det, -np.linalg.slogdet(jacobian)[1], atol=1e-9)
    gradient = jax.grad(lambda t: support.unconstrain(t)[0].sum())
    assert jnp.isfinite(gradient(jnp.array([-1.0, 5.0, 2.5, 0.0]))).all()
    # A bound itself has a finite image: a uniform draw may hit it.
    assert jnp.isfinite(support.unconstrain(jnp.array([0.0, 3.0, -1.0, 0.0]))[1])


def test_between_bounds_parameters_condition_as_evenly_as_they_were_drawn():
    support = A.Support(
        jnp.array([2.0, 0.0, -jnp.inf]), jnp.array([10.0, jnp.inf, jnp.inf])
    )
    rng = np.random.default_rng(0)
    theta = np.stack([rng.uniform(2, 10, 4000), rng.gamma(2, size=4000),
                      rng.normal(size=4000)], axis=1)  # fmt: skip
    z = jax.vmap(lambda t: support.unconstrain(t)[0])(theta)
    level = np.asarray(jax.vmap(support.level)(theta, z))
    assert np.allclose(level[:, 0], np.sqrt(12) * (theta[:, 0] - 6) / 8)
    assert abs(level[:, 0].std() - 1) < 0.03
    assert np.array_equal(level[:, 1:], np.asarray(z)[:, 1:])


BOUNDED = {
    "box": lambda: tx.data.BoxUniform([0.0], [1.0]),
    "narrow box far away": lambda: tx.data.BoxUniform([1000.0], [1001.0]),
    "six decades": lambda: tx.data.LogUniform(jnp.array([1e-4]), jnp.array([1e2])),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_chains_of_a_flat_likelihood_return_the_prior(name):
    """In single precision the ends of z are where θ cannot follow."""
    with jax.enable_x64(False):
        prior = BOUNDED[name]()
        head = A.DiagonalGaussian(1, 1, key=KEY)
        head = jax.tree.map(lambda w: 0 * w if eqx.is_inexact_array(w) else w, head)
        likelihood = A.AmortizedLikelihood(head, prior=prior, shape=(1,))
        theta = jax.vmap(prior.sample)(jax.random.split(KEY, 4000))
        likelihood = likelihood.standardised((theta, jnp.zeros((4000, 1))))
        chains = A.sample_posterior(
            likelihood, prior, jnp.zeros(1), 4000, key=KEY, num_candidates=1000
        )
    edges = np.quantile(theta, np.linspace(0.0, 1.0, 6)[1:-1])
    shares = np.bincount(np.searchsorted(edges, chains.samples[:, 0]), minlength=5)
    np.testing.assert_allclose(shares / 4000, 0.2, atol=0.05)
    assert float(chains.r_hat) < 1.05


def test_small_parameters_are_kept_apart_in_single_precision():
    with jax.enable_x64(False):
        prior = tx.data.LogUniform(jnp.array([1e-6]), jnp.array([1e2]))
        support = A.Support(*prior.bounds())
        theta = jax.vmap(prior.sample)(jax.random.split(KEY, 4000))
        z, log_det = jax.vmap(support.unconstrain)(theta)
        back = jax.vmap(support.constrain)(z)
        slope = jax.vmap(support.log_slope)(z)
    np.testing.assert_allclose(back, theta, rtol=1e-4)
    np.testing.assert_allclose(slope, -log_det, atol=1e-3)
    assert len(np.unique(z)) > 3990


def test_the_slope_falls_without_end_towards_bounds():
    low, high = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([1.0, jnp.inf, 2.0])
    support = A.Support(low, high)
    z = jnp.array([0.3, -0.7, 1.1])
    theta = support.constrain(z)
    np.testing.assert_allclose(
        support.log_slope(z), -support.unconstrain(theta)[1], rtol=1e-12
    )
    for i, far in ((0, -60.0), (0, 60.0), (1, -60.0), (2, 60.0)):
        further = support.log_slope(z.at[i].set(far + jnp.sign(far)))
        np.testing.assert_allclose(
            further - support.log_slope(z.at[i].set(far)), -1.0, rtol=1e-6
        )


def test_between_bounds_of_many_decades_logarithms_condition():
    prior = tx.data.LogUniform(jnp.array([1e-4, 1.0]), jnp.array([1e2, 2.0]))
    support = A.Support(*prior.bounds())
    theta = jnp.array([[1e-4, 1.0], [1e-1, 1.5], [1e2, 2.0]])
    z = jax.vmap(lambda t: support.unconstrain(t)[0])(theta)
    level = jax.vmap(support.level)(theta, z)
    expected = np.sqrt(3) * np.array([[-1, -1], [0, 0], [1, 1]])
    np.testing.assert_allclose(level, expected, atol=1e-9)


@pytest.mark.parametrize("wrapped", [False, True], ids=["one", "ensemble"])
def test_losses_of_draws_refuse_weights_that_draws_do_not_move_with(wrapped):
    def make(key):
        head = A.GaussianMixture(2, 3, num_components=2, key=key)
        return A.AmortizedPosterior(A.IdentityEncoder((3,)), head, prior=PRIOR)

    model = make(KEY)
    if wrapped:
        model = A.PosteriorEnsemble(eqx.filter_vmap(make)(jax.random.split(KEY, 2)))
    pairs = A.Pairs(*draw_pairs(KEY, 4))
    losses = (
        tx.configuration.EnsembleCRPS(4),
        tx.configuration.Variational(lambda theta, x: jnp.sum(theta), PRIOR),
    )
    for loss in losses:
        with pytest.raises(
            ValueError, match="GaussianMixture, whose draws.*AmortizedNLL"
        ):
            loss(model, pairs, key=KEY)


def test_density_with_bounds_integrates_to_one():
    model = A.AmortizedPosterior(
        A.IdentityEncoder(1),
        A.FullGaussian(2, 1, key=KEY),
        prior=tx.data.BoxUniform([-1.0, 2.0], [1.0, 5.0]),
    )
    rows = np.random.default_rng(1).uniform([-1, 2], [1, 5], (100, 2))
    model = model.standardised((jnp.asarray(rows), jnp.ones((100, 1))))
    a, b = np.linspace(-1, 1, 402)[1:-1], np.linspace(2, 5, 402)[1:-1]
    theta = jnp.asarray(np.stack(np.meshgrid(a, b), axis=-1).reshape(-1, 2))
    density = jax.jit(jax.vmap(lambda t: model.log_prob(t, jnp.ones(1))))(theta)
    total = jnp.exp(density).sum() * (a[1] - a[0]) * (b[1] - b[0])
    assert abs(total - 1) < 0.01


def test_parameters_may_be_a_tree():
    prior = tx.data.Product(
        {"where": tx.data.BoxUniform([0.0, 0.0], [1.0, 2.0]), "rate": PRIOR}
    )
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3), A.DiagonalGaussian(4, 3, key=KEY), prior=prior
    )
    draws = model.sample(KEY, jnp.ones(3), 5)
    assert jax.tree.map(jnp.shape, draws) == {"rate": (5, 2), "where": (5, 2)}
    one = jax.tree.map(lambda x: x[0], draws)
    flat = model.support.ravel(one)
    assert all(
        (x == y).all()
        for x, y in zip(
            jax.tree.leaves(one),
            jax.tree.leaves(model.support.unravel(flat)),
            strict=True,
        )
    )
    assert jnp.isfinite(model.log_prob(one, jnp.ones(3)))
    with pytest.raises(ValueError, match="Expected parameters"):
        model.log_prob(flat, jnp.ones(3))


def test_what_the_mask_leaves_out_is_never_read():
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3, masked=True), A.FullGaussian(2, 6, key=KEY)
    )
    x = jnp.array([[1.0, jnp.nan, 3.0], [0.5, 2.0, 1.0], [jnp.inf, 2.0, 5.0]])
    mask = jnp.isfinite(x)
    theta = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    model = model.standardised((theta, x, mask))
    loss = eqx.filter_jit(
        eqx.filter_value_and_grad(
            lambda m, x: A.amortized_nll_loss_fn(m, (theta, x, mask))
        )
    )
    value, grads = loss(model, x)
    other, _ = loss(model, jnp.where(mask, x, 123.0))
    assert value == other and np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_scales_do_not_train_and_ride_along():
    pairs = draw_pairs(jax.random.key(3), 200)
    model = A.AmortizedPosterior(
        A.IdentityEncoder(3), A.DiagonalGaussian(2, 3, key=KEY), prior=PRIOR
    ).standardised(pairs)
    adamw = optax.adamw(1e-2, weight_decay=0.5)
    state = tx.TrainState.create(model, adamw, key=KEY, ema=True)
    step = jax.jit(
        tx.make_train_step(tx.configuration.AmortizedNLL(), adamw, ema_decay=0.9)
    )
    state, _ = step(state, A.Pairs(*pairs))
    for trained in (state.model, state.ema_model):
        assert (trained.x_scale.mean.value == model.x_scale.mean.value).all()
        assert (trained.x_scale.std.value == model.x_scale.std.value).all()
    weights = lambda m: m.head.network.layers[0].weight  # noqa: E731
    assert (weights(state.model) != weights(model)).any()


def test_batches_of_windows_train_a_posterior_of_states():
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.normal(size=(40, 4, 3)))
    mask = jnp.asarray(rng.random((40, 4, 3)) < 0.5)
    batch = tx.Batch1D(jnp.where(mask, truth, jnp.nan), mask, truth)
    model = A.AmortizedPosterior(
        A.IdentityEncoder((4, 3), masked=True),
        A.LowRankGaussian(12, 24, rank=2, key=KEY),
        prior=tx.data.Normal(jnp.zeros((4, 3)), 1.0),
    ).standardised(batch)
    adam = optax.adam(1e-2)
    opt_state = adam.init(eqx.filter(model, eqx.is_inexact_array))
    step = eqx.filter_jit(A.amortized_train_step)
    losses = []
    for _ in range(20):
        model, opt_state, loss = step(model, batch, adam, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1
    sample = eqx.filter_eval_shape(model.sample, KEY, truth[0], 7, mask[0])
    assert sample.shape == (7, 4, 3)
    field = tx.Batch2D(*(x[:, :, None] for x in (truth, mask, truth)))
    assert A.as_pairs(field)[0].shape == (40, 4, 1, 3)
    with pytest.raises(ValueError, match="Batch1D without target"):
        A.as_pairs(tx.Batch1D(truth, mask))


def test_an_ensemble_is_the_mean_of_its_members():
    make = lambda key: A.AmortizedPosterior(  # noqa: E731
        A.IdentityEncoder(3), A.FullGaussian(2, 3, depth=0, key=key), prior=PRIOR
    )
    ensemble = A.PosteriorEnsemble(eqx.filter_vmap(make)(jax.random.split(KEY, 3)))
    params, static = eqx.partition(ensemble.members, eqx.is_array)
    theta, x = jnp.array([0.2, -0.3]), jnp.array([1.0, 0.5, -0.5])

    @eqx.filter_jit
    def compare(ensemble):
        draws = ensemble.sample(KEY, x, 30_000)
        densities, means = [], []
        for i in range(3):
            member = eqx.combine(jax.tree.map(lambda p: p[i], params), static)
            densities.append(jnp.exp(member.log_prob(theta, x)))
            means.append(member.head.mean_and_covariance(x)[0])
        return ensemble.log_prob(theta, x), draws.mean(axis=0), densities, means

    value, mean, densities, means = compare(ensemble)
    assert ensemble.num_members == 3 and np.isclose(np.exp(value), np.mean(densities))
    assert np.allclose(mean, np.mean(means, axis=0), atol=0.03)


def _posterior(**options):
    return A.AmortizedPosterior(
        A.IdentityEncoder(3, **options), A.FullGaussian(2, 3, key=KEY), prior=PRIOR
    )


THETA, X = draw_pairs(jax.random.key(4), 10)
BOX = tx.data.BoxUniform([-9.0, -9.0], [0.1, 9.0])


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: A.Pairs(THETA, X[:9]), "theta and x of one length"),
        (lambda: A.Pairs(THETA, X, prior=BOX), "within the prior's support"),
        (
            lambda: A.Pairs(THETA, X.at[2, 1].set(jnp.nan)),
            r"nan at index \(2, 1\) of x",
        ),
        (
            lambda: A.Pairs(THETA.at[1, 0].set(jnp.inf), X),
            r"inf at index \(1, 0\) of th",
        ),
        (lambda: A.Pairs(THETA, X, jnp.ones((10, 2), bool)), "mask of x's shape"),
        (lambda: A.Pairs(THETA.astype(int), X), "`theta` to be floating"),
        (lambda: A.as_pairs(THETA), "Expected pairs"),
        (lambda: A.as_pairs((THETA,)), "Expected pairs"),
        (lambda: _posterior(masked=True), "head of 6 features"),
        (
            lambda: A.AmortizedPosterior(
                A.IdentityEncoder(3), A.FullGaussian(4, 3, key=KEY), prior=PRIOR
            ),
            "head of dimension 2",
        ),
        (lambda: A.AmortizedPosterior(A.IdentityEncoder(3), None), "Expected a head"),
        (
            lambda: A.AmortizedPosterior(
                A.IdentityEncoder(3), A.FullGaussian(2, 3, key=KEY), prior=KEY
            ),
            "prior with `bounds",
        ),
        (lambda: _posterior().log_prob(jnp.zeros(3), X[0]), "Expected parameters"),
        (lambda: _posterior().log_prob(THETA[0], X[0, :2]), "observation of the shape"),
        (
            lambda: _posterior().log_prob(THETA[0], X[0], jnp.ones(3, bool)),
            "masked=True",
        ),
        (lambda: _posterior().sample(KEY, X[0], 0), "`num_samples`"),
        (lambda: A.Support(jnp.ones(2), jnp.zeros(2)), "lower bounds below"),
        (
            lambda: train(
                _posterior(), tx.configuration.AmortizedNLL(), A.Pairs(THETA, X), 2, 11
            ),
            "batch",
        ),
        (
            lambda: train(
                eqx.nn.Linear(3, 2, key=KEY),
                tx.configuration.AmortizedNLL(),
                A.Pairs(THETA, X),
                2,
                5,
            ),
            "model with `log_prob`",
        ),
    ],
)
def test_bad_input_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
