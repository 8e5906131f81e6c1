"""States from observations by a network alone, and solvers one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._batch import Batch, Batch1D, Batch2D, check_batch, is_batch
from trainax_pk._tree import check_count, check_flag
from trainax_pk.solver._layers import (
    Along,
    Convolution,
    Layout,
    Padding,
    check_kernel,
    check_padding,
    make_layout,
)


class ConvInversion1D(eqx.Module):
    """x̂ = f(m ⊙ y, m): states `(T, N)` from a window's observations, without a solve.

    f is a residual network of convolutions: h = W_0 * [m ⊙ y, m], then
    h ← h + W_l * silu(h) for l = 1 … depth, and x̂ = W * silu(h). Trained on the squared
    error it tends to the conditional mean, which is smooth where observations leave
    several states possible: a baseline for learned solvers, and a start for them that
    is closer to the right minimum of the cost than interpolation.

    With `refine`, x̂ = x_0 + f(m ⊙ (y − x_0), m, x_0) with x_0 = `batch.initial`: a
    correction of another solver's states, which begins at 0.

    Axes, borders and patches are those of `ConvLSTMGradMod1D`. A state at one point
    depends on observations up to `(depth + 2) · (kernel_size // 2) · patch + patch − 1`
    away. Compute is that of depth convolutions of hidden_dim to hidden_dim channels. In
    a loop of your own, compile with `tx.engine.fast_convolutions` on a CPU: XLA's
    derivatives of convolutions are slow there. Trainers do.

    Attributes:
        layers: W_0, …, W_depth, W.
        layout: Which axes are points.
        num_channels: Number of channels.
        refine: Whether it corrects `batch.initial`.

    Raises:
        ValueError: An even kernel, an unknown border or `along`, a count below 1; when
            called, no `Batch1D`, a window of other channels, one whose points `patch`
            does not divide, with `refine` a batch whose states have another shape than
            its observations.

    Source: learned inverses beside learned solvers: Fablet et al. 2021,
    doi:10.1029/2021MS002572; residual layers: He et al. 2016, arXiv:1603.05027.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> network = tx.solver.ConvInversion1D(3, 8, depth=2, key=jax.random.key(0))
        >>> y = jnp.ones((2, 20, 3)).at[:, ::2].set(jnp.nan)
        >>> network(tx.Batch1D(y, ~jnp.isnan(y))).shape
        (2, 20, 3)
    """

    layers: tuple[Convolution, ...]
    layout: Layout
    num_channels: int = eqx.field(static=True)
    refine: bool = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        depth: int = 4,
        *,
        along: Along = "time",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        patch: int | tuple[int, ...] = 1,
        refine: bool = False,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: N along "time", T along "space", 1 along "both".
            hidden_dim: Channels of h.
            depth: Residual layers.
            along: Which axes are convolved.
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            patch: Neighbours that are one point, or one number for each axis.
            refine: Correct `batch.initial`.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 2, num_channels, patch)
        self.num_channels, self.refine = num_channels, check_flag("refine", refine)
        self.layers = _layers(
            self.layout, (num_channels, hidden_dim, depth), kernel_size, padding,
            refine, key,
        )  # fmt: skip

    def __call__(self, batch: Batch1D) -> Float[Array, "B T N"]:
        """x̂."""
        check_batch(batch, Batch1D, "ConvInversion1D")
        return _invert(self, batch)


class ConvInversion2D(eqx.Module):
    """States `(T, H, W)` from a window's observations; see `ConvInversion1D`.

    Along "space", points are those of space and times are channels; along "both", all
    three axes are points of one channel.

    Attributes:
        layers: W_0, …, W_depth, W.
        layout: Which axes are points.
        num_channels: Number of channels.
        refine: Whether it corrects `batch.initial`.

    Raises:
        ValueError: As `ConvInversion1D`, with a `Batch2D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> network = tx.solver.ConvInversion2D(5, 8, depth=2, key=jax.random.key(0))
        >>> y = jnp.ones((1, 5, 8, 8))
        >>> network(tx.Batch2D(y, y)).shape
        (1, 5, 8, 8)
    """

    layers: tuple[Convolution, ...]
    layout: Layout
    num_channels: int = eqx.field(static=True)
    refine: bool = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        depth: int = 4,
        *,
        along: Along = "space",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        patch: int | tuple[int, ...] = 1,
        refine: bool = False,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: T along "space", 1 along "both".
            hidden_dim: Channels of h.
            depth: Residual layers.
            along: "space" or "both".
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            patch: Neighbours that are one point, or one number for each axis.
            refine: Correct `batch.initial`.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 3, num_channels, patch)
        self.num_channels, self.refine = num_channels, check_flag("refine", refine)
        self.layers = _layers(
            self.layout, (num_channels, hidden_dim, depth), kernel_size, padding,
            refine, key,
        )  # fmt: skip

    def __call__(self, batch: Batch2D) -> Float[Array, "B T H W"]:
        """x̂."""
        check_batch(batch, Batch2D, "ConvInversion2D")
        return _invert(self, batch)


class Sequential(eqx.Module):
    """Solvers one after another, each from the states of the one before.

    x̂ = s_n(… s_1(batch)): stage i gets the batch with `initial` = the states of stage
    i − 1, such as a network, a `FourDVarNet1D` that starts from its states, and a
    network that corrects what remains. Any function of a batch is a stage, and one that
    is listed twice is two, each with its own weights.

    All stages are differentiated through, as far as their adjoints reach: of a solver
    with `OneStepAdjoint`, or `KStepAdjoint(k)` with k < K, nothing comes back to its
    start (but through the background), and the stages before it learn nothing from those
    after it. Where training the whole is too long, train one after another, each on
    batches whose `initial` holds the states so far.

    Attributes:
        stages: Functions of a batch that return its states.

    Raises:
        ValueError: No stages, or one that is not callable; when called, no batch, or a
            stage that returns no floating array `(B, T, ...)` of as many windows.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> nearer = lambda batch: (batch.start() + batch.observed()) / 2
        >>> y = jnp.full((1, 2, 1), 4.0)
        >>> batch = tx.Batch1D(y, y > 0, initial=0 * y)
        >>> tx.solver.Sequential([nearer, nearer])(batch)[0, :, 0].tolist()
        [3.0, 3.0]
    """

    stages: tuple[Callable[[Any], Array], ...]

    def __init__(self, stages: Sequence[Callable[[Any], Array]]) -> None:
        self.stages = tuple(stages) if isinstance(stages, Sequence) else ()
        if not (self.stages and all(callable(stage) for stage in self.stages)):
            raise ValueError(
                f"Expected `stages` to be functions of a batch, got {stages!r}. Pass for "
                "example [tx.solver.ConvInversion1D(...), tx.solver.FourDVarNet1D(...)]."
            )

    def __call__(self, batch: Batch) -> Float[Array, "B T ..."]:
        """The states of the last stage."""
        if not is_batch(batch):
            raise ValueError(
                f"Expected Sequential to get a batch, got {type(batch).__name__}. Pass "
                "tx.Batch1D(...) or tx.Batch2D(...)."
            )
        for stage in self.stages:
            states = stage(batch)
            _check_states(states, batch.batch_size, stage)
            batch = eqx.tree_at(
                lambda b: b.initial, batch, states, is_leaf=lambda x: x is None
            )
        return batch.initial

    @property
    def prior(self) -> Callable[[Array], Array]:
        """Φ of the last stage that has one."""
        for stage in reversed(self.stages):
            if hasattr(stage, "prior"):
                return stage.prior
        raise AttributeError("No stage of this Sequential has a prior.")


def _check_states(states: Any, num_windows: int, stage: Any) -> None:
    dtype, shape = (getattr(states, name, None) for name in ("dtype", "shape"))
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not floating or len(shape) < 2 or shape[0] != num_windows:
        got = type(states).__name__ if dtype is None else f"{dtype}{list(shape)}"
        name = getattr(stage, "__name__", type(stage).__name__)
        raise ValueError(
            f"Expected stage {name} to return the states (B, T, ...) of {num_windows} "
            f"windows, got {got}. A stage takes a batch and returns one floating array; "
            "of a fixed point take `.state`."
        )


def _layers(
    layout: Layout,
    sizes: tuple[int, int, int],
    kernel_size: Any,
    padding: Any,
    refine: bool,  # noqa: FBT001
    key: PRNGKeyArray,
) -> tuple[Convolution, ...]:
    channels, hidden, depth = sizes
    check_count("hidden_dim", hidden)
    check_count("depth", depth)
    kernel = check_kernel(kernel_size, layout.num_axes)
    borders = check_padding(padding, layout.num_axes)
    out = channels * layout.widening
    pairs = [((3 if refine else 2) * out, hidden), *[(hidden, hidden)] * depth]
    keys = jax.random.split(key, depth + 2)
    layers = [
        Convolution(pair, kernel, borders, key=k)
        for pair, k in zip([*pairs, (hidden, out)], keys, strict=True)
    ]
    if refine:
        layers[-1] = jax.tree.map(jnp.zeros_like, layers[-1])
    return tuple(layers)


def _invert(network: Any, batch: Any) -> Array:
    start = batch.start() if network.refine else None
    if start is not None and start.shape != batch.input.shape:
        raise ValueError(
            "Expected `initial` states of the observations' shape "
            f"{list(batch.input.shape)} with refine=True, got {list(start.shape)}. "
            "Interpolate one to the other first."
        )
    return jax.vmap(lambda *window: _apply(network, *window))(
        batch.observed(), batch.mask, start
    )


def _apply(network: Any, y: Array, mask: Array, start: Array | None) -> Array:
    layout, (first, *middle, last) = network.layout, network.layers
    layout.check(y, network.num_channels, type(network).__name__)
    seen = [y, mask.astype(y.dtype)]
    if start is not None:
        misfit = jnp.where(mask, y - start, jnp.zeros((), y.dtype))
        seen = [misfit, seen[1], start.astype(y.dtype)]
    points = [layout.points(x) for x in seen]
    h = first.outside_loops(jnp.concatenate(points, axis=-1))
    for layer in middle:
        h = h + layer.outside_loops(jax.nn.silu(h))
    out = layout.state(last.outside_loops(jax.nn.silu(h))).astype(y.dtype)
    return out if start is None else start + out
