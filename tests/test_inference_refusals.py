"""What is wrong with parts of inference and generation is said before any compute."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk.amortized._encoder import with_mask
from trainax_pk.amortized._mcmc import _check_bounds

A, C, G = tx.amortized, tx.configuration, tx.generation
KEY = jax.random.key(5)
PRIOR = tx.data.BoxUniform([-1.0, -1.0], [1.0, 2.0])
OTHER = tx.data.BoxUniform([-1.0, -1.0], [1.0, 3.0])
THETA, X = jnp.full((8, 2), 0.3), jnp.full((8, 3), 0.7)
FINE, COARSE = jnp.full((6, 1, 8), 0.4), jnp.full((6, 1, 4), 0.2)


def _net(field, noise):
    del noise
    return field[:1]


DENOISER = G.Denoiser(_net, G.FieldScales(1, 1, num_axes=1))
VELOCITY = G.Velocity(_net, G.FieldScales(1, num_axes=1))
REGRESSION = G.Regression(_net, G.FieldScales(1, 1, num_axes=1))


def _posterior():
    head = A.DiagonalGaussian(2, 3, width=4, depth=1, key=KEY)
    return A.AmortizedPosterior(A.IdentityEncoder((3,)), head, prior=PRIOR)


def _likelihood(shape=(3,)):
    head = A.DiagonalGaussian(3, 2, width=4, depth=1, key=KEY)
    return A.AmortizedLikelihood(head, prior=PRIOR, shape=shape)


def _chains(prior):
    return A.sample_posterior(_likelihood(), prior, X[0], 8, key=KEY, num_chains=4)


def _train(data, configuration):
    return tx.trainer.Trainer(
        data, configuration, optimizer=optax.sgd(0.1), num_training_steps=1,
        batch_size=2,
    )  # fmt: skip


BAD = {
    "sigma_min": (lambda: G.EDMSampler(sigma_min="a"), "`sigma_max`, got 'a' and"),
    "sigma_max": (lambda: G.EDMSampler(sigma_max=None), "`sigma_max`.* and None"),
    "churn": (lambda: G.EDMSampler(churn="a"), "`churn` to be a number.* got 'a'"),
    "range, list": (
        lambda: G.EDMSampler(churn_range=[0.1, 1.0]),
        r"a tuple of two, got 0.0 and \[0.1, 1.0\]",
    ),
    "range, three": (
        lambda: G.EDMSampler(churn_range=(0.1, 1.0, 2.0)), "a tuple of two, got"
    ),
    "range, words": (
        lambda: G.EDMSampler(churn_range=("a", 1.0)), "a tuple of two, got"
    ),
    "noise": (lambda: C.Denoising(log_sigma_mean="a"), "`log_sigma_mean`.* got 'a'"),
    "paths": (lambda: C.FieldFlowMatching(sigma="a"), "`sigma` in .* got 'a'"),
    "space": (
        lambda: G.FlowSampler(2)(VELOCITY, KEY, space=8), r"got 8\. Pass space=\(8,\)"
    ),
    "space, regression": (
        lambda: REGRESSION(COARSE[0], space=8), r"Pass space=\(8,\)"
    ),
    "space, upsample": (lambda: G.upsample(COARSE[0], 8), "a tuple of points"),
    "batch to a sampler": (
        lambda: G.EDMSampler(2)(DENOISER, KEY, COARSE), r"one sample.*\(6, 1, 4\).*vmap"
    ),
    "batch to a sampler, space": (
        lambda: G.EDMSampler(2)(DENOISER, KEY, COARSE, space=(8,)), r"one sample.*vmap"
    ),
    "batch to generate": (
        lambda: G.generate(DENOISER, G.EDMSampler(2), KEY, COARSE, num_samples=2),
        r"one sample.*vmap",
    ),
    "no condition": (
        lambda: C.FieldRegression()(REGRESSION, FINE), "condition of 1 channels.* none"
    ),
    "no fields": (lambda: G.Fields(FINE[:0], COARSE[:0]), "at least one field"),
    "no fields of Fields": (
        lambda: tx.callback.Generation(
            jax.tree.map(lambda x: x[:0], G.Fields(FINE, COARSE)), G.EDMSampler(2),
            every=1,
        ),
        "at least one field",
    ),
    "fields to a trainer": (
        lambda: _train(G.Fields(FINE, COARSE), C.Denoising()), r"tx.data.Samples\(data\)"
    ),
    "pairs to a trainer": (
        lambda: _train(A.Pairs(THETA, X), C.AmortizedNLL()), r"tx.data.Samples\(data\)"
    ),
    "fields to validation": (
        lambda: tx.callback.Validation(C.Denoising(), G.Fields(FINE, COARSE), every=2),
        r"tx.data.Samples\(data\)",
    ),
    "shape": (lambda: _likelihood(3), "`shape` to be a tuple, got 3"),
    "shape of words": (lambda: _likelihood(("a",)), "`shape`.* got 'a'"),
    "lengths": (
        lambda: C.AmortizedNLL()(_posterior(), (THETA, X[:7])),
        r"one length, got \[\(7,\), \(8,\)\]",
    ),
    "length of a mask": (
        lambda: C.AmortizedNLL()(_posterior(), (THETA, X, jnp.ones((7, 3), bool))),
        r"mask of x's shape \(8, 3\), got \(7, 3\)",
    ),
    "lengths to learn scales from": (
        lambda: _posterior().standardised((THETA[:7], X)), "one length"
    ),
    "no pairs": (lambda: A.Pairs(THETA[:0], X[:0]), "at least one pair"),
    "fewer pairs than a batch": (
        lambda: _train(tx.data.Samples(A.Pairs(THETA[:1], X[:1])), C.AmortizedNLL()),
        "batch_size of at most 1",
    ),
    "members": (lambda: A.PosteriorEnsemble(_posterior()), "stacked.* got one posterior"),
    "members in a list": (
        lambda: A.PosteriorEnsemble([_posterior()]), "stacked.* got no posterior"
    ),
    "bounds": (
        lambda: _chains(OTHER), r"model's bounds \[-1. -1.\] and \[1. 2.\], got.*\[1. 3.\]"
    ),
    "parameters": (
        lambda: _chains(tx.data.BoxUniform([-1.0], [1.0])), r"shapes \(\(2,\),\), got"
    ),
    "wide bounds": (
        lambda: A.Support(jnp.full(1, -_LARGE), jnp.full(1, _LARGE)),
        "distance is finite",
    ),
}  # fmt: skip
_LARGE = 0.9 * float(jnp.finfo(jnp.result_type(float)).max)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
    make, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_right_is_taken():
    assert len(G.EDMSampler(2, churn_range=(0, 1)).sigmas) == 3
    stacked = eqx.filter_vmap(lambda _: _posterior())(jnp.arange(2))
    assert A.PosteriorEnsemble(stacked).num_members == 2
    wide = A.Support(jnp.full(1, -0.4 * _LARGE), jnp.full(1, 0.4 * _LARGE))
    assert bool(jnp.isfinite(wide.unconstrain(jnp.zeros(1))[1]))


def _of(kind, encoder):
    if kind is A.FlowMatchingPosterior:
        return kind(encoder, 2, prior=PRIOR, width=4, depth=1, key=KEY)
    if kind is A.AmortizedRatio:
        return kind(encoder, prior=PRIOR, width=4, depth=1, key=KEY)
    head = A.DiagonalGaussian(2, encoder.num_features, width=4, depth=1, key=KEY)
    return A.AmortizedPosterior(encoder, head, prior=PRIOR)


def _shapes(model):
    return [x.shape for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]


ENCODERS = {
    "vector": (A.IdentityEncoder((3,)), ()),
    "window": (A.IdentityEncoder((4, 3)), (0,)),
    "set": (A.SetEncoder(A.IdentityEncoder((3,)), 2, width=4, key=KEY), (0,)),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "kind", [A.AmortizedPosterior, A.FlowMatchingPosterior, A.AmortizedRatio]
)
def test_a_model_that_is_not_standardised_has_the_shapes_of_one_that_is(kind, encoder):
    """So that what a checkpoint holds is read back into a freshly built model."""
    encoder, shared = ENCODERS[encoder]
    x = X if shared == () else jnp.arange(96.0).reshape(8, 4, 3)
    model = _of(kind, encoder)
    fitted = model.standardised((THETA, x), shared_axes=shared)
    assert _shapes(fitted) == _shapes(model)
    assert not bool((fitted.x_scale.mean.value == model.x_scale.mean.value).all())
    likelihood = _likelihood()
    assert _shapes(likelihood.standardised((THETA, X))) == _shapes(likelihood)


def test_a_standardised_posterior_is_loaded_into_a_fresh_one(tmp_path):
    fresh = _posterior()
    pairs = A.Pairs(THETA + jnp.arange(8.0)[:, None] / 20, X + jnp.arange(8.0)[:, None])
    trained, _ = _train(tx.data.Samples(pairs), C.AmortizedNLL())(
        fresh.standardised(pairs), key=KEY, run_dir=tmp_path / "run"
    )
    loaded, _ = tx.checkpoint.load_model(tmp_path / "run", fresh)
    assert eqx.tree_equal(loaded, trained)
    assert not eqx.tree_equal(loaded.x_scale, fresh.x_scale)


@pytest.mark.parametrize("length", [2, 4])
def test_another_length_is_named_also_behind_scales(length):
    model = _posterior().standardised((THETA, X))
    with pytest.raises(ValueError, match=rf"of the shape \(3,\), got \({length},\)"):
        model.features(jnp.ones(length))
    sets = _of(A.AmortizedRatio, ENCODERS["set"][0])
    with pytest.raises(ValueError, match=rf"scales .* got \(5, {length}\)"):
        sets.log_ratio(THETA[0], jnp.ones((5, length)))


def _values_at(kind, x, mask):
    if kind == "likelihood":
        return [_likelihood().log_prob(THETA[0], x)]
    model = _of(kind, A.IdentityEncoder((3,), masked=True))
    if kind is A.AmortizedRatio:
        return [model.log_ratio(THETA[0], x, mask)]
    return [model.sample(KEY, x, 2, mask), model.log_prob(THETA[0], x, mask)]


@pytest.mark.parametrize("numbers", [[0.1, 0.2, 0.3], [1, 2, 3]])
@pytest.mark.parametrize(
    "kind",
    [A.AmortizedPosterior, A.FlowMatchingPosterior, A.AmortizedRatio, "likelihood"],
)
def test_an_observation_may_be_a_list(kind, numbers):
    mask = [True, False, True]
    wanted = _values_at(kind, jnp.array(numbers, float), jnp.array(mask))
    assert eqx.tree_equal(_values_at(kind, numbers, mask), wanted)
    assert eqx.tree_equal(_values_at(kind, tuple(numbers), jnp.array(mask)), wanted)


def test_an_observation_may_be_one_number():
    """Of an encoder that has no shape of its own."""

    class Length(A.AbstractEncoder):
        num_features: int = 1
        masked: bool = False

        def __call__(self, x, mask):
            return x.reshape(1)

    model = _of(A.AmortizedPosterior, Length())
    wanted = model.log_prob(THETA[0], jnp.array(0.5))
    assert eqx.tree_equal(model.log_prob(THETA[0], 0.5), wanted)


def _box(low, high):
    return tx.data.BoxUniform([low], [high])


def _of_one(prior):
    head = A.DiagonalGaussian(3, 1, width=4, depth=1, key=KEY)
    return A.AmortizedLikelihood(head, prior=prior, shape=(3,))


WITHIN = {
    "narrower": (_box(-1.0, 1.0), _box(-0.5, 0.5)),
    "one end": (_box(-1.0, 1.0), _box(-1.0, 0.5)),
    "of no bounds": (tx.data.Normal(jnp.zeros(1), 1.0), _box(-1.0, 1.0)),
    "rounded": (_box(1000.0, 1000.01), _box(1000.0, float(jnp.float32(1000.01)))),
}
BEYOND = {
    "shifted": (_box(-1.0, 1.0), _box(-0.5, 1.5)),
    "lower": (_box(-1.0, 1.0), _box(-1.001, 0.0)),
    "without": (_box(-1.0, 1.0), tx.data.Normal(jnp.zeros(1), 1.0)),
    "small numbers": (_box(0.0, 1e-9), _box(0.0, 1e-8)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_prior_may_be_narrower_than_that_of_a_likelihood(name):
    trained_on, prior = WITHIN[name]
    _check_bounds(_of_one(trained_on).support, prior)


@pytest.mark.parametrize("name", BEYOND)
def test_a_prior_beyond_the_bounds_of_a_likelihood_is_refused(name):
    trained_on, prior = BEYOND[name]
    with pytest.raises(ValueError, match="within the model's bounds"):
        A.sample_posterior(_of_one(trained_on), prior, X[0], 8, key=KEY, num_chains=4)


def test_chains_under_a_bounded_prior_may_be_part_of_a_program():
    prior = _box(-1.0, 1.0)
    sample = lambda x: A.sample_posterior(  # noqa: E731
        _of_one(prior), prior, x, 4, key=KEY, num_chains=4
    )
    assert jax.eval_shape(sample, X[0]).samples.shape == (4, 1)


@pytest.mark.slow
def test_chains_stay_within_a_narrower_prior():
    """One draw of each: there is no R̂ then."""
    chains = A.sample_posterior(
        _of_one(_box(-1.0, 1.0)), _box(-0.2, 0.1), X[0], 40, key=KEY, num_chains=40,
        num_warmup=20, num_candidates=200, max_doublings=3,
    )  # fmt: skip
    assert -0.2 < float(chains.samples.min()) < -0.1
    assert 0.0 < float(chains.samples.max()) < 0.1
    assert len(jnp.unique(chains.samples)) > 20
    assert bool(jnp.isnan(chains.r_hat).all())


class _Own(A.AbstractEncoder):
    shape: Any = eqx.field(static=True)
    num_features: int = 3
    masked: bool = False

    def __call__(self, x, mask):
        return with_mask(x, mask, self).reshape(-1)


@pytest.mark.parametrize(
    "shape", [3, np.int64(3), [3], range(3, 4), np.array([3]), jnp.array([3])], ids=str
)
def test_a_shape_is_any_sequence_of_lengths(shape):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A JAX array is being set as static")
        own = _Own(shape)
    model = _of(A.AmortizedRatio, own)
    assert model.x_scale.shape == (3,)
    assert model.log_ratio(THETA[0], X[0]).shape == ()
    with pytest.raises(ValueError, match=r"of the shape \(3,\), got \(2,\)"):
        model.log_ratio(THETA[0], X[0, :2])
    built = A.IdentityEncoder(shape).shape
    assert built == (3,) and type(built[0]) is int


@pytest.mark.parametrize("make", [list, np.array, jnp.array])
def test_lengths_of_likelihoods_and_grids_are_any_sequence(make):
    shape = _likelihood(make([3])).shape
    assert shape == (3,) and type(shape[0]) is int
    fine = G.upsample(COARSE[0], make([8]))
    assert eqx.tree_equal(fine, G.upsample(COARSE[0], (8,)))
    space = REGRESSION.scales.space_of(None, make([8]))
    assert space == (8,) and type(space[0]) is int


@pytest.mark.parametrize("make", [np.float32, np.array, jnp.float32])
def test_a_number_may_be_an_array_of_no_axes(make):
    parts = {
        "sigma": C.FieldFlowMatching(sigma=make(0.5)),
        "time_exponent": C.FlowMatching(time_exponent=make(0.5)),
        "log_sigma_mean": C.Denoising(log_sigma_mean=make(0.5)),
        "sigma_data": G.Denoiser(_net, DENOISER.scales, make(0.5)),
        "sigma_min": G.EDMSampler(sigma_min=make(0.5)),
        "rho": G.EDMSampler(rho=make(0.5)),
    }
    for name, part in parts.items():
        assert getattr(part, name) == 0.5 and type(getattr(part, name)) is float
        hash(jax.tree.structure(part))
    assert G.EDMSampler(churn_range=(make(0.5), make(2))).churn_range == (0.5, 2.0)
