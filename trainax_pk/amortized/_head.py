"""What a head is: a density of a vector given features."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count


class AbstractHead(eqx.Module):
    """Conditional density h(z | f) on ℝᵈ, given features f of what was observed.

    To add one: a final class with the fields below and what it learns, `log_prob` and
    `sample` of **one** sample, both differentiable. Bounds, standardisation and batches
    are not its business. Add a row to `HEADS` in `tests/test_amortized_heads.py`:
    densities are integrated and compared with samples there.

    Attributes:
        dim: d.
        num_features: Length of f.
        reparametrised: Whether draws move with everything that is learned; false where
            something is picked by a learned probability, of which a draw has no gradient.
    """

    dim: eqx.AbstractVar[int]
    num_features: eqx.AbstractVar[int]
    reparametrised: ClassVar[bool] = True

    @abc.abstractmethod
    def log_prob(
        self, z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, ""]:
        """log h(z | f)."""

    @abc.abstractmethod
    def sample(
        self, key: PRNGKeyArray, features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """One draw of h(· | f)."""


def make_network(
    num_features: Any,
    num_outputs: int,
    width: Any,
    depth: Any,
    activation: Callable[[Array], Array],
    key: PRNGKeyArray,
) -> eqx.nn.MLP:
    """A perceptron, its numbers checked."""
    check_count("num_features", num_features)
    check_count("width", width)
    check_count("depth", depth, minimum=0)
    return eqx.nn.MLP(
        num_features, num_outputs, width, depth, activation=activation, key=key
    )


def positive(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softplus shifted so that 0 becomes 1; grows linearly, where exp would explode."""
    return jax.nn.softplus(x + jnp.log(jnp.expm1(1.0)).astype(x.dtype))


def typed_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """A key of either style as a typed one."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
