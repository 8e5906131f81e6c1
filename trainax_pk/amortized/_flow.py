"""Normalising flows of flowjax as heads."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._extras import load
from trainax_pk._tree import check_count
from trainax_pk.amortized._head import AbstractHead, typed_key

Transformer = Literal["affine", "spline"]


class Flow(AbstractHead):
    """A conditional distribution of flowjax, whose condition are the features.

    Needs the extra `amortized`. `masked_autoregressive_flow` and `coupling_flow` build
    the usual ones.

    Attributes:
        distribution: `log_prob(z, condition)`, `sample(key, condition=...)`, of the
            shapes `(d,)` and `(f,)`.

    Raises:
        ValueError: A distribution that is not conditional, or not of vectors.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> head = tx.amortized.coupling_flow(
        ...     2, 5, num_layers=2, width=8, key=jax.random.key(0)
        ... )
        >>> head.dim, head.log_prob(jnp.zeros(2), jnp.ones(5)).shape
        (2, ())
    """

    distribution: Any

    def __check_init__(self) -> None:
        shapes = [getattr(self.distribution, n, None) for n in ("shape", "cond_shape")]
        if any(shape is None or len(shape) != 1 for shape in shapes):
            raise ValueError(
                "Expected a distribution of flowjax with shape (d,) and cond_shape (f,), "
                f"got {shapes[0]} and {shapes[1]}. Pass cond_dim to its constructor."
            )

    @property
    def dim(self) -> int:
        """d."""
        return self.distribution.shape[0]

    @property
    def num_features(self) -> int:
        """Length of f."""
        return self.distribution.cond_shape[0]

    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """log h(z | f)."""
        # flowjax relies on the promotion of ranks, which a user may have forbidden.
        with jax.numpy_rank_promotion("allow"):
            return self.distribution.log_prob(z, features)

    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """The flow of a draw of its base."""
        with jax.numpy_rank_promotion("allow"):
            return self.distribution.sample(typed_key(key), condition=features)


def masked_autoregressive_flow(
    dim: int,
    num_features: int,
    *,
    num_layers: int = 5,
    width: int = 50,
    depth: int = 2,
    transformer: Transformer = "affine",
    num_knots: int = 8,
    interval: float = 5.0,
    activation: Callable[[Array], Array] = jax.nn.relu,
    key: PRNGKeyArray,
) -> Flow:
    """A flow whose entry i is transformed as a function of features and entries < i.

    A log-density costs one pass; a draw costs d of them.

    Args:
        dim: d.
        num_features: Length of the features.
        num_layers: Number of layers, entries permuted between them.
        width: Width of the networks, at least d.
        depth: Number of their hidden layers.
        transformer: "affine", or "spline": rational-quadratic, the identity outside of
            ±`interval`.
        num_knots: Inner knots of a spline.
        interval: What a spline covers, in standard deviations.
        activation: Between layers.
        key: Key of the weights.

    Returns:
        The head.

    Raises:
        ValueError: A count out of range, an unknown transformer.
        ImportError: flowjax is not installed.

    Source: Papamakarios et al. 2017, arXiv:1705.07057; Durkan et al. 2019,
    arXiv:1906.04032.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> tx.amortized.masked_autoregressive_flow(
        ...     3, 5, num_layers=2, width=8, key=jax.random.key(0)
        ... ).dim
        3
    """
    check_count("width", width, minimum=dim)
    return _build(
        "masked_autoregressive_flow", dim, num_features, num_layers, width, depth,
        _transformer(transformer, num_knots, interval), activation, key,
    )  # fmt: skip


def coupling_flow(
    dim: int,
    num_features: int,
    *,
    num_layers: int = 5,
    width: int = 50,
    depth: int = 2,
    transformer: Transformer = "spline",
    num_knots: int = 8,
    interval: float = 5.0,
    activation: Callable[[Array], Array] = jax.nn.relu,
    key: PRNGKeyArray,
) -> Flow:
    """A flow whose layers transform half of the entries as a function of the others.

    Log-densities and draws cost one pass each.

    Args:
        dim: d.
        num_features: Length of the features.
        num_layers: Number of layers, entries permuted between them.
        width: Width of the networks.
        depth: Number of their hidden layers.
        transformer: "spline" (rational-quadratic, the identity outside of ±`interval`)
            or "affine".
        num_knots: Inner knots of a spline.
        interval: What a spline covers, in standard deviations.
        activation: Between layers.
        key: Key of the weights.

    Returns:
        The head.

    Raises:
        ValueError: A count out of range, an unknown transformer.
        ImportError: flowjax is not installed.

    Source: Durkan et al. 2019, arXiv:1906.04032.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> tx.amortized.coupling_flow(
        ...     3, 5, num_layers=2, width=8, key=jax.random.key(0)
        ... ).num_features
        5
    """
    return _build(
        "coupling_flow", dim, num_features, num_layers, width, depth,
        _transformer(transformer, num_knots, interval), activation, key,
    )  # fmt: skip


def _transformer(kind: str, num_knots: int, interval: float) -> Any:
    if kind not in ("affine", "spline"):
        raise ValueError(
            f"Expected `transformer` to be 'affine' or 'spline', got {kind!r}. Choose one "
            "of them."
        )
    if kind == "affine":
        return None  # flowjax's default, whose scale has a lower limit.
    check_count("num_knots", num_knots)
    bijections = load("flowjax.bijections", "amortized")
    return bijections.RationalQuadraticSpline(knots=num_knots, interval=interval)


def _build(
    name: str,
    dim: int,
    num_features: int,
    num_layers: int,
    width: int,
    depth: int,
    transformer: Any,
    activation: Callable[[Array], Array],
    key: PRNGKeyArray,
) -> Flow:
    check_count("dim", dim)
    check_count("num_features", num_features)
    check_count("num_layers", num_layers)
    check_count("width", width)
    check_count("depth", depth)
    distributions, flows = (
        load("flowjax.distributions", "amortized"),
        load("flowjax.flows", "amortized"),
    )
    with jax.numpy_rank_promotion("allow"):
        distribution = getattr(flows, name)(
            typed_key(key),
            base_dist=distributions.StandardNormal((dim,)),
            transformer=transformer,
            cond_dim=num_features,
            flow_layers=num_layers,
            nn_width=width,
            nn_depth=depth,
            nn_activation=activation,
        )
    return Flow(distribution)
