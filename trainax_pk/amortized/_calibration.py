"""Is a posterior calibrated? Ranks and coverage, with p-values."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count
from trainax_pk.amortized._pairs import as_pairs


class RankReport(eqx.Module):
    """Ranks of the truth among draws, uniform on [0, 1] for a calibrated posterior.

    Attributes:
        ranks: Shares in (0, 1), `(N, m)`: for each pair and each of m quantities.
        p_values: Of the χ² test of uniformity, `(m,)`.
        names: Of the quantities.
    """

    ranks: Float[Array, "N m"]
    p_values: Float[Array, " m"]
    names: tuple[str, ...] = eqx.field(static=True)


class CoverageReport(eqx.Module):
    """How often regions of given credibility hold the truth.

    Attributes:
        levels: Credibilities, `(n,)`.
        coverage: Share of pairs whose truth lies within, `(n,)`; `levels` if calibrated,
            below where the posterior is too narrow.
        ranks: Smallest credibility that holds the truth, `(N,)`, uniform if calibrated.
        p_value: Of the χ² test of uniformity.
    """

    levels: Float[Array, " n"]
    coverage: Float[Array, " n"]
    ranks: Float[Array, " N"]
    p_value: Float[Array, ""]


def simulation_based_calibration(
    posterior: Any,
    pairs: Any,
    *,
    key: PRNGKeyArray,
    num_samples: int = 255,
    num_bins: int = 20,
    statistics: dict[str, Callable[..., Array]] | None = None,
) -> RankReport:
    """Ranks of each parameter, and of test statistics, of θ among draws of q(· | x).

    With pairs from the prior and the simulator these ranks are uniform if q is the
    posterior. A ∪ shape of their histogram says too narrow, a ∩ too wide, a slope
    shifted. Parameters alone miss errors that do not move margins (q = prior passes):
    statistics of θ and x, the log-density among them, do see these. Ties are broken at
    random. Costs num_samples draws per pair, all vmapped over pairs.

    Args:
        posterior: `sample(key, x, n, mask)` of one observation.
        pairs: Fresh pairs (θ, x), as a configuration takes them.
        key: Key.
        num_samples: Draws for each pair.
        num_bins: Bins of the χ² test; at least 5 pairs per bin.
        statistics: By name, `(theta, x) -> scalar` of one sample.

    Returns:
        Ranks and p-values: of `theta[i]`, then of the statistics.

    Raises:
        ValueError: A count out of range, fewer than 5 pairs per bin.

    Source: Talts et al. 2018, arXiv:1804.06788; statistics: Modrák et al. 2023,
    arXiv:2211.02383.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> x = jax.random.normal(jax.random.key(1), (200, 3))
        >>> theta = jax.vmap(lambda k, x: posterior.sample(k, x, 1)[0])(
        ...     jax.random.split(jax.random.key(2), 200), x
        ... )
        >>> report = tx.amortized.simulation_based_calibration(
        ...     posterior, (theta, x), key=jax.random.key(3), num_samples=63
        ... )
        >>> report.names, bool(jnp.all(report.p_values > 1e-3))
        (('theta[0]', 'theta[1]'), True)
    """
    theta, x, mask = _checked(pairs, num_samples, num_bins)
    functions = tuple((statistics or {}).items())
    ranks = _parameter_ranks(posterior, (theta, x, mask), key, functions, num_samples)
    count = ranks.shape[1] - len(functions)
    names = [f"theta[{i}]" for i in range(count)] + [name for name, _ in functions]
    p_values = jnp.stack([uniformity_p_value(r, num_bins) for r in ranks.T])
    return RankReport(ranks, p_values, tuple(names))


def expected_coverage(
    posterior: Any,
    pairs: Any,
    *,
    key: PRNGKeyArray,
    num_samples: int = 255,
    num_bins: int = 20,
    levels: Any = None,
) -> CoverageReport:
    """Coverage of highest-density regions: share of draws denser than the truth.

    Args:
        posterior: `sample(key, x, n, mask)` and `log_prob(theta, x, mask)`.
        pairs: Fresh pairs (θ, x).
        key: Key.
        num_samples: Draws for each pair.
        num_bins: Bins of the χ² test; at least 5 pairs per bin.
        levels: Credibilities; None for 0.05, 0.10, … 0.95.

    Returns:
        Coverage at the levels, and a p-value.

    Raises:
        ValueError: As `simulation_based_calibration`; levels outside of (0, 1).

    Source: Hermans et al. 2022, arXiv:2110.06581.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> x = jax.random.normal(jax.random.key(1), (200, 3))
        >>> report = tx.amortized.expected_coverage(
        ...     posterior, (jnp.zeros((200, 2)), x), key=jax.random.key(2)
        ... )
        >>> report.coverage.shape
        (19,)
    """
    levels = _checked_levels(levels)
    rows = _checked(pairs, num_samples, num_bins)
    return _coverage(
        _density_ranks(posterior, rows, key, num_samples), num_bins, levels
    )


def tarp(
    posterior: Any,
    pairs: Any,
    *,
    key: PRNGKeyArray,
    num_samples: int = 255,
    num_bins: int = 20,
    levels: Any = None,
    bounds: tuple[Any, Any] | None = None,
) -> CoverageReport:
    """Tests of accuracy with random points: coverage of balls around random places.

    For a reference r drawn apart from θ, the share of draws nearer to r than the truth is
    uniform if q is the posterior, for every distribution of r only then. No density is
    asked for. Distances are of θ scaled by its range.

    Args:
        posterior: `sample(key, x, n, mask)`.
        pairs: Fresh pairs (θ, x).
        key: Key.
        num_samples: Draws for each pair.
        num_bins: Bins of the χ² test; at least 5 pairs per bin.
        levels: Credibilities; None for 0.05, 0.10, … 0.95.
        bounds: Box that references are drawn from, each like one θ; None for the range of
            θ in the pairs.

    Returns:
        Coverage at the levels, and a p-value.

    Raises:
        ValueError: As `expected_coverage`.

    Source: Lemos et al. 2023, arXiv:2302.03026.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> x = jax.random.normal(jax.random.key(1), (200, 3))
        >>> theta = jax.random.normal(jax.random.key(2), (200, 2))
        >>> tx.amortized.tarp(posterior, (theta, x), key=jax.random.key(3)).levels.shape
        (19,)
    """
    levels = _checked_levels(levels)
    theta, x, mask = _checked(pairs, num_samples, num_bins)
    flat = jax.vmap(lambda t: ravel_pytree(t)[0])(theta)
    if bounds is None:
        low, high = flat.min(axis=0), flat.max(axis=0)
    else:
        low, high = (ravel_pytree(bound)[0].astype(flat.dtype) for bound in bounds)
    rows = (theta, x, mask)
    ranks = _distance_ranks(posterior, rows, key, (low, high), num_samples)
    return _coverage(ranks, num_bins, levels)


def uniformity_p_value(
    ranks: Float[Array, " N"], num_bins: int = 20
) -> Float[Array, ""]:
    """p-value of Pearson's χ² test that numbers are uniform on [0, 1].

    Args:
        ranks: Numbers in [0, 1].
        num_bins: Bins of equal width.

    Returns:
        Scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import uniformity_p_value
        >>> float(uniformity_p_value(jnp.linspace(0, 1, 1000))) > 0.99
        True
    """
    # In bins and not by the largest gap of the distribution functions, which is blind to
    # tails, where a posterior that is too narrow shows.
    counts = jnp.histogram(ranks, bins=num_bins, range=(0.0, 1.0))[0]
    expected = ranks.shape[0] / num_bins
    statistic = jnp.sum((counts - expected) ** 2) / expected
    return jax.scipy.special.gammaincc((num_bins - 1) / 2, statistic / 2)


# Compiled once for all posteriors of a structure: diagnostics are run again and again.


@eqx.filter_jit
def _parameter_ranks(
    posterior: Any,
    rows: Any,
    key: PRNGKeyArray,
    functions: tuple[tuple[str, Callable[..., Array]], ...],
    num_samples: int,
) -> Float[Array, "N m"]:
    def one(key: PRNGKeyArray, theta: Any, x: Array, mask: Array | None) -> Array:
        draw_key, tie_key = jax.random.split(key)
        draws = posterior.sample(draw_key, x, num_samples, mask)

        def quantities(theta: Any) -> Array:
            own = [f(theta, x)[None] for _, f in functions]
            return jnp.concatenate([ravel_pytree(theta)[0], *own])

        return _ranks(tie_key, quantities(theta), jax.vmap(quantities)(draws))

    return _vmap_pairs(one, key, *rows)


@eqx.filter_jit
def _density_ranks(
    posterior: Any, rows: Any, key: PRNGKeyArray, num_samples: int
) -> Float[Array, " N"]:
    def one(key: PRNGKeyArray, theta: Any, x: Array, mask: Array | None) -> Array:
        draw_key, tie_key = jax.random.split(key)
        draws = posterior.sample(draw_key, x, num_samples, mask)
        density = lambda t: posterior.log_prob(t, x, mask)  # noqa: E731
        others = jax.vmap(density)(draws)[:, None]
        # Of the truth among draws by density: the share that lies above it.
        return 1 - _ranks(tie_key, density(theta)[None], others)[0]

    return _vmap_pairs(one, key, *rows)


@eqx.filter_jit
def _distance_ranks(
    posterior: Any,
    rows: Any,
    key: PRNGKeyArray,
    box: tuple[Array, Array],
    num_samples: int,
) -> Float[Array, " N"]:
    low, high = box
    width = jnp.where(high > low, high - low, 1.0)

    def one(key: PRNGKeyArray, theta: Any, x: Array, mask: Array | None) -> Array:
        draw_key, place_key, tie_key = jax.random.split(key, 3)
        draws = posterior.sample(draw_key, x, num_samples, mask)
        place = low + width * jax.random.uniform(place_key, low.shape, low.dtype)
        distance = lambda t: jnp.sum(  # noqa: E731
            ((ravel_pytree(t)[0] - place) / width) ** 2
        )
        others = jax.vmap(distance)(draws)[:, None]
        return _ranks(tie_key, distance(theta)[None], others)[0]

    return _vmap_pairs(one, key, *rows)


def _ranks(
    key: PRNGKeyArray, truth: Float[Array, " m"], others: Float[Array, "n m"]
) -> Float[Array, " m"]:
    """Place of the truth among the others, uniform on (0, 1) if it is one of them."""
    below = jnp.sum(others < truth[None], axis=0)
    ties = jnp.sum(others == truth[None], axis=0)
    # n + 1 places, of which the truth takes one at random within its ties; a rank anywhere
    # within its place has no lumps that bins could cut.
    place = below + (ties + 1) * jax.random.uniform(key, truth.shape, truth.dtype)
    return place / (others.shape[0] + 1)


def _vmap_pairs(
    one: Any, key: PRNGKeyArray, theta: Any, x: Array, mask: Array | None
) -> Array:
    keys = jax.random.split(key, x.shape[0])
    if mask is None:
        step = lambda row: one(row[0], row[1], row[2], None)  # noqa: E731
        rows = (keys, theta, x)
    else:
        step, rows = (lambda row: one(*row)), (keys, theta, x, mask)
    # Blocks, since draws of all pairs at once may not fit.
    return jax.lax.map(step, rows, batch_size=min(128, x.shape[0]))


def _coverage(ranks: Array, num_bins: int, levels: np.ndarray) -> CoverageReport:
    levels = jnp.asarray(levels, ranks.dtype)
    coverage = jnp.mean(ranks[None] <= levels[:, None], axis=1)
    return CoverageReport(levels, coverage, ranks, uniformity_p_value(ranks, num_bins))


def _checked_levels(levels: Any) -> np.ndarray:
    levels = np.arange(1, 20) / 20 if levels is None else np.asarray(levels, float)
    if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(
            f"Expected `levels` between 0 and 1, got {levels}. Pass for example "
            "[0.5, 0.8, 0.95]."
        )
    return levels


def _checked(pairs: Any, num_samples: int, num_bins: int) -> Any:
    theta, x, mask = as_pairs(pairs)
    check_count("num_samples", num_samples)
    check_count("num_bins", num_bins, minimum=2)
    if x.shape[0] < 5 * num_bins:
        raise ValueError(
            f"Expected at least {5 * num_bins} pairs for num_bins={num_bins}, got "
            f"{x.shape[0]}. A χ² test wants 5 or more per bin: simulate more, or pass "
            "fewer bins."
        )
    return jax.tree.map(jnp.asarray, theta), x, mask
