"""Parts of learned solvers refuse what they cannot use, and say what they can."""

import jax
import jax.numpy as jnp
import pytest

import trainax_pk as tx

S = tx.solver
KEY = jax.random.key(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.ConvLSTMGradMod1D(3, kernel_size=4, key=KEY), "odd, got 4"),
        (lambda: S.BilinAEPrior2D(3, kernel_size=(3, 2), key=KEY), "odd, got 2"),
        (lambda: S.ConvAEPrior1D(3, kernel_size=0, key=KEY), "integer >= 1, got 0"),
        (
            lambda: S.ConvAEPrior2D(3, kernel_size=(3, 3, 3), key=KEY),
            "odd integer or 2 of them",
        ),
        (lambda: S.ConvLSTMGradMod1D(3, padding="wrap", key=KEY), "'zero', 'periodic'"),
        (
            lambda: S.ConvLSTMGradMod2D(3, padding=("zero",), key=KEY),
            "'zero', 'periodic', or 2 of these",
        ),
        (lambda: S.ConvLSTMGradMod1D(3, along="x", key=KEY), "`along` to be one of"),
        (lambda: S.ConvLSTMGradMod2D(3, along="time", key=KEY), "`along` to be one of"),
        (lambda: S.BilinAEPrior1D(3, along="both", key=KEY), "num_channels=1 with"),
        (lambda: S.ConvLSTMGradMod1D(3, patch=0, key=KEY), "`patch` to be an integer"),
        (lambda: S.ConvLSTMGradMod1D(3, patch=(2, 2), key=KEY), "an integer or 1 of"),
        (
            lambda: S.ConvLSTMGradMod1D(3, normalise="no", key=KEY),
            "'first', 'each' or 'none'",
        ),
        (lambda: S.ConvLSTMGradMod1D(3, 0, key=KEY), "`hidden_dim` to be an integer"),
        (lambda: S.ConvAEPrior1D(3, latent_dim=0, key=KEY), "`latent_dim` to be an"),
        (lambda: S.BilinAEPrior1D(3, downsample=0, key=KEY), "`downsample` to be an"),
        (lambda: S.BilinAEPrior1D(3, activation=2, key=KEY), "`activation` to be a"),
        (lambda: S.MLPGradMod(0, key=KEY), "`width` to be an integer"),
        (lambda: S.DynamicalPrior(3), "`stepper` to be a function"),
        (
            lambda: S.DynamicalPrior(jnp.sin, scale=0.0),
            "`scale` to be finite and not 0",
        ),
        (
            lambda: S.DynamicalPrior(jnp.sin, time_weights=jnp.array([1.0, -1.0])),
            "`time_weights` >= 0",
        ),
    ],
)
def test_bad_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        (lambda: S.BilinAEPrior1D(3, 2, key=KEY), (6, 4), "with 3 channels"),
        (lambda: S.BilinAEPrior1D(3, 2, key=KEY), (2, 6, 3), r"a state \(T, N\)"),
        (lambda: S.ConvAEPrior2D(3, 2, key=KEY), (4, 4, 4), "with 3 channels"),
        (lambda: S.ConvAEPrior1D(3, 2, key=KEY), (7, 3), "numbers of points that it"),
        (
            lambda: S.BilinAEPrior1D(3, 2, kernel_size=9, padding="periodic", key=KEY),
            (3, 3),
            "at least 4 points along a periodic axis",
        ),
        (lambda: S.DynamicalPrior(lambda u: u[:1]), (6, 3), "keeps the shape"),
        (
            lambda: S.DynamicalPrior(jnp.sin, time_weights=jnp.ones(6)),
            (6, 3),
            "Expected 5 `time_weights`",
        ),
        (lambda: S.ConvLSTMGradMod1D(3, 2, key=KEY).init, (6, 4), "with 3 channels"),
        (
            lambda: S.ConvLSTMGradMod1D(3, 2, patch=4, key=KEY).init,
            (6, 3),
            "numbers of points that patch",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(part, shape, message):
    with pytest.raises(ValueError, match=message):
        part()(jnp.ones(shape))
