"""Where parameters may lie, and the bijection from there to all reals."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import is_concrete
from trainax_pk.amortized._frozen import Frozen

# Ratio of positive bounds above which a box is looked at in logarithms.
_WIDE = 100.0


class Support(eqx.Module):
    """Bijection of a prior's support, entry by entry, onto ℝᵈ.

    z = log(θ − l) − log(u − θ) between two bounds, log(θ − l) above one, −log(u − θ)
    below one, θ without bounds. What is made of any z lies strictly within the bounds, in
    floating point too, so that a density on z leaks no mass outside.

    Attributes:
        low: Lower bounds, `(d,)`, -inf where there is none.
        high: Upper bounds, `(d,)`, inf where there is none.
        structure: Of θ, which may be any PyTree.
        shapes: Of its leaves.

    Raises:
        ValueError: Bounds that do not increase, or so far apart that their distance
            overflows.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.BoxUniform([0.0, 0.0], [1.0, 4.0])
        >>> support = tx.amortized.Support(*prior.bounds())
        >>> z, log_det = support.unconstrain(jnp.array([0.5, 2.0]))
        >>> z.tolist(), support.constrain(z).tolist()
        ([0.0, 0.0], [0.5, 2.0])
    """

    low: Frozen
    high: Frozen
    structure: Any = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(self, low: PyTree[Any], high: PyTree[Any]) -> None:
        """Keeps the bounds.

        Args:
            low: Like one θ.
            high: Likewise.
        """
        dtype = jnp.result_type(float)
        low = jax.tree.map(lambda x: jnp.asarray(x, dtype), low)
        high = jax.tree.map(lambda x: jnp.asarray(x, dtype), high)
        self.structure, self.shapes = jax.tree.structure(low), _shapes(low)
        flat_low, flat_high = ravel_pytree(low)[0], ravel_pytree(high)[0]
        fits = flat_low.shape == flat_high.shape
        known = fits and is_concrete(flat_low) and is_concrete(flat_high)
        # By NumPy: where a program is traced, JAX would compare them later.
        ends = np.stack([flat_low, flat_high]) if known else np.array([[0.0], [1.0]])
        if not fits or not np.all(ends[0] < ends[1]):
            raise ValueError(
                f"Expected lower bounds below the upper ones, got {flat_low} and "
                f"{flat_high}. Pass those of a prior: `prior.bounds()`."
            )
        ends = ends[:, np.isfinite(ends).all(axis=0)]
        with np.errstate(over="ignore"):
            width = np.diff(ends, axis=0)
        if not np.all(np.isfinite(width)):
            raise ValueError(
                f"Expected bounds whose distance is finite in {dtype}, got {flat_low} and "
                f"{flat_high}. Pass infinite ones where there are none, or parameters in "
                "other units."
            )
        self.low, self.high = Frozen(flat_low), Frozen(flat_high)

    @property
    def dim(self) -> int:
        """Number d of parameters."""
        return self.low.bits.shape[0]

    def ravel(self, theta: PyTree[Array]) -> Float[Array, " d"]:
        """One θ as a vector.

        Raises:
            ValueError: Another structure or other shapes than the support's.
        """
        if (jax.tree.structure(theta), _shapes(theta)) != (self.structure, self.shapes):
            raise ValueError(
                f"Expected parameters {self.structure} of the shapes {self.shapes}, got "
                f"{jax.tree.structure(theta)} of {_shapes(theta)}. Pass one sample, shaped "
                "as the prior draws it (jax.vmap for a batch)."
            )
        return ravel_pytree(theta)[0]

    def unravel(self, vector: Float[Array, " d"]) -> PyTree[Array]:
        """A vector as the θ that `ravel` made it of."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = jnp.split(vector, np.cumsum(sizes)[:-1])
        leaves = [x.reshape(s) for x, s in zip(parts, self.shapes, strict=True)]
        return self.structure.unflatten(leaves)

    def unconstrain(
        self, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """z(θ) and log |det dz/dθ|, which is -inf outside of the support."""
        low, high, both, lower, upper = self._bounds(theta.dtype)
        inside = (theta >= low) & (theta <= high)
        # Gradients flow through both sides of a selection: what is not selected must
        # be finite as well.
        theta = jnp.where(inside, theta, self._middle(theta.dtype))
        least, most = self._limits(theta.dtype)
        # A bound itself, which a uniform draw hits once in 2²³, counts as its neighbour
        # among such draws. Closer ones are kept: a small lower bound has digits there.
        margin = jnp.finfo(theta.dtype).eps * jnp.where(both, high - low, 0.0)
        theta = jnp.where(theta <= low, jnp.maximum(least, low + margin), theta)
        theta = jnp.where(theta >= high, jnp.minimum(most, high - margin), theta)
        theta = jnp.clip(theta, least, most)
        above = jnp.where(both | lower, theta - low, 1.0)
        below = jnp.where(both | upper, high - theta, 1.0)
        width = jnp.where(both, high - low, 1.0)
        free = ~(both | lower | upper)
        z = jnp.where(free, theta, jnp.log(above) - jnp.log(below))
        log_det = jnp.sum(jnp.log(width) - jnp.log(above) - jnp.log(below))
        return z, jnp.where(jnp.all(inside), log_det, -jnp.inf)

    def constrain(self, z: Float[Array, " d"]) -> Float[Array, " d"]:
        """θ(z), strictly within the bounds."""
        low, high, both, lower, upper = self._bounds(z.dtype)
        base, top = (
            jnp.where(both | lower, low, 0.0),
            jnp.where(both | upper, high, 0.0),
        )
        # From the nearer end, where digits are.
        part = jnp.where(both, top - base, 0.0) * jax.nn.sigmoid(
            jnp.where(z < 0, z, -z)
        )
        between = jnp.where(z < 0, base + part, top - part)
        grown = jnp.exp(jnp.where(lower, z, jnp.where(upper, -z, 0.0)))
        one_sided = jnp.where(lower, base + grown, top - grown)
        theta = jnp.where(both, between, jnp.where(lower | upper, one_sided, z))
        return jnp.clip(theta, *self._limits(z.dtype))

    def log_slope(self, z: Float[Array, " d"]) -> Float[Array, ""]:
        """log |det dθ/dz|, from z.

        It falls without end towards the bounds, where θ is rounded and what
        `unconstrain` tells of it stays the same: a density on z is to be built with this.
        """
        low, high, both, lower, upper = self._bounds(z.dtype)
        width = jnp.where(both, high - low, 1.0)
        between = jnp.log(width) - jax.nn.softplus(z) - jax.nn.softplus(-z)
        one_sided = jnp.where(lower, z, jnp.where(upper, -z, 0.0))
        return jnp.sum(jnp.where(both, between, one_sided))

    def level(
        self, theta: Float[Array, " d"], z: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """√12 (θ − (l + u) / 2) / (u − l) of entries between two bounds, else those of z.

        What a density may be conditioned on: θ as evenly as a uniform prior draws it, where
        z would stretch the ends of the box. Between positive bounds of a ratio above 100,
        the logarithms of θ, l and u take their places: on a linear scale most of what a
        log-uniform prior draws would be one number.
        """
        low, high, both, _, _ = self._bounds(theta.dtype)
        low, high = jnp.where(both, low, -1.0), jnp.where(both, high, 1.0)
        wide = both & (low > 0) & (high / _WIDE > low)
        log = lambda x: jnp.log(jnp.where(wide, x, 1.0))  # noqa: E731
        low = jnp.where(wide, log(low), low)
        high = jnp.where(wide, log(high), high)
        theta = jnp.where(wide, log(jnp.where(theta > 0, theta, 1.0)), theta)
        # Halved before they are added: bounds may be as large as numbers get.
        middle, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        return jnp.where(both, math.sqrt(3) * (theta - middle) / half, z)

    def _limits(self, dtype: Any) -> tuple[Array, Array]:
        """The numbers next to the bounds."""
        low, high = self._bounds(dtype)[:2]
        # nextafter(0) is denormal, which a CPU may flush to 0.
        tiny = jnp.finfo(dtype).tiny
        least = jnp.maximum(jnp.nextafter(low, high), low + tiny)
        return least, jnp.minimum(jnp.nextafter(high, low), high - tiny)

    def _bounds(self, dtype: Any) -> tuple[Array, ...]:
        low, high = self.low.value.astype(dtype), self.high.value.astype(dtype)
        has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
        return low, high, has_low & has_high, has_low & ~has_high, ~has_low & has_high

    def _middle(self, dtype: Any) -> Array:
        low, high, both, lower, upper = self._bounds(dtype)
        base, top = (
            jnp.where(both | lower, low, 0.0),
            jnp.where(both | upper, high, 0.0),
        )
        middle = 0.5 * base + 0.5 * top
        return jnp.where(both, middle, base + top + lower - upper)


def _shapes(tree: PyTree[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(jnp.shape(x) for x in jax.tree.leaves(tree))


def unbounded(dim: int) -> Support:
    """The support ℝᵈ of a vector.

    Args:
        dim: d.

    Returns:
        The support.
    """
    return Support(jnp.full(dim, -jnp.inf), jnp.full(dim, jnp.inf))


def support_of(prior: Any) -> Support:
    """Support of a prior.

    Args:
        prior: Anything with `bounds() -> (low, high)`, each like a draw.

    Returns:
        The support.

    Raises:
        ValueError: A prior without bounds.
    """
    if not callable(getattr(prior, "bounds", None)):
        raise ValueError(
            f"Expected a prior with `bounds()`, got {prior!r}. Pass a prior of tx.data, "
            "or give yours that method; infinite bounds are none."
        )
    return Support(*prior.bounds())
