"""One update on several devices: what differs between them, and what is averaged."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def per_device(tree: PyTree[Any], axis_name: str | None) -> PyTree[Any]:
    """The same values, as values of each device.

    In `shard_map` JAX knows which values are the same on all devices, and sums the
    gradient with respect to these over devices, at every use. Gradients with respect to
    values of each device stay local, as in `pmap`, and are averaged once.
    """
    if axis_name is None:
        return tree
    # Varies over the devices, and is compiled away.
    here = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)


def average(tree: PyTree[Any], axis_name: str | None) -> PyTree[Any]:
    """Inexact leaves averaged over devices; counters and flags are the same on all."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: _average_leaf(x, axis_name), tree)


def _average_leaf(x: Any, axis_name: str) -> Any:
    if eqx.is_inexact_array(x):
        return jax.lax.pmean(x, axis_name)
    # A maximum of equal values says to JAX that they are equal.
    if x.dtype == bool:
        return jax.lax.pmax(x.astype(jnp.int32), axis_name).astype(bool)
    return jax.lax.pmax(x, axis_name)
