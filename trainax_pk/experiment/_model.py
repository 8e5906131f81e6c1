"""Networks by name; those on grids are pdequinox's."""

from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import pydantic
from jaxtyping import PRNGKeyArray
from pydantic import Field

from trainax_pk._extras import load
from trainax_pk.experiment._data import Count
from trainax_pk.experiment._spec import AbstractSpec, register

Activation = Literal["relu", "gelu", "tanh", "silu", "elu", "softplus"]
Border = Literal["periodic", "dirichlet", "neumann"]


def _check_odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"expected an odd number of taps, got {size}. Add one.")
    return size


Odd = Annotated[int, Field(ge=1), pydantic.AfterValidator(_check_odd)]


def _activation(name: str) -> Any:
    return getattr(jax.nn, name)


class AbstractModel(AbstractSpec):
    """A network: `build(shape, key)` makes one with random weights.

    To add a kind: implement `build`. What it `needs` is what data have to give; the
    network of "states" is a stepper `u -> u_next`.
    """

    needs: ClassVar[str] = "states"

    def fitted(self, model: Any, train: Any) -> Any:
        """The model with what it takes from training data before it is trained."""
        del train
        return model


@register("model")
class MLP(AbstractModel):
    """`equinox.nn.MLP` on the whole state, laid flat."""

    kind: Literal["mlp"] = "mlp"
    width: Count = 64
    depth: Annotated[int, Field(ge=0)] = 3
    activation: Activation = "relu"

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """A `FlatMLP`."""
        return FlatMLP(shape, self.width, self.depth, self.activation, key=key)


class FlatMLP(eqx.Module):
    """A perceptron on states of any shape.

    Attributes:
        net: What maps flat states.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.experiment import FlatMLP
        >>> net = FlatMLP((1, 8), 16, 2, "tanh", key=jax.random.key(0))
        >>> net(jnp.ones((1, 8))).shape
        (1, 8)
    """

    net: eqx.nn.MLP

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        depth: int,
        activation: str,
        *,
        key: PRNGKeyArray,
    ) -> None:
        size = 1
        for n in shape:
            size *= n
        self.net = eqx.nn.MLP(
            size, size, width, depth, _activation(activation), key=key
        )

    def __call__(self, u: jax.Array) -> jax.Array:
        """The next state."""
        return self.net(u.reshape(-1)).reshape(u.shape)


class AbstractGridModel(AbstractModel):
    """A network of pdequinox on `(channels, *space)`, of as many axes as the state has."""

    hidden_channels: Count = 32
    activation: Activation = "relu"

    def network(self, name: str, shape: tuple[int, ...], **options: Any) -> Any:
        """`pdequinox.arch.<name>`."""
        if len(shape) < 2:
            raise ValueError(
                f"Expected states (channels, *space) for {name}, got shape {shape}. "
                "Choose the model `mlp`."
            )
        return getattr(load("pdequinox.arch", "models"), name)(
            len(shape) - 1,
            shape[0],
            shape[0],
            hidden_channels=self.hidden_channels,
            activation=_activation(self.activation),
            **options,
        )


class AbstractBordered(AbstractGridModel):
    """A network of convolutions, with a border."""

    border: Border = "periodic"


@register("model")
class Conv(AbstractBordered):
    """`pdequinox.arch.ConvNet`."""

    kind: Literal["conv"] = "conv"
    depth: Count = 10
    kernel_size: Odd = 3

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        return self.network(
            "ConvNet", shape, depth=self.depth, kernel_size=self.kernel_size,
            boundary_mode=self.border, key=key,
        )  # fmt: skip


@register("model")
class ResNet(AbstractBordered):
    """`pdequinox.arch.ClassicResNet`."""

    kind: Literal["resnet"] = "resnet"
    num_blocks: Count = 6
    norm: bool = False

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        return self.network(
            "ClassicResNet", shape, num_blocks=self.num_blocks, use_norm=self.norm,
            boundary_mode=self.border, key=key,
        )  # fmt: skip


@register("model")
class DilatedResNet(AbstractBordered):
    """`pdequinox.arch.DilatedResNet` (arXiv:2112.15275)."""

    kind: Literal["dilated_resnet"] = "dilated_resnet"
    num_blocks: Count = 2
    dilation_rates: tuple[Count, ...] = (1, 2, 4, 8, 4, 2, 1)
    norm: bool = True

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        return self.network(
            "DilatedResNet", shape, num_blocks=self.num_blocks, use_norm=self.norm,
            dilation_rates=self.dilation_rates, boundary_mode=self.border, key=key,
        )  # fmt: skip


@register("model")
class UNet(AbstractBordered):
    """`pdequinox.arch.ClassicUNet` (arXiv:1505.04597)."""

    kind: Literal["unet"] = "unet"
    hidden_channels: Count = 16
    num_levels: Count = 4
    norm: bool = True

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        odd = [n for n in shape[1:] if n % 2**self.num_levels]
        if odd:
            raise ValueError(
                f"Expected axes of multiples of 2^{self.num_levels} points for `unet`, "
                f"got {odd}. Lower num_levels, or change the grid."
            )
        return self.network(
            "ClassicUNet", shape, num_levels=self.num_levels, use_norm=self.norm,
            boundary_mode=self.border, key=key,
        )  # fmt: skip


@register("model")
class FNO(AbstractGridModel):
    """`pdequinox.arch.ClassicFNO` (arXiv:2010.08895)."""

    kind: Literal["fno"] = "fno"
    num_modes: Count = 12
    num_blocks: Count = 4
    activation: Activation = "gelu"

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        least = min(shape[1:], default=0)
        if len(shape) > 1 and self.num_modes > least // 2 + 1:
            raise ValueError(
                f"Expected at most {least // 2 + 1} modes for {least} points, got "
                f"{self.num_modes}. Lower num_modes."
            )
        return self.network(
            "ClassicFNO", shape, num_modes=self.num_modes,
            num_blocks=self.num_blocks, key=key,
        )  # fmt: skip
