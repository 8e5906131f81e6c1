"""Priors: what parameters and initial conditions are drawn from."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


class AbstractPrior(eqx.Module):
    """A distribution over PyTrees.

    Whatever has `sample(key)` can stand in its place, distributions of distreqx,
    numpyro or flowjax as they are; `log_prob(value)` is needed only by who asks for it.

    To add one: a final class with `sample` of **one** draw, `log_prob` of one value, and
    its arrays as fields, which is all that `content_hash` needs.
    """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray) -> PyTree[Array]:
        """One draw, without batch axis."""

    @abc.abstractmethod
    def log_prob(self, value: PyTree[Array]) -> Float[Array, ""]:
        """Logarithm of the density at one value, -inf outside of the support."""

    def bounds(self) -> tuple[PyTree[Array], PyTree[Array]]:
        """Least and greatest values, like a draw; infinite where there is no bound."""
        like = jax.eval_shape(self.sample, jax.random.key(0))
        full = lambda x: jax.tree.map(lambda s: jnp.full(s.shape, x, s.dtype), like)  # noqa: E731
        return full(-jnp.inf), full(jnp.inf)


class BoxUniform(AbstractPrior):
    """Independent uniform entries on [low, high).

    Attributes:
        low: Lower bounds.
        high: Upper bounds, of a shape that broadcasts with that of `low`.

    Raises:
        ValueError: Bounds that are not finite or not increasing, or do not broadcast.

    Example:
        >>> import jax
        >>> from trainax_pk.data import BoxUniform
        >>> prior = BoxUniform([0.0, -1.0], [2.0, 1.0])
        >>> prior.sample(jax.random.key(0)).shape, float(prior.log_prob([1.0, 0.0]))
        ((2,), -1.3862943649291992)
    """

    low: Array
    high: Array

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = _broadcast("low", low, "high", high)
        _check("high", self.high, self.high > self.low, "greater than `low`")

    def sample(self, key: PRNGKeyArray) -> Array:
        """One draw."""
        low, high = self.low, self.high
        return jax.random.uniform(key, low.shape, low.dtype, minval=low, maxval=high)

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """-Σ log(high - low) inside of the box."""
        value = jnp.asarray(value)
        inside = jnp.all((value >= self.low) & (value < self.high))
        return jnp.where(inside, -jnp.sum(jnp.log(self.high - self.low)), -jnp.inf)

    def bounds(self) -> tuple[Array, Array]:
        """`(low, high)`."""
        return self.low, self.high


class LogUniform(AbstractPrior):
    """Independent entries whose logarithm is uniform: p(x) ∝ 1 / x on [low, high).

    Attributes:
        low: Lower bounds > 0.
        high: Upper bounds.

    Raises:
        ValueError: Bounds that are not positive or not increasing.

    Example:
        >>> import jax
        >>> from trainax_pk.data import LogUniform
        >>> draw = LogUniform(1e-4, 1e2).sample(jax.random.key(0))
        >>> bool(1e-4 <= draw < 1e2)
        True
    """

    low: Array
    high: Array

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = _broadcast("low", low, "high", high)
        _check("low", self.low, self.low > 0, "positive")
        _check("high", self.high, self.high > self.low, "greater than `low`")

    def sample(self, key: PRNGKeyArray) -> Array:
        """One draw."""
        low, high = jnp.log(self.low), jnp.log(self.high)
        u = jax.random.uniform(key, low.shape, low.dtype, minval=low, maxval=high)
        # The exponential may round past the bounds, where the density is 0.
        top = jnp.nextafter(self.high, self.low)
        return jnp.clip(jnp.exp(u), self.low, top)

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """-Σ log x + log log(high / low) inside of the bounds."""
        value = jnp.asarray(value)
        inside = (value >= self.low) & (value < self.high)
        safe = jnp.where(inside, value, self.low)
        density = -jnp.log(safe) - jnp.log(jnp.log(self.high / self.low))
        return jnp.where(jnp.all(inside), jnp.sum(density), -jnp.inf)

    def bounds(self) -> tuple[Array, Array]:
        """`(low, high)`."""
        return self.low, self.high


class Normal(AbstractPrior):
    """Independent normal entries.

    Attributes:
        mean: Means.
        std: Standard deviations > 0, of a shape that broadcasts with that of `mean`.

    Raises:
        ValueError: A standard deviation that is not positive.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Normal
        >>> Normal(jnp.zeros(3), 2.0).sample(jax.random.key(0)).shape
        (3,)
    """

    mean: Array
    std: Array

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = _broadcast("mean", mean, "std", std)
        _check("std", self.std, self.std > 0, "positive")

    def sample(self, key: PRNGKeyArray) -> Array:
        """One draw."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + self.std * noise

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """Σ log N(x; mean, std²)."""
        scaled = (jnp.asarray(value) - self.mean) / self.std
        return jnp.sum(-0.5 * scaled**2 - jnp.log(self.std) - 0.5 * np.log(2 * np.pi))


class MultivariateNormal(AbstractPrior):
    """A normal vector with correlated entries.

    Attributes:
        mean: `(n,)`.
        cholesky: Lower triangular factor of the covariance, `(n, n)`.

    Raises:
        ValueError: A covariance of another shape, not symmetric, or not positive
            definite.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import MultivariateNormal
        >>> prior = MultivariateNormal(jnp.zeros(2), jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> prior.sample(jax.random.key(0)).shape
        (2,)
    """

    mean: Array
    cholesky: Array

    def __init__(self, mean: Any, covariance: Any) -> None:
        """Factors the covariance.

        Args:
            mean: `(n,)`.
            covariance: `(n, n)`, symmetric and positive definite.
        """
        self.mean = _floating("mean", mean)
        matrix = _floating("covariance", covariance)
        if self.mean.ndim != 1 or matrix.shape != self.mean.shape * 2:
            raise ValueError(
                f"Expected a mean (n,) and a covariance (n, n), got {self.mean.shape} "
                f"and {matrix.shape}. Pass one row and column for each entry."
            )
        if not np.allclose(matrix, matrix.T):
            raise ValueError(
                f"Expected `covariance` to be symmetric, got {matrix}. Pass "
                "(covariance + covariance.T) / 2."
            )
        self.cholesky = jnp.linalg.cholesky(matrix)
        _check("covariance", matrix, jnp.isfinite(self.cholesky), "positive definite")

    def sample(self, key: PRNGKeyArray) -> Array:
        """One draw."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        # Not a matrix product, whose precision depends on the backend.
        return self.mean + jnp.sum(self.cholesky * noise[None], axis=1)

    def log_prob(self, value: Array) -> Float[Array, ""]:
        """log N(x; mean, covariance)."""
        residual = jnp.asarray(value) - self.mean
        white = jax.scipy.linalg.solve_triangular(self.cholesky, residual, lower=True)
        n = self.mean.shape[0]
        log_det = jnp.sum(jnp.log(jnp.diagonal(self.cholesky)))
        return -0.5 * jnp.sum(white**2) - log_det - 0.5 * n * np.log(2 * np.pi)


class Product(AbstractPrior):
    """Independent priors, gathered in a dictionary or a tuple.

    Attributes:
        parts: Priors by name, or a sequence of them. A draw has the same structure.

    Raises:
        ValueError: No parts, or one without `sample`.

    Example:
        >>> import jax
        >>> from trainax_pk.data import BoxUniform, LogUniform, Product
        >>> prior = Product({"where": BoxUniform([0, 0], [1, 1]), "rate": LogUniform(1, 9)})
        >>> sorted(prior.sample(jax.random.key(0)))
        ['rate', 'where']
    """

    parts: Any

    def __init__(self, parts: Mapping[str, Any] | Sequence[Any]) -> None:
        """Keeps the parts.

        Args:
            parts: Priors; names are sorted, so that order of insertion is irrelevant.
        """
        is_mapping = isinstance(parts, Mapping)
        self.parts = dict(sorted(parts.items())) if is_mapping else tuple(parts)
        members = list(self.parts.values()) if is_mapping else list(self.parts)
        if not members:
            raise ValueError("Expected priors, got none. Pass at least one.")
        for member in members:
            check_prior(member)

    def sample(self, key: PRNGKeyArray) -> PyTree[Array]:
        """A draw of each part, with keys of their own."""
        draws = [
            part.sample(jax.random.fold_in(key, i)) for i, (_, part) in self._items()
        ]
        if isinstance(self.parts, dict):
            return dict(zip(self.parts, draws, strict=True))
        return tuple(draws)

    def log_prob(self, value: PyTree[Array]) -> Float[Array, ""]:
        """Sum over the parts."""
        return sum(
            (part.log_prob(value[name]) for _, (name, part) in self._items()),
            jnp.zeros(()),
        )

    def bounds(self) -> tuple[PyTree[Array], PyTree[Array]]:
        """Bounds of the parts, in their structure."""
        pairs = {name: part.bounds() for _, (name, part) in self._items()}
        low, high = ({n: pair[i] for n, pair in pairs.items()} for i in (0, 1))
        if isinstance(self.parts, dict):
            return low, high
        return tuple(low.values()), tuple(high.values())

    def _items(self) -> list[tuple[int, tuple[Any, Any]]]:
        named = isinstance(self.parts, dict)
        pairs = self.parts.items() if named else enumerate(self.parts)
        return list(enumerate(pairs))


class Empirical(AbstractPrior):
    """Rows of arrays, each as likely as any other, drawn with replacement.

    Attributes:
        rows: PyTree with leaves `(num_rows, ...)`; a row is taken from all leaves alike.

    Raises:
        ValueError: Leaves of different lengths, or none.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Empirical
        >>> climate = Empirical({"t": jnp.arange(5.0), "u": jnp.ones((5, 3))})
        >>> climate.sample(jax.random.key(0))["u"].shape
        (3,)
    """

    rows: PyTree[Array]

    def __init__(self, rows: PyTree[Any]) -> None:
        """Keeps the rows.

        Args:
            rows: Leaves `(num_rows, ...)`.
        """
        self.rows = jax.tree.map(jnp.asarray, rows)
        lengths = {x.shape[:1] for x in jax.tree.leaves(self.rows)}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                "Expected leaves (num_rows, ...) with one number of rows >= 1, got the "
                f"leading axes {sorted(lengths)}. Pass the same rows in every leaf."
            )

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return jax.tree.leaves(self.rows)[0].shape[0]

    def sample(self, key: PRNGKeyArray) -> PyTree[Array]:
        """One row."""
        row = jax.random.randint(key, (), 0, self.num_rows)
        return jax.tree.map(lambda x: x[row], self.rows)

    def log_prob(self, value: PyTree[Array]) -> Float[Array, ""]:
        """Logarithm of the share of rows that equal the value (a mass, no density)."""
        matches = jax.tree.map(
            lambda rows, x: jnp.all(
                rows == jnp.asarray(x)[None], axis=tuple(range(1, rows.ndim))
            ),
            self.rows,
            value,
        )
        same = jnp.all(jnp.stack(jax.tree.leaves(matches)), axis=0)
        return jnp.log(jnp.mean(same))


def check_prior(prior: Any) -> Any:
    """Something that samples, or a ValueError."""
    if not callable(getattr(prior, "sample", None)):
        raise ValueError(
            f"Expected a prior with `sample(key)`, got {prior!r}. Pass a prior of "
            "tx.data, or a distribution that has it."
        )
    return prior


def _floating(name: str, value: Any) -> Array:
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"Expected `{name}` to be real, got {array.dtype}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    _check(name, array, jnp.isfinite(array), "finite")
    return array


def _broadcast(name: str, x: Any, other_name: str, y: Any) -> tuple[Array, Array]:
    x, y = _floating(name, x), _floating(other_name, y)
    try:
        shape = np.broadcast_shapes(x.shape, y.shape)
    except ValueError as error:
        raise ValueError(
            f"Expected `{name}` and `{other_name}` of shapes that broadcast, got "
            f"{x.shape} and {y.shape}. Pass one value for each entry, or a scalar."
        ) from error
    dtype = jnp.result_type(x, y)
    return tuple(jnp.broadcast_to(a.astype(dtype), shape) for a in (x, y))


def _check(name: str, value: Array, holds: Array, what: str) -> None:
    # Traced values, as under vmap over priors, cannot be looked at.
    if isinstance(holds, jax.core.Tracer):
        return
    if not np.asarray(holds).all():
        raise ValueError(
            f"Expected `{name}` to be {what}, got {value}. Pass other values."
        )
