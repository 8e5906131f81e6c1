"""What encoders promise: shapes, masks, order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx

A = tx.amortized
KEYS = jax.random.split(jax.random.key(1), 3)
ENCODERS = {
    "identity": (A.IdentityEncoder((3, 2), masked=True), (3, 2), 12),
    "perceptron": (
        A.MLPEncoder((3, 2), 5, masked=True, width=8, key=KEYS[0]),
        (3, 2),
        5,
    ),
    "line": (
        A.ConvEncoder((2, 9), 5, masked=True, hidden=(3, 4), key=KEYS[0]),
        (2, 9),
        5,
    ),
    "window": (
        A.ConvEncoder(
            (9, 2), 5, masked=True, hidden=(3,), channels_last=True, key=KEYS[0]
        ),
        (9, 2),
        5,
    ),
    "plane": (
        A.ConvEncoder((1, 8, 7), 5, masked=True, hidden=(3, 4), key=KEYS[0]),
        (1, 8, 7),
        5,
    ),
    "set": (
        A.SetEncoder(A.MLPEncoder((2,), 6, masked=True, key=KEYS[1]), 5, key=KEYS[2]),
        (4, 2),
        5,
    ),
}
encoders = pytest.mark.parametrize("name", ENCODERS)


@encoders
def test_features_have_their_length_and_see_the_mask(name):
    encoder, shape, length = ENCODERS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    features = encoder(x, None)
    assert features.shape == (length,) == (encoder.num_features,)
    all_seen = encoder(x, jnp.ones(shape, bool))
    assert jnp.allclose(features, all_seen)
    mask = jnp.ones(shape, bool).at[(0,) * len(shape)].set(False)
    hidden = encoder(jnp.where(mask, x, 0.0), mask)
    assert not jnp.allclose(hidden, encoder(jnp.where(mask, x, 0.0), None))


@encoders
def test_another_shape_is_refused(name):
    encoder, shape, _ = ENCODERS[name]
    with pytest.raises(ValueError, match="Expected an observation of the shape"):
        encoder(jnp.ones((*shape[:-1], shape[-1] + 1)), None)


def test_sets_have_no_order_and_any_size():
    encoder, _, _ = ENCODERS["set"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)))
    assert jnp.allclose(
        encoder(x, None), encoder(x[jnp.array([3, 1, 0, 5, 4, 2])], None)
    )
    # An element of which nothing was seen is as good as none.
    mask = jnp.ones((6, 2), bool).at[2].set(False)
    kept = encoder(jnp.delete(x, 2, axis=0), jnp.ones((5, 2), bool))
    assert jnp.allclose(encoder(jnp.where(mask, x, 0.0), mask), kept)
    twice = jnp.concatenate([x, x])
    assert not jnp.allclose(encoder(twice, None), encoder(x, None))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: A.IdentityEncoder(()), "at least one axis"),
        (lambda: A.IdentityEncoder((0,)), "`shape` to be an integer >= 1"),
        (lambda: A.MLPEncoder(3, 0, key=KEYS[0]), "`num_features`"),
        (lambda: A.ConvEncoder((8,), 2, key=KEYS[0]), "one or two axes of points"),
        (lambda: A.ConvEncoder((1, 8), 2, kernel_size=4, key=KEYS[0]), "odd kernel"),
        (lambda: A.ConvEncoder((1, 6), 2, key=KEYS[0]), "at least 8 points"),
        (lambda: A.SetEncoder(None, 2, key=KEYS[0]), "Expected an encoder"),
    ],
)
def test_bad_shapes_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
