"""The models and training programs that `engine.py` measures against, by hand."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import trainax as ta

relu = jax.nn.relu


class Row(NamedTuple):
    """One line of the table."""

    name: str
    data: jax.Array
    model: Any
    # (arrays of the model, u) -> u, by hand; and the same channels-last, or None.
    apply: Callable[..., Any]
    apply_last: Callable[..., Any] | None
    rollout: int
    batch_size: int
    updates: int

    @property
    def peer_updates(self) -> int:
        """trainax is slow where dispatch dominates; its time per update is constant."""
        return min(self.updates, 300 if self.updates > 1500 else 60 // self.rollout)

    @property
    def loop_updates(self) -> int:
        """Updates of a loop of dispatches."""
        return min(self.updates, 1000 if self.updates > 1500 else 60 // self.rollout)

    @property
    def scan_updates(self) -> int:
        """Enough for what is constant in a run by hand, a millisecond, not to count."""
        most = 100_000 if self.updates > 1500 else 60
        return min(self.updates, most // self.rollout)


def by_hand(row: Row, optimizer: Any) -> dict[str, Callable[[], Any]]:
    windows = ta.TrajectorySubStacker(row.data, row.rollout + 1).data_sub_trajectories
    shape = (row.scan_updates, row.batch_size)
    indices = jax.random.randint(jax.random.key(1), shape, 0, windows.shape[0])
    params = [x for x in jax.tree.leaves(row.model) if eqx.is_inexact_array(x)]
    layouts = {"": (row.apply, windows)}
    if row.apply_last is not None:
        layouts[", NWC"] = (row.apply_last, jnp.moveaxis(windows, 2, -1))
    runs = {}
    for layout, (apply, stacked) in layouts.items():
        for form in ("written out", "scanned"):
            # A scan of one step is still a loop to XLA: nobody would write that by hand.
            if row.rollout == 1 and form == "scanned":
                continue
            update = _update(apply, optimizer, row.rollout, form)
            programs = _programs(update, params, optimizer, stacked, indices, row)
            for family, run in programs.items():
                if not (family == "loop" and layout):
                    runs[f"{family}{layout}, time {form}"] = run
    return runs


def _update(apply: Any, optimizer: Any, rollout: int, form: str) -> Callable[..., Any]:
    def loss_of(params: Any, window: jax.Array) -> jax.Array:
        if form == "written out":
            u, loss = window[:, 0], 0.0
            for t in range(rollout):
                u = apply(params, u)
                loss += jnp.mean((u - window[:, t + 1]) ** 2)
            return loss
        targets = jnp.moveaxis(window[:, 1:], 1, 0)

        def body(u: jax.Array, target: jax.Array) -> Any:
            u = apply(params, u)
            return u, jnp.mean((u - target) ** 2)

        return jnp.sum(jax.lax.scan(body, window[:, 0], targets)[1])

    def update(params: Any, state: Any, window: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, window)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return update


def _programs(
    update: Any, params: Any, optimizer: Any, windows: Any, indices: Any, row: Row
) -> dict[str, Callable[[], Any]]:
    @jax.jit
    def many(params: Any, state: Any, windows: Any, indices: Any) -> Any:
        def body(carry: Any, rows: Any) -> Any:
            params, state, loss = update(*carry, windows[rows])
            return (params, state), loss

        return jax.lax.scan(body, (params, state), indices)[1]

    @jax.jit
    def one(params: Any, state: Any, windows: Any, indices: Any, i: Any) -> Any:
        return update(params, state, windows[indices[i]])

    def loop() -> Any:
        p, s, losses = params, optimizer.init(params), []
        for i in range(row.loop_updates):
            p, s, loss = one(p, s, windows, indices, i)
            losses.append(loss)
        return losses

    return {
        "loop": loop,
        "scan": lambda: many(params, optimizer.init(params), windows, indices),
    }


def convs(model: Any, dims: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A chain of periodic convolutions, and the same channels-last."""
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    count = sum(x.ndim == dims + 2 for x in leaves)
    biased = len(leaves) > count

    def run(params: Any, u: jax.Array, *, last: bool) -> jax.Array:
        for i in range(count):
            weight = params[2 * i] if biased else params[i]
            bias = params[2 * i + 1] if biased else None
            u = _convolve(u, weight, bias, dims, last=last)
            u = relu(u) if i < count - 1 else u
        return u

    return functools.partial(run, last=False), functools.partial(run, last=True)


def residual() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Lifting, five blocks of two convolutions, projection: pdequinox's ClassicResNet."""

    def run(params: Any, u: jax.Array, *, last: bool) -> jax.Array:
        pairs = [(params[2 * i], params[2 * i + 1]) for i in range(len(params) // 2)]
        lift, *inner, project = pairs
        u = _convolve(u, *lift, 1, last=last)
        for first, second in zip(inner[::2], inner[1::2], strict=True):
            skip = u
            u = relu(_convolve(u, *first, 1, last=last))
            u = relu(_convolve(u, *second, 1, last=last) + skip)
        return _convolve(u, *project, 1, last=last)

    return functools.partial(run, last=False), functools.partial(run, last=True)


def _convolve(
    u: jax.Array, weight: jax.Array, bias: Any, dims: int, *, last: bool
) -> jax.Array:
    taps = weight.shape[2:]
    pads = [((k - 1) // 2, k // 2) for k in taps]
    space = "HW"[-dims:] if dims > 1 else "W"
    around = [(0, 0), *pads, (0, 0)] if last else [(0, 0), (0, 0), *pads]
    u = jnp.pad(u, around, mode="wrap")
    if not last:
        spec = (f"NC{space}", f"OI{space}", f"NC{space}")
        out = jax.lax.conv_general_dilated(
            u, weight, (1,) * dims, "VALID", dimension_numbers=spec
        )
        return out if bias is None else out + bias
    out = _last(u, jnp.moveaxis(weight, (0, 1), (-1, -2)))
    return out if bias is None else out + bias.reshape(-1)


@jax.custom_vjp
def _last(u: jax.Array, kernel: jax.Array) -> jax.Array:
    """A channels-last convolution whose gradients are written channels-last too.

    JAX derives the gradient of the kernel as a convolution with batch and channels
    exchanged, which no layout of the forward pass makes fast inside a loop on a CPU.
    """
    dims = u.ndim - 2
    space = "HW"[-dims:] if dims > 1 else "W"
    spec = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(
        u, kernel, (1,) * dims, "VALID", dimension_numbers=spec
    )


def _last_forward(u: jax.Array, kernel: jax.Array) -> Any:
    return _last(u, kernel), (u, kernel)


def _last_backward(residuals: Any, cotangent: jax.Array) -> Any:
    u, kernel = residuals
    taps = kernel.shape[:-2]
    around = [(0, 0), *[(k - 1, k - 1) for k in taps], (0, 0)]
    flipped = jnp.flip(kernel, tuple(range(len(taps)))).swapaxes(-1, -2)
    into_u = _last(jnp.pad(cotangent, around), flipped)
    sizes = cotangent.shape[1:-1]
    into_kernel = [
        jnp.tensordot(
            u[
                (
                    slice(None),
                    *(slice(i, i + n) for i, n in zip(at, sizes, strict=True)),
                )
            ],
            cotangent,
            [list(range(len(taps) + 1))] * 2,
        )
        for at in itertools.product(*map(range, taps))
    ]
    return into_u, jnp.stack(into_kernel).reshape(kernel.shape)


_last.defvjp(_last_forward, _last_backward)


def mlp(params: Any, u: jax.Array) -> jax.Array:
    layers = [(params[2 * i], params[2 * i + 1]) for i in range(len(params) // 2)]
    for weight, bias in layers[:-1]:
        u = relu(u @ weight.T + bias)
    weight, bias = layers[-1]
    return u @ weight.T + bias


def as_module(model: Any) -> Callable[..., Any]:
    """Networks whose layers are not simple to write out run as their modules."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    structure = jax.tree.structure(arrays)

    def run(params: Any, u: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(structure.unflatten(params), static))(u)

    return run
