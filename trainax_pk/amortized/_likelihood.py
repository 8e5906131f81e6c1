"""Amortized likelihoods and likelihood ratios."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import as_lengths, check_count, check_flag
from trainax_pk.amortized._encoder import (
    AbstractEncoder,
    IdentityEncoder,
    check_encoder,
)
from trainax_pk.amortized._head import AbstractHead, make_network
from trainax_pk.amortized._pairs import as_observation, as_pairs
from trainax_pk.amortized._posterior import (
    check_dim,
    check_head,
    encode,
    fit_scales,
    fit_theta_scale,
    shape_of_scale,
    standard,
    unit_scale,
)
from trainax_pk.amortized._scale import Standardisation, fit_standardisation
from trainax_pk.amortized._support import Support, support_of


class AmortizedLikelihood(eqx.Module):
    """q(x | θ): a density of observations given parameters, a surrogate of a simulator.

    Trained by `tx.configuration.AmortizedNLL`, as a posterior is. `sample_posterior`
    draws from prior × likelihood by Markov chains.

    Attributes:
        encoder: θ ↦ features. It sees entries between two bounds on the scale of a uniform
            draw (`Support.level`), others unconstrained and standardised.
        head: Density of the flattened, standardised observation given features.
        support: θ ↔ ℝᵈ.
        shape: Of an observation; with `independent`, of one of its elements.
        independent: Observations are sets (first axis) of independent draws of x, whose
            log-densities add up. A training pair then counts as n pairs.
        theta_scale: Learned by `standardised`.
        x_scale: Learned by `standardised`.

    Raises:
        ValueError: When built: sizes that do not match. When called: observations of
            another shape, or a mask: a density of what was observed alone would need the
            rest integrated out.

    Source: Papamakarios et al. 2019, arXiv:1805.07226.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> likelihood = tx.amortized.AmortizedLikelihood(
        ...     tx.amortized.FullGaussian(3, 2, key=jax.random.key(0)),
        ...     prior=tx.data.Normal(jnp.zeros(2), 1.0), shape=(3,),
        ... )
        >>> likelihood.log_prob(jnp.zeros(2), jnp.ones(3)).shape
        ()
    """

    encoder: AbstractEncoder
    head: AbstractHead
    support: Support
    theta_scale: Standardisation
    x_scale: Standardisation
    shape: tuple[int, ...] = eqx.field(static=True)
    independent: bool = eqx.field(static=True)

    def __init__(
        self,
        head: AbstractHead,
        *,
        prior: Any,
        shape: Sequence[int],
        encoder: AbstractEncoder | None = None,
        independent: bool = False,
    ) -> None:
        """Puts the parts together.

        Args:
            head: Density of observations given features of θ.
            prior: With `bounds()`.
            shape: Of an observation, or of one element of a set.
            encoder: Of θ; None for θ itself.
            independent: Whether an observation is a set of independent draws.
        """
        self.support = support_of(prior)
        self.encoder = (
            IdentityEncoder(self.support.dim)
            if encoder is None
            else check_encoder(encoder)
        )
        self.head = check_head(head, self.encoder.num_features)
        self.shape = _checked_shape(shape)
        check_dim(head, math.prod(self.shape), "entries of an observation")
        self.independent = check_flag("independent", independent)
        self.theta_scale = unit_scale((self.support.dim,))
        self.x_scale = unit_scale(self.shape)

    def standardised(self, data: Any) -> "AmortizedLikelihood":
        """The same with scales learned from data, which no training changes.

        Args:
            data: Pairs, as a configuration takes them.

        Returns:
            A likelihood.
        """
        theta, x, _ = as_pairs(data)
        x = x.reshape(-1, *self.shape) if self.independent else x
        scales = fit_theta_scale(self.support, theta), fit_standardisation(x)
        return eqx.tree_at(lambda m: (m.theta_scale, m.x_scale), self, scales)

    def log_prob(
        self,
        theta: PyTree[Array],
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """log q(x | θ), a density of x; -inf for θ outside of the prior's support.

        Args:
            theta: One θ.
            x: One observation; with `independent`, a set `(n, ...)`.
            mask: None.

        Returns:
            Scalar.
        """
        x = as_observation(x)
        self._check(x, mask)
        features, log_det = self._features(theta)

        def one(x: Array) -> Array:
            density = self.head.log_prob(self.x_scale(x).reshape(-1), features)
            return density + self.x_scale.log_det(x.shape)

        value = jnp.sum(jax.vmap(one)(x)) if self.independent else one(x)
        return jnp.where(jnp.isneginf(log_det), -jnp.inf, value)

    def sample(
        self, key: PRNGKeyArray, theta: PyTree[Array], num_samples: int
    ) -> Float[Array, "n ..."]:
        """Draws of q(· | θ): what the simulator might have returned.

        Args:
            key: Key.
            theta: One θ.
            num_samples: n.

        Returns:
            `(n, *shape)`.
        """
        check_count("num_samples", num_samples)
        features, _ = self._features(theta)
        draw = lambda k: self.x_scale.inverse(  # noqa: E731
            self.head.sample(k, features).reshape(self.shape)
        )
        return jax.vmap(draw)(jax.random.split(key, num_samples))

    def _features(
        self, theta: PyTree[Array]
    ) -> tuple[Float[Array, " f"], Float[Array, ""]]:
        z, log_det = standard(self.support, self.theta_scale, theta)
        level = self.support.level(self.support.ravel(theta), z)
        return self.encoder(level, None), log_det

    def _check(self, x: Array, mask: Array | None) -> None:
        if mask is not None:
            raise ValueError(
                "Expected complete observations for a likelihood, got a mask. Train an "
                "AmortizedPosterior or AmortizedRatio with an encoder of masked=True."
            )
        shape = x.shape[1:] if self.independent else x.shape
        if shape != self.shape:
            raise ValueError(
                f"Expected an observation of the shape {self.shape}"
                f"{', with one axis of a set before it' if self.independent else ''}, got "
                f"{x.shape}. Pass one sample (jax.vmap for a batch)."
            )


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """The shape of an observation, or a ValueError."""
    lengths = as_lengths(shape)
    if lengths is None:
        raise ValueError(
            f"Expected `shape` to be a tuple, got {shape!r}. Pass that of one observation: "
            f"x.shape[1:] of simulated x, such as (3,)."
        )
    return tuple(check_count("shape", n) for n in lengths)


class AmortizedRatio(eqx.Module):
    """h(θ, x), trained to be log p(x | θ) / p(x): a classifier instead of a density.

    Trained by `tx.configuration.RatioEstimation`. `sample_posterior` draws from prior ×
    ratio by Markov chains.

    Attributes:
        encoder: Standardised x ↦ f.
        network: (z(θ), f) ↦ h, a perceptron.
        support: θ ↔ ℝᵈ.
        theta_scale: Learned by `standardised`.
        x_scale: Learned by `standardised`.

    Raises:
        ValueError: As `AmortizedPosterior`.

    Source: Hermans et al. 2020, arXiv:1903.04057; Miller et al. 2022, arXiv:2210.06170.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> ratio = tx.amortized.AmortizedRatio(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     prior=tx.data.BoxUniform([0.0], [1.0]), key=jax.random.key(0),
        ... )
        >>> ratio.log_ratio(jnp.array([0.5]), jnp.ones(3)).shape
        ()
    """

    encoder: AbstractEncoder
    network: eqx.nn.MLP
    support: Support
    theta_scale: Standardisation
    x_scale: Standardisation

    def __init__(
        self,
        encoder: AbstractEncoder,
        *,
        prior: Any,
        width: int = 64,
        depth: int = 3,
        activation: Any = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            encoder: x ↦ f.
            prior: With `bounds()`.
            width: Width of the hidden layers.
            depth: Number of hidden layers.
            activation: Between them.
            key: Key of the weights.
        """
        self.encoder = check_encoder(encoder)
        self.support = support_of(prior)
        inputs = self.support.dim + encoder.num_features
        self.network = make_network(inputs, 1, width, depth, activation, key)
        self.theta_scale = unit_scale((self.support.dim,))
        self.x_scale = unit_scale(shape_of_scale(encoder))

    def standardised(
        self, data: Any, *, shared_axes: tuple[int, ...] = ()
    ) -> "AmortizedRatio":
        """The same with scales learned from data, which no training changes.

        Args:
            data: Pairs, as a configuration takes them.
            shared_axes: As for `AmortizedPosterior.standardised`.

        Returns:
            A ratio.
        """
        return fit_scales(self, data, shared_axes)

    def log_ratio(
        self,
        theta: PyTree[Array],
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """h(θ, x), -inf outside of the prior's support.

        Args:
            theta: One θ.
            x: One observation.
            mask: Which of its entries were observed, or None.

        Returns:
            Scalar.
        """
        return self.pair(*self.embed(theta, x, mask))

    def embed(
        self, theta: PyTree[Array], x: Array, mask: Array | None
    ) -> tuple[Array, Array, Array]:
        """z(θ), its log-determinant, and f(x): once for all that they are paired with."""
        z, log_det = standard(self.support, self.theta_scale, theta)
        return z, log_det, encode(self.encoder, self.x_scale, x, mask)

    def pair(self, z: Array, log_det: Array, features: Array) -> Float[Array, ""]:
        """h of parts that `embed` returned."""
        value = self.network(jnp.concatenate([z, features]))[0]
        return jnp.where(jnp.isneginf(log_det), -jnp.inf, value)
