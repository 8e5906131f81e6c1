"""Updates per second: the trainer against trainax and against programs by hand.

For every model three programs are written by hand, with the windows stacked in advance
and the model as plain functions of arrays: a Python loop over one jitted update ("loop"),
a scan over updates in one program ("scan"), and the same scan with the model's
convolutions written channels-last ("scan, NWC"). Loops over time are written out, as
trainax does, and as a scan; the faster of the two counts. They do what the update needs
and nothing else: no check for NaN, no gradient norm, no shuffling (random indices).

The trainer is called as a user calls it: shuffling, windows by index, non-finite check,
gradient norms and history included. Steady figures are of a second call of the same
trainer; the first call compiles and chooses, and is given beside it.

    python -m benchmarks.engine [--rows NAME ...]

Every row is kept in the data beside the report, which is written anew after each: rows
may be measured in several calls.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pdequinox as pdeqx
import trainax as ta

import trainax_pk as tx
from benchmarks import _harness as harness

KEY = jax.random.key(0)
FIGURES = harness.RESULTS / f"engine_{harness.hardware()}.json"
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


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", nargs="*", default=[])
    options = arguments.parse_args()
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for row in rows():
        if options.rows and not any(word in row.name for word in options.rows):
            continue
        found[row.name] = measure(row, rounds=5)
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    report([found[row.name] for row in rows() if row.name in found])


def report(found: list[dict[str, list[str]]]) -> None:
    header = ["case", "trainax", "loop", "scan", "scan, NWC", "trainer"]
    header += ["trainer / best by hand", "trainer / trainax", "chose"]
    body = (
        "Milliseconds per update, medians of 5 interleaved rounds; the ratios are of "
        "speeds (above 1: the trainer is faster), medians over rounds.\n\n"
    )
    body += harness.table(header, [x["speed"] for x in found])
    body += (
        "\n\nFirst calls, compilation and choice included, seconds for the number of "
        "updates given, except for the scan by hand, which has its loop over time "
        "scanned and runs at most 100,000 / rollout updates, 60 / rollout in rows of at "
        "most 1500; trainax: 300 (60 / rollout) and the rest at its rate.\n\n"
    )
    body += harness.table(
        ["case", "updates", "trainer", "of this choosing", "scan by hand", "trainax"],
        [x["first"] for x in found],
    )
    harness.report("engine", "How fast is training?", body)


def rows() -> list[Row]:
    advection = tx.sample_data.advection_1d_periodic(cfl=-0.75, key=KEY)
    lorenz = tx.sample_data.lorenz_rk4(key=KEY, temporal_horizon=200)
    ks = tx.sample_data.kuramoto_sivashinsky_1d(
        num_samples=20, temporal_horizon=51, num_points=160, key=KEY
    )
    flow = tx.sample_data.advection_diffusion_2d(
        num_samples=8, temporal_horizon=21, num_points=32, key=KEY
    )
    linear = eqx.nn.Conv1d(
        1, 1, 2, padding="SAME", padding_mode="CIRCULAR", use_bias=False, key=KEY
    )
    out = [
        Row(
            f"linear conv 1D, {r} steps",
            advection,
            linear,
            *_convs(linear, 1),
            r,
            32,
            n,
        )
        for r, n in ((1, 100_000), (5, 100_000), (20, 100_000))
    ]
    for width, depth, n in ((32, 3, 20_000), (160, 8, 1_000)):
        mlp = eqx.nn.MLP(3, 3, width, depth, key=KEY)
        out.append(
            Row(f"MLP {width}x{depth}, Lorenz", lorenz, mlp, _mlp, None, 1, 64, n)
        )
    net = functools.partial(
        pdeqx.arch.ConvNet, activation=relu, boundary_mode="periodic", key=KEY
    )
    conv = net(1, 1, 1, hidden_channels=32, depth=10)
    res = pdeqx.arch.ClassicResNet(
        1,
        1,
        1,
        hidden_channels=32,
        num_blocks=5,
        activation=relu,
        boundary_mode="periodic",
        key=KEY,
    )
    for r, n in ((1, 600), (5, 150)):
        out.append(Row(f"conv net 1D, {r} steps", ks, conv, *_convs(conv, 1), r, 20, n))
        out.append(Row(f"residual net 1D, {r} steps", ks, res, *_residual(), r, 20, n))
    conv2d = net(2, 1, 1, hidden_channels=16, depth=4)
    out.append(Row("conv net 2D", flow, conv2d, *_convs(conv2d, 2), 1, 8, 600))
    fno = pdeqx.arch.ClassicFNO(
        1,
        1,
        1,
        num_modes=12,
        hidden_channels=18,
        num_blocks=4,
        activation=jax.nn.gelu,
        boundary_mode="periodic",
        key=KEY,
    )
    out.append(Row("FNO 1D", ks, fno, _as_module(fno), None, 1, 20, 1500))
    unet = pdeqx.arch.ClassicUNet(
        1,
        1,
        1,
        hidden_channels=12,
        num_levels=2,
        activation=relu,
        boundary_mode="periodic",
        key=KEY,
    )
    out.append(Row("U-Net 1D", ks, unet, _as_module(unet), None, 1, 20, 600))
    return out


def measure(row: Row, *, rounds: int) -> dict[str, list[str]]:
    """A line of the table of speeds, and one of the table of first calls."""
    optimizer = optax.adam(1e-3)
    trainer = tx.trainer.SupervisedTrainer(
        row.data,
        num_rollout_steps=row.rollout,
        optimizer=optimizer,
        num_training_steps=row.updates,
        batch_size=row.batch_size,
        progress=False,
    )

    def ours() -> Any:
        return trainer(row.model, key=KEY)[1].loss

    peer = _peer(row, optimizer)
    first = {"trainer": harness.first_call(ours), "trainax": harness.first_call(peer)}
    by_hand = _by_hand(row, optimizer)
    form = "written out" if row.rollout == 1 else "scanned"
    first["scan"] = harness.first_call(by_hand[f"scan, time {form}"])
    seconds = harness.interleaved(
        {"trainer": ours, "trainax": peer, **by_hand}, rounds=rounds
    )
    count = {name: row.updates for name in seconds}
    count |= {"trainax": _peer_updates(row)}
    count |= {name: _loop_updates(row) for name in seconds if name.startswith("loop")}
    count |= {name: _scan_updates(row) for name in seconds if name.startswith("scan")}
    per = {name: [s / count[name] for s in seconds[name]] for name in seconds}
    medians = harness.medians(per)

    def best(family: str) -> str:
        return min(
            (n for n in by_hand if n.split(", time")[0] == family), key=medians.get
        )

    families = ["loop", "scan"] + (["scan, NWC"] if row.apply_last else [])
    fastest = min((best(f) for f in families), key=medians.get)
    choice = trainer.engine.choice
    cells = [_ms(medians["trainax"])] + [_ms(medians[best(f)]) for f in families]
    cells += ["–"] * (4 - len(cells)) + [_ms(medians["trainer"])]
    line = [
        row.name,
        *cells,
        f"{harness.ratio(per, fastest, 'trainer'):.2f} ({fastest})",
        f"{harness.ratio(per, 'trainax', 'trainer'):.1f}",
        choice.family,
    ]
    peer_run = first["trainax"] + medians["trainax"] * (
        row.updates - _peer_updates(row)
    )
    firsts = [
        row.name,
        str(row.updates),
        f"{first['trainer']:.2f}",
        f"{choice.seconds_spent:.2f}",
        f"{first['scan']:.2f}",
        f"{peer_run:.1f}",
    ]
    return {"speed": line, "first": firsts}


def _peer_updates(row: Row) -> int:
    """trainax is slow where dispatch dominates; its time per update does not change."""
    return min(row.updates, 300 if row.updates > 1500 else 60 // row.rollout)


def _loop_updates(row: Row) -> int:
    return min(row.updates, 1000 if row.updates > 1500 else 60 // row.rollout)


def _scan_updates(row: Row) -> int:
    """Enough for what is constant in a run by hand, a millisecond, not to count."""
    most = 100_000 if row.updates > 1500 else 60
    return min(row.updates, most // row.rollout)


def _peer(row: Row, optimizer: Any) -> Callable[[], Any]:
    trainer = ta.trainer.SupervisedTrainer(
        row.data,
        num_rollout_steps=row.rollout,
        optimizer=optimizer,
        num_training_steps=_peer_updates(row),
        batch_size=row.batch_size,
    )
    # Windows are stacked and permuted once here, as they are in one long run.
    stacker = trainer.trajectory_sub_stacker
    mixer = ta.PermutationMixer(
        stacker.num_total_samples, _peer_updates(row), row.batch_size, KEY
    )
    update = eqx.filter_jit(trainer.step_fn)
    opt_state = optimizer.init(eqx.filter(row.model, eqx.is_array))

    def run() -> Any:
        model, state, losses = row.model, opt_state, []
        for i in range(_peer_updates(row)):
            indices, _ = mixer(i, return_info=True)
            model, state, loss = update(model, state, stacker(indices))
            losses.append(loss)
        return jnp.array(losses)

    return run


def _by_hand(row: Row, optimizer: Any) -> dict[str, Callable[[], Any]]:
    windows = ta.TrajectorySubStacker(row.data, row.rollout + 1).data_sub_trajectories
    shape = (_scan_updates(row), row.batch_size)
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
        for i in range(_loop_updates(row)):
            p, s, loss = one(p, s, windows, indices, i)
            losses.append(loss)
        return losses

    return {
        "loop": loop,
        "scan": lambda: many(params, optimizer.init(params), windows, indices),
    }


def _convs(model: Any, dims: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
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


def _residual() -> tuple[Callable[..., Any], Callable[..., Any]]:
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


def _mlp(params: Any, u: jax.Array) -> jax.Array:
    layers = [(params[2 * i], params[2 * i + 1]) for i in range(len(params) // 2)]
    for weight, bias in layers[:-1]:
        u = relu(u @ weight.T + bias)
    weight, bias = layers[-1]
    return u @ weight.T + bias


def _as_module(model: Any) -> Callable[..., Any]:
    """Networks whose layers are not simple to write out run as their modules."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    structure = jax.tree.structure(arrays)

    def run(params: Any, u: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(structure.unflatten(params), static))(u)

    return run


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


if __name__ == "__main__":
    main()
