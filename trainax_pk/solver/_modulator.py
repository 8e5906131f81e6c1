"""How the gradient of the variational cost becomes a step."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk.solver._cost import Weight


class AbstractGradMod(eqx.Module):
    """Turns a gradient into a step: x_{n+1} = x_n − δ_n, (δ_n, s_{n+1}) = m(∇U, x_n, s_n).

    Of one sample; solvers map over the batch. The state s is handed on from step to
    step; a modulator without one has a fixed rule, and only those have fixed points that
    can be differentiated implicitly.

    To add one: subclass, declare what is trained as fields, implement `init`, which
    gives s_0 (None if there is none), and `__call__`, which must keep shape and dtype of
    the gradient and structure, shapes and dtypes of the state. Normalise with
    `rms_scale`, which knows what to do with a gradient of 0. Then add a row to the table
    of modulators in `tests/test_solver_networks.py`.
    """

    @abc.abstractmethod
    def init(self, x: Float[Array, "T ..."]) -> PyTree[Array]:
        """State before the first step."""

    @abc.abstractmethod
    def __call__(
        self, gradient: Float[Array, "T ..."], x: Float[Array, "T ..."], state: Any
    ) -> tuple[Float[Array, "T ..."], Any]:
        """Step and new state.

        Args:
            gradient: ∇U(x), `(T, *space)`.
            x: Where it was taken.
            state: What the last call returned.

        Returns:
            What is subtracted from x, and the state of the next step.
        """


class GradientDescent(AbstractGradMod):
    """δ = η ∇U: plain gradient descent with one step size.

    Contracts where 0 < η < 2/L with L the largest eigenvalue of the cost's Hessian. For
    identity observations and prior weight w_p, L is between 2 and 2 w_o + 2 w_p ‖1 − Φ'‖².

    Attributes:
        step_size: η, fixed, or learned and kept positive.

    Raises:
        ValueError: A step size that is not a positive number.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import GradientDescent
        >>> GradientDescent(0.5)(jnp.array([[4.0]]), jnp.zeros((1, 1)), None)[0]
        Array([[2.]], dtype=float32)
    """

    step_size: Weight

    def __init__(self, step_size: float = 0.1, *, learned: bool = False) -> None:
        self.step_size = positive_factor("step_size", step_size, learned=learned)

    def init(self, x: Float[Array, "T ..."]) -> None:
        """None."""

    def __call__(
        self, gradient: Float[Array, "T ..."], x: Float[Array, "T ..."], state: None
    ) -> tuple[Float[Array, "T ..."], None]:
        """η ∇U."""
        return (self.step_size.value() * gradient).astype(gradient.dtype), None


class MLPGradMod(AbstractGradMod):
    """δ_i = η g_i (1 + tanh f(g_i, x_i)): a step size for every entry, by a network.

    f is a perceptron from two numbers to one, the same for all entries, so that it works
    for states of any shape. The factor lies in (0, 2): without normalisation the fixed
    points are exactly those of the cost, ∇U = 0. With it, g = ∇U / rms(∇U) of the sample
    and steps keep their length until the end, which suits a given number of steps.

    Attributes:
        network: f.
        step_size: η, learned, kept positive.
        normalise: Whether the gradient is divided by its root mean square.

    Raises:
        ValueError: A width or depth below 1, a step size that is not positive.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import MLPGradMod
        >>> modulator = MLPGradMod(8, key=jax.random.key(0))
        >>> modulator(jnp.ones((5, 3)), jnp.zeros((5, 3)), None)[0].shape
        (5, 3)
    """

    network: eqx.nn.MLP
    step_size: Weight
    normalise: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int = 16,
        depth: int = 1,
        *,
        step_size: float = 0.1,
        normalise: bool = True,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            width: Hidden units.
            depth: Hidden layers.
            step_size: η before training.
            normalise: Divide the gradient by its root mean square.
            key: Key of the weights.
        """
        check_count("width", width)
        check_count("depth", depth)
        self.network = eqx.nn.MLP(2, 1, width, depth, activation=jnp.tanh, key=key)
        self.step_size = positive_factor("step_size", step_size, learned=True)
        self.normalise = check_flag("normalise", normalise)

    def init(self, x: Float[Array, "T ..."]) -> None:
        """None."""

    def __call__(
        self, gradient: Float[Array, "T ..."], x: Float[Array, "T ..."], state: None
    ) -> tuple[Float[Array, "T ..."], None]:
        """The step, entry by entry."""
        g = gradient / rms_scale(gradient) if self.normalise else gradient
        entries = jnp.stack([g.reshape(-1), x.reshape(-1)], axis=-1)
        factor = 1 + jnp.tanh(jax.vmap(self.network)(entries)).reshape(g.shape)
        return (self.step_size.value() * g * factor).astype(gradient.dtype), None


def rms_scale(gradient: Array) -> Float[Array, ""]:
    """Root mean square of a gradient; 1 where the gradient is 0 everywhere.

    Its derivative at 0 is 0, so that a sample that has arrived trains nothing instead of
    everything.

    Args:
        gradient: Of one sample.

    Returns:
        A positive number, or NaN where the gradient holds one.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import rms_scale
        >>> float(rms_scale(jnp.array([3.0, -3.0]))), float(rms_scale(jnp.zeros(2)))
        (3.0, 1.0)
    """
    # The largest entry is taken out first: squares of small entries underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(gradient)))
    unit = jnp.where(largest > 0, largest, jnp.ones((), gradient.dtype))
    mean = jnp.mean(jnp.square(gradient / unit))
    flat = mean == 0
    root = unit * jnp.sqrt(jnp.where(flat, jnp.ones((), mean.dtype), mean))
    # `unit` hides a NaN from the comparison above, and must not from the result.
    return jnp.where(jnp.isnan(largest), largest, root)


def check_modulator(modulator: Any) -> None:
    """A modulator, or a ValueError."""
    if not isinstance(modulator, AbstractGradMod):
        raise ValueError(
            f"Expected `modulator` to be a gradient modulator, got {modulator!r}. Pass "
            "for example tx.solver.ConvLSTMGradMod1D(...) or GradientDescent(0.1)."
        )


def positive_factor(name: str, value: Any, *, learned: bool) -> Weight:
    """A positive number in front of a gradient, or a ValueError."""
    weight = Weight(value, learned=learned, name=name)
    if weight.num_steps is not None or weight.fixed == 0:
        raise ValueError(
            f"Expected `{name}` to be one number > 0, got {value!r}: 0 moves nothing. "
            "Pass a small number."
        )
    return weight
