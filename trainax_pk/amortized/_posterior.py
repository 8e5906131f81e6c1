"""Amortized posteriors: one network for every observation."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count
from trainax_pk.amortized._encoder import (
    AbstractEncoder,
    SetEncoder,
    check_encoder,
    check_seen,
    shape_of,
)
from trainax_pk.amortized._head import AbstractHead
from trainax_pk.amortized._pairs import as_observation, as_pairs, observed
from trainax_pk.amortized._scale import Standardisation, fit_standardisation
from trainax_pk.amortized._support import Support, support_of, unbounded


class AmortizedPosterior(eqx.Module):
    """q(θ | x) = h(z(θ) | f(x)) |det dz/dθ|: a conditional density with exact samples.

    z maps the prior's support onto ℝᵈ and standardises it; the encoder makes features f
    of the standardised observation; the head is a density of z given f. Train it on pairs
    (θ, x) with `tx.configuration.AmortizedNLL`. It may then be asked about any x, at the
    cost of one pass of the networks.

    Attributes:
        encoder: x ↦ f.
        head: Density on ℝᵈ given f.
        support: θ ↔ ℝᵈ.
        theta_scale: Standardisation behind `support`; learned by `standardised`.
        x_scale: Standardisation of x; learned by `standardised`.

    Raises:
        ValueError: When built: an encoder and a head, or a head and a prior, whose sizes
            do not match. When called: θ or x of other shapes, a mask for an encoder that
            takes none.

    Source: Papamakarios & Murray 2016, arXiv:1605.06376; Greenberg et al. 2019,
    arXiv:1905.07488.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.BoxUniform([-1.0, -1.0], [1.0, 1.0])
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((4,)),
        ...     tx.amortized.FullGaussian(2, 4, key=keys[0]), prior=prior,
        ... )
        >>> samples = posterior.sample(keys[1], jnp.ones(4), 100)
        >>> samples.shape, bool(jnp.all(jnp.abs(samples) < 1))
        ((100, 2), True)
    """

    encoder: AbstractEncoder
    head: AbstractHead
    support: Support
    theta_scale: Standardisation
    x_scale: Standardisation

    def __init__(
        self, encoder: AbstractEncoder, head: AbstractHead, *, prior: Any = None
    ) -> None:
        """Puts the parts together.

        Args:
            encoder: x ↦ f.
            head: Density on ℝᵈ given f.
            prior: With `bounds()`, of whose support nothing leaves; None for vectors θ
                without bounds.
        """
        self.encoder = check_encoder(encoder)
        self.head = check_head(head, encoder.num_features)
        self.support = unbounded(head.dim) if prior is None else support_of(prior)
        check_dim(head, self.support.dim, "parameters")
        self.theta_scale = unit_scale((self.support.dim,))
        self.x_scale = unit_scale(shape_of_scale(encoder))

    def standardised(
        self, data: Any, *, shared_axes: tuple[int, ...] = ()
    ) -> "AmortizedPosterior":
        """The same with scales learned from data, which no training changes.

        Args:
            data: Pairs, as a configuration takes them, all of them or many.
            shared_axes: Axes of one observation with statistics in common: space of a
                field, elements of a set.

        Returns:
            A posterior.

        Raises:
            ValueError: As `as_pairs`.
        """
        return fit_scales(self, data, shared_axes)

    def log_prob(
        self,
        theta: PyTree[Array],
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """log q(θ | x), -inf outside of the prior's support.

        Args:
            theta: One θ, as the prior draws it.
            x: One observation.
            mask: Which of its entries were observed, or None.

        Returns:
            Scalar.
        """
        z, log_det = standard(self.support, self.theta_scale, theta)
        return self.head.log_prob(z, self.features(x, mask)) + log_det

    def sample(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "..."],
        num_samples: int,
        mask: Bool[Array, "..."] | None = None,
    ) -> PyTree[Array]:
        """Independent draws of q(· | x), all within the prior's support.

        Args:
            key: Key.
            x: One observation.
            num_samples: n.
            mask: Which of its entries were observed, or None.

        Returns:
            Leaves `(n, ...)`.
        """
        check_count("num_samples", num_samples)
        features = self.features(x, mask)
        keys = jax.random.split(key, num_samples)
        return jax.vmap(lambda k: self._theta(self.head.sample(k, features)))(keys)

    def map_estimate(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
        *,
        num_candidates: int = 256,
        num_steps: int = 300,
        learning_rate: float = 0.03,
    ) -> PyTree[Array]:
        """The θ of greatest q(θ | x), by Adam from the best of some draws.

        Args:
            key: Key of the draws.
            x: One observation.
            mask: Which of its entries were observed, or None.
            num_candidates: Draws to start from.
            num_steps: Updates, in z, where there are no bounds; their size falls to 0.
            learning_rate: Of the first update.

        Returns:
            One θ. Of a density with several modes the highest that a draw fell near.

        Raises:
            ValueError: A count below 1, a learning rate that is not above 0.
        """
        check_count("num_candidates", num_candidates)
        check_count("num_steps", num_steps)
        if not 0 < learning_rate < math.inf:
            raise ValueError(
                f"Expected `learning_rate` > 0, got {learning_rate!r}. Leave it out for "
                "0.03."
            )
        features = self.features(x, mask)
        keys = jax.random.split(key, num_candidates)
        starts = jax.vmap(lambda k: self.head.sample(k, features))(keys)

        def loss(z: Array) -> Array:
            slope = self.support.log_slope(self.theta_scale.inverse(z))
            return slope - self.head.log_prob(z, features)

        start = starts[jnp.argmin(jax.vmap(loss)(starts))]
        adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

        def body(carry: Any, _: None) -> tuple[Any, None]:
            z, state = carry
            updates, state = adam.update(jax.grad(loss)(z), state)
            return (z + updates, state), None

        (z, _), _ = jax.lax.scan(
            body, (start, adam.init(start)), None, length=num_steps
        )
        return self._theta(jnp.where(loss(z) <= loss(start), z, start))

    def features(
        self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, " f"]:
        """What the head sees of an observation."""
        return encode(self.encoder, self.x_scale, x, mask)

    def _theta(self, z: Float[Array, " d"]) -> PyTree[Array]:
        return from_standard(self.support, self.theta_scale, z)


class PosteriorEnsemble(eqx.Module):
    """Mean of the densities of several posteriors, as a posterior.

    Members that were trained from different weights err in different places; their mean
    is as a rule better calibrated than any of them.

    Attributes:
        members: Posteriors stacked along a leading axis of their arrays, as
            `eqx.filter_vmap` makes them and `Trainer(...)(..., ensemble=True)` returns
            them.

    Raises:
        ValueError: Members that are not stacked.

    Source: Hermans et al. 2022, arXiv:2110.06581.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> make = eqx.filter_vmap(lambda key: tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((4,)),
        ...     tx.amortized.DiagonalGaussian(2, 4, key=key),
        ... ))
        >>> members = make(jax.random.split(jax.random.key(0), 3))
        >>> ensemble = tx.amortized.PosteriorEnsemble(members)
        >>> ensemble.num_members, ensemble.log_prob(jnp.zeros(2), jnp.ones(4)).shape
        (3, ())
    """

    members: AmortizedPosterior

    def __check_init__(self) -> None:
        support = getattr(self.members, "support", None)
        if not isinstance(support, Support) or support.low.bits.ndim != 2:
            raise ValueError(
                "Expected posteriors stacked along a leading axis of their arrays, got "
                f"{'one' if isinstance(support, Support) else 'no'} posterior "
                f"({type(self.members).__name__}). Make them by eqx.filter_vmap over keys, "
                "or stack the leaves of several of one structure: jax.tree.map(lambda *x: "
                "jnp.stack(x) if eqx.is_array(x[0]) else x[0], *posteriors)."
            )

    @property
    def num_members(self) -> int:
        """Number of members."""
        return jax.tree.leaves(eqx.filter(self.members, eqx.is_array))[0].shape[0]

    def log_prob(
        self,
        theta: PyTree[Array],
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """log (1/M) Σ_m q_m(θ | x)."""
        parts = eqx.filter_vmap(lambda m: m.log_prob(theta, x, mask))(self.members)
        return jax.nn.logsumexp(parts) - jnp.log(self.num_members).astype(parts.dtype)

    def sample(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "..."],
        num_samples: int,
        mask: Bool[Array, "..."] | None = None,
    ) -> PyTree[Array]:
        """Draws, each of a member drawn at random; leaves `(n, ...)`."""
        which_key, key = jax.random.split(key)
        keys = jax.random.split(key, self.num_members)
        draws = eqx.filter_vmap(lambda m, k: m.sample(k, x, num_samples, mask))(
            self.members, keys
        )
        which = jax.random.randint(which_key, (num_samples,), 0, self.num_members)
        return jax.tree.map(lambda s: s[which, jnp.arange(num_samples)], draws)


def standard(
    support: Support, scale: Standardisation, theta: PyTree[Array]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """z of one θ and log |det dz/dθ|."""
    z, log_det = support.unconstrain(support.ravel(theta))
    return scale(z), log_det + scale.log_det(z.shape)


def from_standard(
    support: Support, scale: Standardisation, z: Float[Array, " d"]
) -> PyTree[Array]:
    """The θ of z, strictly within the support."""
    return support.unravel(support.constrain(scale.inverse(z)))


def fit_scales(model: Any, data: Any, shared_axes: tuple[int, ...]) -> Any:
    """A model of θ and an encoded x with scales learned from pairs."""
    theta, x, mask = as_pairs(data)
    found = fit_standardisation(x, mask, shared_axes)
    scales = fit_theta_scale(model.support, theta), found.spread(model.x_scale.shape)
    return eqx.tree_at(lambda m: (m.theta_scale, m.x_scale), model, scales)


def fit_theta_scale(support: Support, theta: PyTree[Array]) -> Standardisation:
    """Standardisation of unconstrained parameters."""
    rows = jax.vmap(lambda t: support.unconstrain(support.ravel(t))[0])(
        jax.tree.map(jnp.asarray, theta)
    )
    return fit_standardisation(rows)


def encode(
    encoder: AbstractEncoder, scale: Standardisation, x: Array, mask: Array | None
) -> Float[Array, " f"]:
    """Features of one observation, 0 in its gaps."""
    if mask is not None and not encoder.masked:
        raise ValueError(
            f"Expected an encoder with masked=True for observations with a mask, got "
            f"{type(encoder).__name__} without. Build it so; fully observed samples need "
            "no mask then."
        )
    x = as_observation(x)
    check_seen(x, encoder)
    if not scale.fits(x.shape):
        raise ValueError(
            f"Expected an observation that scales of the shape {scale.shape} fit, got "
            f"{x.shape}. Pass one sample (jax.vmap for a batch)."
        )
    # Standardised first: a gap then holds the mean of what it would have been.
    mask = None if mask is None else jnp.asarray(mask, bool)
    return encoder(observed(scale(observed(x, mask)), mask), mask)


def unit_scale(shape: tuple[int, ...]) -> Standardisation:
    """The identity, of the shape that learned scales will have: these load into it."""
    dtype = jnp.result_type(float)
    return Standardisation(jnp.zeros(shape, dtype), jnp.ones(shape, dtype))


def shape_of_scale(encoder: AbstractEncoder) -> tuple[int, ...]:
    """That of the observations an encoder takes, as far as it tells."""
    if isinstance(encoder, SetEncoder):
        return (1, *shape_of_scale(encoder.element))
    return shape_of(encoder) or ()


def check_head(head: Any, num_features: int) -> AbstractHead:
    """A head that takes so many features, or a ValueError."""
    if not isinstance(head, AbstractHead):
        raise ValueError(
            f"Expected a head, got {head!r}. Pass for example tx.amortized.FullGaussian."
        )
    if head.num_features != num_features:
        raise ValueError(
            f"Expected a head of {num_features} features, which the encoder makes, got "
            f"one of {head.num_features}. Build it with num_features={num_features}."
        )
    return head


def check_dim(head: AbstractHead, dim: int, what: str) -> None:
    """A head of as many entries as there are, or a ValueError."""
    if head.dim != dim:
        raise ValueError(
            f"Expected a head of dimension {dim}, the number of {what}, got {head.dim}. "
            f"Build it with dim={dim}."
        )
