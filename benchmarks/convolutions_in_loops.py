"""Do convolutions still need rewriting inside loops, and does the rewrite still pay?

    python benchmarks/convolutions_in_loops.py [nets|widths|ensemble ...]

nets: training of the field's convolutional nets; a loop of jitted updates and one device
loop over many, each plain and rewritten, beside a rewrite of every convolution to
channels-last without a rule. Wall time, interleaved, medians of the rounds.
widths: small nets, where a rewrite can lose. Processor time of the whole process, so run
it on one core (`taskset -c 0`): then it does not depend on what else the machine does.
ensemble: members vmapped against one after another. Processor time too.

The last line says whether the remedy still helps on this JAX and backend. Drop it when
the ratio is below 1.1.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pdequinox as pdeqx

from trainax_pk.engine._convolution_forms import (
    channels_last,
    group_after_group,
    read_convolution,
)
from trainax_pk.engine._fast_convolutions import fast_convolutions, inspect_loops
from trainax_pk.engine._jaxpr import replace_equations

ROUNDS = 7
SECONDS = 0.1
NUM_BATCHES = 8


class Case(NamedTuple):
    """A net with its data: `(batch, 1, *space)`, rolled out over so many steps."""

    name: str
    net: Callable[..., Any]
    batch: int
    space: tuple[int, ...]
    num_steps: int


def conv_net(dims: int, width: int, depth: int) -> Callable[..., Any]:
    """A net of plain convolutions, as APEBench's `Conv;width;depth;relu`."""
    return functools.partial(
        pdeqx.arch.ConvNet,
        dims,
        1,
        1,
        hidden_channels=width,
        depth=depth,
        boundary_mode="periodic",
        activation=jax.nn.relu,
    )


def res_net(dims: int, width: int, blocks: int) -> Callable[..., Any]:
    """A residual net, as APEBench's `Res;width;blocks;relu`."""
    return functools.partial(
        pdeqx.arch.ClassicResNet,
        dims,
        1,
        1,
        hidden_channels=width,
        num_blocks=blocks,
        boundary_mode="periodic",
        activation=jax.nn.relu,
    )


def linear_stencil(*, key: Any) -> eqx.Module:
    """trainax's quickstart: a learned stencil of two points."""
    return eqx.nn.Conv1d(
        1, 1, 2, padding="SAME", padding_mode="CIRCULAR", use_bias=False, key=key
    )


NETS = [
    Case(f"{name}, rollout {steps}", net, batch, space, steps)
    for name, net, batch, space, rollouts in [
        ("1D conv net 34 x 10", conv_net(1, 34, 10), 20, (160,), (1, 5)),
        ("1D residual net 26 x 8", res_net(1, 26, 8), 20, (160,), (1, 5)),
        ("2D conv net 16 x 4", conv_net(2, 16, 4), 8, (32, 32), (1, 5)),
        ("linear stencil", linear_stencil, 32, (30,), (1, 20)),
    ]
    for steps in rollouts
]
WIDTHS = [
    Case(f"{kind} {width} channels, {batch} x {space}", net, batch, space, 1)
    for kind, net, width, space, batch in [
        ("conv", conv_net(1, 2, 3), 2, (30,), 20),
        ("conv", conv_net(1, 4, 3), 4, (30,), 20),
        ("conv", conv_net(1, 8, 3), 8, (30,), 20),
        ("conv", conv_net(1, 16, 3), 16, (64,), 20),
        ("conv", conv_net(1, 8, 3), 8, (160,), 1),
        ("residual", res_net(1, 8, 3), 8, (48,), 20),
        ("conv", conv_net(2, 4, 3), 4, (16, 16), 8),
        ("conv", conv_net(2, 8, 3), 8, (16, 16), 8),
        ("conv", conv_net(2, 16, 3), 16, (16, 16), 8),
    ]
]
ENSEMBLES = [
    (Case("1D conv net 34 x 4", conv_net(1, 34, 4), 20, (160,), 1), 8),
    (Case("1D conv net 8 x 4", conv_net(1, 8, 4), 20, (48,), 1), 8),
    (Case("1D conv net 34 x 4", conv_net(1, 34, 4), 20, (160,), 1), 24),
    (Case("linear stencil", linear_stencil, 32, (30,), 1), 8),
]


def everything_channels_last(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The rewrite without a rule."""

    def replacement(eqn: Any) -> Any:
        if eqn.primitive.name != "conv_general_dilated":
            return None
        conv = read_convolution(eqn)
        form = channels_last if conv.groups == 1 else group_after_group(channels_last)
        return lambda lhs, rhs: form(lhs, rhs, conv)

    def rewritten(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = jax.extend.core.jaxpr_as_fun(replace_equations(jaxpr, replacement))(
            *jax.tree.leaves(args)
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return rewritten


def make_update(case: Case, *, unroll: bool = False) -> tuple[Any, Any, Any]:
    """The update `(state, batch) -> (state, loss)`, a state maker, and the data."""
    optimizer = optax.adam(1e-3)
    _, static = eqx.partition(case.net(key=jax.random.key(0)), eqx.is_inexact_array)

    def start(key: Any) -> Any:
        params = eqx.filter(case.net(key=key), eqx.is_inexact_array)
        return params, optimizer.init(params)

    def loss(params: Any, u: Any) -> Any:
        model = jax.vmap(eqx.combine(params, static))

        def step(u: Any, _: Any) -> Any:
            new = model(u)
            return new, jnp.mean((new - u) ** 2)

        if unroll or case.num_steps == 1:
            losses = []
            for _ in range(case.num_steps):
                u, value = step(u, None)
                losses.append(value)
            return jnp.mean(jnp.stack(losses))
        return jnp.mean(jax.lax.scan(step, u, length=case.num_steps)[1])

    def update(state: Any, u: Any) -> Any:
        params, moments = state
        value, grad = jax.value_and_grad(loss)(params, u)
        delta, moments = optimizer.update(grad, moments, params)
        return (optax.apply_updates(params, delta), moments), value

    shape = (NUM_BATCHES * case.batch, 1, *case.space)
    return update, start, jax.random.normal(jax.random.key(1), shape)


def programs(update: Any, data: Any, batch: int) -> tuple[Any, Any]:
    """One device loop over many updates, and a host loop over one jitted update."""

    def one(state: Any, data: Any, i: Any) -> Any:
        begin = (i % NUM_BATCHES) * batch
        return update(state, jax.lax.dynamic_slice_in_dim(data, begin, batch))

    def many(state: Any, data: Any, count: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            state, total = carry
            state, value = one(state, data, i)
            return state, total + jnp.sum(value)

        return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(())))

    jitted = jax.jit(one)

    def loop(state: Any, data: Any, count: int) -> Any:
        for i in range(count):
            state, value = jitted(state, data, i)
        return state, value

    return jax.jit(many), loop


def time_all(
    runs: dict[str, Callable[[int], Any]], *, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds per update, interleaved; slow programs get fewer rounds."""
    counts, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        jax.block_until_ready(run(1))
        began = time.perf_counter()
        jax.block_until_ready(run(1))
        counts[name] = max(1, int(SECONDS / (time.perf_counter() - began)))
    for i in range(ROUNDS):
        for name, run in runs.items():
            if i >= 3 and times[name][0] > 2e3 * SECONDS:
                continue
            began = clock()
            jax.block_until_ready(run(counts[name]))
            took = (clock() - began) / counts[name]
            times[name].append(1e3 * took)
    return {name: statistics.median(values) for name, values in times.items()}


def bound(program: Any, state: Any, data: Any) -> Callable[[int], Any]:
    """`count -> arrays` from one state."""
    return lambda count: program(state, data, count)


def report(title: str, case: str, row: dict[str, float]) -> None:
    """A line of a table in Markdown, under its head where a title is given."""
    if title:
        print(f"\n### {title}\n\n| case | " + " | ".join(row) + " |")
        print("| --- |" + " ---: |" * len(row))
    print(
        f"| {case} | " + " | ".join(f"{x:.3g}" for x in row.values()) + " |", flush=True
    )


def run_nets() -> list[float]:
    """Wall time per update of every program form. Returns plain scan / fast scan."""
    ratios = []
    for case in NETS:
        update, start, data = make_update(case)
        state = start(jax.random.key(0))
        many, loop = programs(update, data, case.batch)
        fast_many, fast_loop = programs(fast_convolutions(update), data, case.batch)
        last, _ = programs(everything_channels_last(update), data, case.batch)
        forms = {
            "loop": loop,
            "loop, rewritten": fast_loop,
            "scan": many,
            "scan, all channels-last": last,
            "scan, rewritten": fast_many,
        }
        unrolled, *_ = make_update(case, unroll=True)
        forms["loop, unrolled rollout"] = programs(unrolled, data, case.batch)[1]
        runs = {name: bound(form, state, data) for name, form in forms.items()}
        row = time_all(runs, clock=time.perf_counter)
        found = inspect_loops(jax.make_jaxpr(update)(state, data[: case.batch]))
        title = "" if ratios else "ms per update, wall time"
        counts = f"{found.replaceable} of {found.convolutions} rewritten"
        report(title, f"{case.name} ({counts})", row)
        ratios.append(row["scan"] / row["scan, rewritten"])
    return ratios


def run_widths() -> list[float]:
    """Processor time of small nets. Returns plain scan / fast scan."""
    ratios = []
    for case in WIDTHS:
        update, start, data = make_update(case)
        state = start(jax.random.key(0))
        forms = {
            "scan": update,
            "scan, all channels-last": everything_channels_last(update),
            "scan, rewritten": fast_convolutions(update),
        }
        runs = {
            name: bound(programs(form, data, case.batch)[0], state, data)
            for name, form in forms.items()
        }
        row = time_all(runs, clock=time.process_time)
        best = min(row["scan"], row["scan, all channels-last"])
        row["best / rewritten"] = best / row["scan, rewritten"]
        title = "" if ratios else "ms per update, processor time"
        report(title, case.name, row)
        ratios.append(row["scan"] / row["scan, rewritten"])
    return ratios


def run_ensembles() -> list[float]:
    """Processor time per update of all members."""
    ratios = []
    for case, size in ENSEMBLES:
        update, start, data = make_update(case)
        keys = jax.random.split(jax.random.key(0), size)
        states = jax.vmap(start)(keys)
        together = jax.vmap(update, in_axes=(0, None))

        def serial(states: Any, u: Any, update: Any = update) -> Any:
            return jax.lax.map(lambda state: update(state, u), states)

        forms = {
            "vmapped": together,
            "vmapped, rewritten": fast_convolutions(together),
            "one after another, rewritten": fast_convolutions(serial),
        }
        runs = {
            name: bound(programs(form, data, case.batch)[0], states, data)
            for name, form in forms.items()
        }
        row = time_all(runs, clock=time.process_time)
        title = "" if ratios else "ms per update of all members, processor time"
        report(title, f"{size} of {case.name}", row)
        ratios.append(row["vmapped"] / row["vmapped, rewritten"])
    return ratios


def main() -> None:
    """Runs the parts named on the command line."""
    parts = {"nets": run_nets, "widths": run_widths, "ensemble": run_ensembles}
    device = jax.devices()[0]
    for name in sys.argv[1:] or parts:
        ratios = parts[name]()
        worst, best = min(ratios), max(ratios)
        verdict = "helps" if best >= 1.1 else "no longer helps: drop it"
        print(
            f"\nJAX {jax.__version__}, {device.platform} ({device.device_kind}), {name}: "
            f"plain / rewritten {worst:.2f} to {best:.2f}. The remedy {verdict}."
        )


if __name__ == "__main__":
    main()
