"""Numbers of a model that never train."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Frozen(eqx.Module):
    """A floating array kept as integers of the same bits.

    What is learned from data once must not be reached by an optimizer. A stopped gradient
    would not do: weight decay, averages and lower precision see every floating leaf of a
    model, and none of its integers. It is stored and restored with the model.
    """

    bits: Array
    dtype: Any = eqx.field(static=True)

    def __init__(self, value: Any) -> None:
        """Keeps a value.

        Args:
            value: A floating array.
        """
        value = jnp.asarray(value)
        self.dtype = np.dtype(value.dtype)
        self.bits = jax.lax.bitcast_convert_type(
            value, np.dtype(f"uint{8 * self.dtype.itemsize}")
        )

    @property
    def value(self) -> Array:
        """The array."""
        return jax.lax.bitcast_convert_type(self.bits, self.dtype)
