"""Does what a posterior predicts look like what was observed?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count
from trainax_pk.amortized._pairs import observed


def posterior_predictive(
    posterior: Any,
    simulator: Callable[[PRNGKeyArray, PyTree[Array]], Array],
    x: Float[Array, "..."],
    *,
    key: PRNGKeyArray,
    num_samples: int = 1000,
    statistics: dict[str, Callable[[Array], Array]],
    mask: Any = None,
) -> dict[str, tuple[Float[Array, ""], Float[Array, " n"]]]:
    """Whether what the posterior predicts looks like what was observed.

    Args:
        posterior: `sample(key, x, n, mask)`.
        simulator: `(key, theta) -> x`.
        x: One observation.
        key: Key.
        num_samples: Simulations from draws of the posterior.
        statistics: By name, `x -> scalar`.
        mask: Which entries were observed, or None; statistics then see zeros in the gaps,
            of simulations too.

    Returns:
        By name: the two-sided p-value 2 min(P(T_rep <= T_obs), P(T_rep >= T_obs)), at most
        1, and T of the simulations, `(n,)`.

    Raises:
        ValueError: No statistics, a count below 1.

    Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(1, 3, key=jax.random.key(0)),
        ... )
        >>> simulate = lambda key, theta: theta + 9 + jax.random.normal(key, (3,))
        >>> checks = tx.amortized.posterior_predictive(
        ...     posterior, simulate, jnp.zeros(3), key=jax.random.key(1),
        ...     statistics={"mean": jnp.mean},
        ... )
        >>> bool(checks["mean"][0] < 0.01)  # nothing of the kind was predicted
        True
    """
    check_count("num_samples", num_samples)
    if not statistics:
        raise ValueError(
            "Expected at least one statistic, got none. Pass {'mean': jnp.mean}, say."
        )

    @eqx.filter_jit
    def run(posterior: Any, x: Array, key: PRNGKeyArray) -> dict[str, Any]:
        x = observed(x, mask)
        draw_key, key = jax.random.split(key)
        draws = posterior.sample(draw_key, x, num_samples, mask)
        simulated = jax.vmap(simulator)(jax.random.split(key, num_samples), draws)
        if mask is not None:
            simulated = jnp.where(mask[None], simulated, 0.0)
        out = {}
        for name, statistic in statistics.items():
            seen, made = statistic(x), jax.vmap(statistic)(simulated)
            tails = jnp.mean(made <= seen), jnp.mean(made >= seen)
            out[name] = (jnp.minimum(2 * jnp.minimum(*tails), 1.0), made)
        return out

    return run(posterior, x, key)
