"""What is known of a state before it is observed."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trainax_pk._tree import check_count, is_concrete


class AbstractPrior(eqx.Module):
    """A projection Φ onto plausible states: ‖x − Φ(x)‖² is the cost of being none.

    Any function of one state can stand in its place; the class adds nothing but a name.

    To add one: subclass, declare what is trained as fields, check the options, and
    implement `__call__` on one sample, differentiable twice (the cost's gradient is
    differentiated in training). Weights should not depend on the number of points, so
    that what was trained on patches runs on whole fields. Then add a row to the table
    of priors in `tests/test_solver_networks.py`.
    """

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        """Φ(x) of one state `(T, *space)`, of the same shape."""


class IdentityPrior(AbstractPrior):
    """Φ(x) = x: nothing is known, and the cost is that of the observations alone.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import IdentityPrior
        >>> IdentityPrior()(jnp.ones((2, 3))).shape
        (2, 3)
    """

    def __call__(self, x: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        """The state itself."""
        return x


class DynamicalPrior(AbstractPrior):
    """Φ from a model of the dynamics: Φ(x)_{t+1} = M(x_t), Φ(x)_0 = x_0.

    With weights w_t, Φ(x)_t = x_t + √w_t (M(x_{t−1}) − x_t), so that

        ‖x − Φ(x)‖² = Σ_{t>0} w_t ‖x_t − M(x_{t−1})‖²,

    the model-error term of weak-constraint 4D-Var (Trémolet 2006,
    doi:10.1256/qj.05.224). States may be standardised, z = (u − offset) / scale, while
    the stepper works on u.

    A stepper with arrays (a network) is trained along with the rest. The derivative with
    respect to `offset`, `scale` and the weights is 0, so that they stay (exclude them by
    `trainable` where the optimizer decays weights). Compute is `num_steps` calls of the
    stepper at each time, all times at once.

    Attributes:
        stepper: `u -> u_next` on one state, such as
            `tx.sample_data.make_lorenz_63_stepper()`.
        num_steps: Steps of the stepper between two times.
        time_weights: `(T − 1,)`, w_1 … w_{T−1} >= 0, or None for ones.
        offset: Added to `scale · z`: a number, or of the shape of one state.
        scale: Number or array that is not 0.

    Raises:
        ValueError: A stepper that is not callable or changes the shape, a count below
            1, a scale of 0, negative or too few weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import DynamicalPrior
        >>> decay = DynamicalPrior(lambda u: u / 2)
        >>> decay(jnp.array([[4.0], [0.0], [6.0]]))[:, 0].tolist()
        [4.0, 2.0, 0.0]
    """

    stepper: Callable[[Array], Array]
    time_weights: Array | None
    offset: Array
    scale: Array
    num_steps: int = eqx.field(static=True)

    def __init__(
        self,
        stepper: Callable[[Array], Array],
        *,
        num_steps: int = 1,
        time_weights: Any = None,
        offset: Any = 0.0,
        scale: Any = 1.0,
    ) -> None:
        if not callable(stepper):
            raise ValueError(
                f"Expected `stepper` to be a function u -> u_next, got {stepper!r}."
            )
        self.stepper = stepper
        self.num_steps = check_count("num_steps", num_steps)
        self.offset, self.scale = jnp.asarray(offset), jnp.asarray(scale)
        self.time_weights = None if time_weights is None else jnp.asarray(time_weights)
        # Inside jit, arrays of numbers that are known would be traced by JAX's checks.
        known = is_concrete(scale) and is_concrete(time_weights)
        if known and not (np.isfinite(scale).all() and np.all(np.asarray(scale) != 0)):
            raise ValueError(
                f"Expected `scale` to be finite and not 0, got {scale!r}. Pass the "
                "standard deviation of the states."
            )
        if (
            known
            and time_weights is not None
            and not np.all(np.asarray(time_weights) >= 0)
        ):
            raise ValueError(
                f"Expected `time_weights` >= 0, got {time_weights!r}. A weight of 0 "
                "leaves a step free."
            )

    def __call__(self, x: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        """Φ(x) of one window of T times."""
        u = self._physical(x[:-1])
        ahead = jax.vmap(self._advance)(u)
        if ahead.shape != u.shape:
            raise ValueError(
                f"Expected a stepper that keeps the shape {list(u.shape[1:])} of a "
                f"state, got {list(ahead.shape[1:])}. Pass u -> u_next of one state."
            )
        ahead = self._standard(ahead).astype(x.dtype)
        if self.time_weights is not None:
            ahead = x[1:] + self._roots(x) * (ahead - x[1:])
        return jnp.concatenate([x[:1], ahead])

    def propagators(
        self, x: Float[Array, "T ..."]
    ) -> tuple[Float[Array, "T-1 n n"], Float[Array, "T-1"]]:
        """∂Φ(x)_{t+1}/∂x_t without weights, and √w_{t+1}, of n = prod(space) entries.

        One direction of the linearised stepper for each entry and time.
        """
        n = x[0].size

        def ahead(x: Array) -> Array:
            u = self._physical(x.reshape(shape))
            return self._standard(self._advance(u)).astype(x.dtype).reshape(n)

        shape = x.shape[1:]
        matrices = jax.vmap(jax.jacfwd(ahead))(x[:-1].reshape(-1, n))
        if self.time_weights is None:
            return matrices, jnp.ones(x.shape[0] - 1, x.dtype)
        return matrices, self._roots(x).reshape(-1)

    def _advance(self, u: Array) -> Array:
        if self.num_steps == 1:
            return self.stepper(u)
        step = lambda u, _: (self.stepper(u).astype(u.dtype), None)  # noqa: E731
        return jax.lax.scan(step, u, length=self.num_steps)[0]

    def _roots(self, x: Array) -> Array:
        weights = jax.lax.stop_gradient(self.time_weights)
        if weights.shape != (x.shape[0] - 1,):
            raise ValueError(
                f"Expected {x.shape[0] - 1} `time_weights` for a window of {x.shape[0]} "
                f"times, got the shape {list(weights.shape)}. Pass one for each step."
            )
        roots = jnp.sqrt(weights).astype(x.dtype)
        return roots.reshape(-1, *(1 for _ in x.shape[1:]))

    def _constants(self, x: Array) -> tuple[Array, Array]:
        constants = jax.lax.stop_gradient((self.offset, self.scale))
        return tuple(jnp.broadcast_to(c.astype(x.dtype), x.shape) for c in constants)

    def _physical(self, x: Array) -> Array:
        offset, scale = self._constants(x)
        return offset + scale * x

    def _standard(self, u: Array) -> Array:
        offset, scale = self._constants(u)
        return (u - offset) / scale


def check_prior(prior: Any) -> Callable[[Array], Array]:
    """A function of one state, or a ValueError."""
    if not callable(prior):
        raise ValueError(
            f"Expected `prior` to be a function x -> Φ(x) of one state, got {prior!r}. "
            "Pass for example tx.solver.IdentityPrior()."
        )
    return prior
