"""A small convolutional emulator of one-dimensional periodic fields."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class ConvEmulator(eqx.Module):
    """u + net(u) without mean: residual circular convolutions of width 5.

    The update has no mean because the equation conserves it; left free, the mean drifts
    and the pattern travels away from the reference.

    Attributes:
        lift: From one channel to the hidden ones.
        hidden: Residual layers.
        project: Back to one channel.
    """

    lift: eqx.nn.Conv1d
    hidden: tuple[eqx.nn.Conv1d, ...]
    project: eqx.nn.Conv1d

    def __init__(self, width: int, depth: int, *, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, depth + 2)
        sizes = [1, *[width] * (depth + 1), 1]
        layers = [
            eqx.nn.Conv1d(
                sizes[i],
                sizes[i + 1],
                5,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=keys[i],
            )
            for i in range(depth + 2)
        ]
        self.lift, *hidden, self.project = layers
        self.hidden = tuple(hidden)

    def __call__(self, u: Float[Array, "1 num_points"]) -> Float[Array, "1 num_points"]:
        """One step."""
        h = jax.nn.gelu(self.lift(u))
        for layer in self.hidden:
            h = h + jax.nn.gelu(layer(h))
        update = self.project(h)
        return u + update - jnp.mean(update)
