"""Networks that take a batch, as functions of one sample.

A configuration maps a function of one sample over the batch. A network of another
framework is written for the whole batch: batch norm averages over it, dropout draws one
mask for all of it. So the map is undone: where samples are mapped over the axis "batch",
the network is called once, with all of them.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._stepper import BATCH_AXIS, Stepper
from trainax_pk._types import Inputs

# (weights, variables, u, inputs, key) -> (u_next, variables)
Network = Callable[..., tuple[PyTree[Array], PyTree[Array]]]


def is_in_batch() -> bool:
    """Whether samples are being mapped over, as configurations do it."""
    try:
        jax.lax.axis_size(BATCH_AXIS)
    except NameError:
        return False
    return True


def call_whole(
    network: Network,
    weights: PyTree[Array],
    variables: PyTree[Array],
    u: PyTree[Array],
    inputs: PyTree[Array],
    key: PRNGKeyArray | None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """One sample through a network that takes a batch.

    Args:
        network: Takes `u` and `inputs` with a leading batch axis and one key for all,
            and returns the new states likewise and the variables of its layers.
        weights: Trained.
        variables: State of the layers, shared by the batch.
        u: State of one sample.
        inputs: What else a sample has.
        key: The sample's own key, or None. A whole batch gets that of its first sample.

    Returns:
        The new state of the sample, and the layers' variables.
    """

    def alone(
        weights: PyTree, variables: PyTree, u: PyTree, inputs: PyTree, key: Any
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        first = jax.tree.map(lambda x: x[None], (u, inputs))
        out, variables = network(weights, variables, *first, key)
        return jax.tree.map(lambda x: x[0], out), variables

    if not is_in_batch():
        # custom_vmap knows no reverse mode of what is not mapped.
        return alone(weights, variables, u, inputs, key)

    mapped = jax.custom_batching.custom_vmap(alone)

    @mapped.def_vmap
    def together(
        size: int, is_mapped: Any, weights: Any, variables: Any, *rest: Any
    ) -> Any:
        if any(jax.tree.leaves(is_mapped[:2])) or not any(
            jax.tree.leaves(is_mapped[2])
        ):
            # Samples with weights of their own are no batch.
            axes = jax.tree.map(lambda m: 0 if m else None, tuple(is_mapped))
            every = jax.vmap(alone, in_axes=axes, axis_size=size)
            out = every(weights, variables, *rest)
            return out, jax.tree.map(lambda _: True, out)
        u, inputs = jax.tree.map(
            lambda x, m: x if m else jnp.broadcast_to(x, (size, *x.shape)),
            rest[:2],
            tuple(is_mapped[2:4]),
        )
        key = jax.tree.map(lambda k, m: k[0] if m else k, rest[2], is_mapped[4])
        out = network(weights, variables, u, inputs, key)
        is_out = tuple(
            jax.tree.map(lambda _, m=m: m, part)
            for part, m in zip(out, (True, False), strict=True)
        )
        return out, is_out

    return mapped(weights, variables, u, inputs, key)


class AbstractAdapted(eqx.Module):
    """A network of another framework, called as a stepper of one sample.

    To add one: a final class with these fields, `variables` and `through`.
    """

    index: eqx.AbstractVar[eqx.nn.StateIndex | None]
    inference: eqx.AbstractVar[bool]
    conditioned: eqx.AbstractVar[bool]
    kind: eqx.AbstractClassVar[str]

    @property
    @abc.abstractmethod
    def has_batch_statistics(self) -> bool:
        """Whether its layers average over a batch."""

    @abc.abstractmethod
    def variables(self, state: eqx.nn.State | None) -> PyTree[Array]:
        """State of the layers."""

    @abc.abstractmethod
    def through(
        self,
        variables: PyTree[Array],
        u: PyTree[Array],
        inputs: Inputs,
        key: PRNGKeyArray | None,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The next state of one sample, and the layers' state."""

    def __call__(
        self, u: PyTree[Array], *rest: Any, key: PRNGKeyArray | None = None
    ) -> Any:
        """The next state of one sample; with the layers' state, if they have one."""
        inputs, *rest = rest if self.conditioned else (Inputs(), *rest)
        state = rest[0] if self.index is not None else None
        if self.has_batch_statistics and not (self.inference or is_in_batch()):
            raise ValueError(
                f"Expected {self.kind}, whose layers average over a batch, to be trained "
                "on batches, got one sample. Train it by a configuration, and evaluate it "
                "after eqx.nn.inference_mode(model)."
            )
        out, variables = self.through(self.variables(state), u, inputs, key)
        return out if self.index is None else (out, state.set(self.index, variables))


def channels_to_end(tree: PyTree[Array], axis: int = 1) -> PyTree[Array]:
    """`(B, channels, *space)` to `(B, *space, channels)`, the channels from an axis."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, -1), tree)


def channels_to_front(tree: PyTree[Array], axis: int = 1) -> PyTree[Array]:
    """`(B, *space, channels)` to `(B, channels, *space)`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, axis), tree)


def taken_apart(stepper: Any, cls: type, name: str) -> tuple[Any, Any]:
    """The adapted network in a stepper and the state of its layers; else a ValueError.

    Args:
        stepper: What `from_...` returned, or what a trainer made of it.
        cls: Of the adapted network.
        name: Of the framework.
    """
    if isinstance(stepper, Stepper) and isinstance(stepper.module, cls):
        return stepper.module, stepper.state
    raise ValueError(
        f"Expected a stepper made by from_{name}, got {type(stepper).__name__}. Pass what "
        f"from_{name} returned, or what a trainer made of it."
    )


def evaluated(stepper: Any, key: PRNGKeyArray | None) -> Any:
    """A stepper as it is evaluated: layers in inference mode. Adapted networks, most of
    which draw nothing then, need no key; one that is given is used."""
    stepper = eqx.nn.inference_mode(stepper)
    is_adapted = isinstance(stepper, Stepper) and isinstance(
        stepper.module, AbstractAdapted
    )
    if is_adapted and key is None:
        return dataclasses.replace(stepper, stochastic=False)
    return stepper


def in_precision(out: PyTree[Array], u: PyTree[Array], weights: PyTree[Array]) -> Any:
    """Results in the precision of the states, where the weights have it and the network
    computes in a lower one by itself."""
    held = {x.dtype for x in jax.tree.leaves(weights)}

    def back(y: Array, x: Array) -> Array:
        mixed = x.dtype in held and jnp.issubdtype(y.dtype, jnp.floating)
        return y.astype(x.dtype) if mixed and y.dtype.itemsize < x.dtype.itemsize else y

    if jax.tree.structure(out) != jax.tree.structure(u):
        return out
    return jax.tree.map(back, out, u)
