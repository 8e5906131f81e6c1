"""What a configuration is."""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._types import Window


class Aux(eqx.Module):
    """What a configuration reports beside its loss.

    Attributes:
        time_losses: Loss of each time level, `(T,)`, or None: what is summed with the
            time-level weights, which are not in it. For a diverted chain of each branch,
            `(T - N + 1,)`, with the branch-level weights in it.
        model_state: New state of a stateful stepper's layers, or None.
        parts: Losses of the members of a composite, or None.
    """

    time_losses: Array | None = None
    model_state: eqx.nn.State | None = None
    parts: Array | None = None


class AbstractConfiguration(eqx.Module):
    """The compute graph of training: a pure map from model and batch to a scalar.

    Reference stepper, residuum function, time-level loss, weights and adjoint are
    fields; nothing but the model, the batch and a key is passed at the call.

    To add one: subclass, declare the fields, check every number in `__check_init__` or
    `__init__`, implement `num_times` and `__call__` with `chain` for the loop over time
    (never a Python loop whose length is an option), and add a row to the table in
    `tests/test_configuration_contract.py`. The contract tests check the row: finite
    scalar, unrolled oracle, finite differences, jit and vmap, PyTree states, program
    size.
    """

    @property
    @abc.abstractmethod
    def num_times(self) -> int:
        """Number of consecutive times that a window must hold."""

    @abc.abstractmethod
    def __call__(
        self,
        model: Any,
        batch: Window | PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a model on a batch.

        Args:
            model: Stepper that is trained, `u -> u_next`, or a `Stepper`.
            batch: A `Window`, or its states alone, leaves `(B, L, ...)`.
            key: Key, for stochastic steppers and noise.

        Returns:
            The loss, a scalar, and what else is reported.
        """


def check_configuration(configuration: Any) -> None:
    """A configuration, or a ValueError."""
    if not isinstance(configuration, AbstractConfiguration):
        raise ValueError(
            f"Expected `configuration` to be a configuration, got {configuration!r}. "
            "Pass an instance of a tx.configuration class."
        )


def window_steps(configuration: AbstractConfiguration, time: PyTree[Any]) -> int:
    """Steps of a window: those with targets, and all of them where there is forcing.

    Args:
        configuration: What reads the window.
        time: Forcing of the data, or None.
    """
    steps = configuration.num_times - 1
    if not jax.tree.leaves(time):
        return steps
    return max(steps, _rollout_steps(configuration))


def _rollout_steps(configuration: Any) -> int:
    own = getattr(configuration, "num_rollout_steps", 0)
    members = getattr(configuration, "configurations", ())
    wrapped = getattr(configuration, "configuration", None)
    pushed = getattr(configuration, "num_steps", 0)
    inner = [_rollout_steps(c) for c in (*members, wrapped) if c is not None]
    return max([own, *(pushed + steps for steps in inner)])
