"""What do the adjoints of a rollout cost, in memory and in time?

python -m benchmarks.rollout_adjoints [--quick] [mlp] [conv]
"""

import argparse
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import pdequinox as pdeqx
import trainax

import trainax_pk as tx
from benchmarks._harness import interleaved, medians, ratio, report, table
from trainax_pk.adjoint import AbstractAdjoint
from trainax_pk.engine import fast_convolutions, platform_needs_it

DIRECT, UNROLLED = "direct", "trainax, unrolled"
LONGEST_UNROLLED = 32
DECIDING = 128


class EquinoxCheckpointed(AbstractAdjoint):
    """A peer: equinox's checkpointed scan, by the treeverse schedule."""

    checkpoints: int | None = None

    def scan(self, body: Any, init: Any, xs: Any, length: int) -> Any:
        """As `jax.lax.scan`."""
        return eqxi.scan(
            body,
            init,
            xs,
            length=length,
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )

    def while_loop(
        self, cond_fun: Any, body_fun: Any, init: Any, *, max_steps: int | None
    ) -> Any:
        """As `jax.lax.while_loop`."""
        return eqxi.while_loop(
            cond_fun,
            body_fun,
            init,
            max_steps=max_steps,
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )


class Problem(NamedTuple):
    """A model, windows for it, and how long rollouts are timed.

    Attributes:
        windows: `num_times -> (B, num_times, ...)`.
        timed: Lengths T that are run; the others are compiled only.
        dearest: The most that checkpointing may cost at T = 128, relative to direct.
    """

    model: Any
    windows: Callable[[int], jax.Array]
    lengths: tuple[int, ...]
    timed: tuple[int, ...]
    dearest: float


def _mlp() -> Problem:
    def windows(num_times: int) -> jax.Array:
        data = tx.sample_data.lorenz_rk4(
            64, temporal_horizon=num_times, key=jax.random.key(1)
        )
        return (data - jnp.mean(data)) / jnp.std(data)

    model = eqx.nn.MLP(3, 3, 64, 3, key=jax.random.key(0))
    return Problem(model, windows, (16, 32, 64, 128, 256, 512), (16, 32, 128, 512), 1.2)


def _conv() -> Problem:
    def windows(num_times: int) -> jax.Array:
        return tx.sample_data.advection_1d_periodic(
            160, num_samples=20, temporal_horizon=num_times, key=jax.random.key(1)
        )

    model = pdeqx.arch.ConvNet(
        1, 1, 1, hidden_channels=32, depth=6, activation=jax.nn.relu,
        key=jax.random.key(0),
    )  # fmt: skip
    return Problem(model, windows, (16, 32, 128, 512), (16, 128), 1.35)


PROBLEMS = {
    "mlp": ("MLP 64 x 3, Lorenz-63, batch of 64", _mlp),
    "conv": ("1D conv net, 32 channels, depth 6, 160 points, batch of 20", _conv),
}
NOTE = """Gradient of the mean squared error of a supervised rollout of T steps, one jitted
program; on a CPU its convolutions are rewritten as the engine does (trainax's loop, which
has none in a loop over time, is left as it is). Memory is XLA's
`memory_analysis().temp_size_in_bytes`. Time is the median over rounds of the ratio to
`DirectAdjoint()` within the round. "Error" is the gradient's, relative to that of
`DirectAdjoint()`, for the longest loop that was timed: rounding for the exact adjoints,
the bias of truncation for k-step."""


def main() -> None:
    """Measures both models and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short loops, no report")
    parser.add_argument("problems", nargs="*", choices=[[], *PROBLEMS], default=[])
    args = parser.parse_args()
    parts, verdicts = [NOTE], []
    for name in args.problems or PROBLEMS:
        title, make = PROBLEMS[name]
        problem = make()
        if args.quick:
            problem = problem._replace(lengths=(8, 16), timed=(8,))
        body, found = measure(problem, rounds=2 if args.quick else 5)
        parts += [f"## {title}", body]
        verdicts += [f"- {title}: {line}" for line in found]
    body = "\n\n".join(parts)
    if args.quick or args.problems:
        print(body, *verdicts, sep="\n")
    else:
        question = "What do the adjoints of a rollout cost, in memory and in time?"
        report("rollout_adjoints", question, body, "\n".join(verdicts))


def adjoints(length: int) -> dict[str, AbstractAdjoint]:
    """The candidates for a loop of a length, ours and equinox's."""
    root = 2 * math.ceil(math.sqrt(length))
    log = 2 * math.ceil(math.log2(length))
    return {
        DIRECT: tx.DirectAdjoint(),
        "checkpoint": tx.RecursiveCheckpointAdjoint(),
        "checkpoint, about 2√T": tx.RecursiveCheckpointAdjoint(max(root, log)),
        "checkpoint, 2 log₂T": tx.RecursiveCheckpointAdjoint(log),
        "k-step, k = 4": tx.KStepAdjoint(4),
        "k-step, k = 1": tx.KStepAdjoint(1),
        "equinox, default": EquinoxCheckpointed(),
        "equinox, about 2√T": EquinoxCheckpointed(root),
    }


def measure(problem: Problem, *, rounds: int) -> tuple[str, list[str]]:
    """Tables of one model, and what they mean."""
    memory: dict[int, dict[str, int]] = {}
    times: dict[int, dict[str, float]] = {}
    seconds: dict[int, float] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for length in problem.lengths:
        params, windows = _operands(problem, length)
        programs = _programs(problem, length)
        memory[length] = {
            n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()
        }
        if length not in problem.timed:
            continue
        runs = {n: _run(p, params, windows) for n, p in programs.items()}
        peaks = _device_peaks(runs, memory[length]) or peaks
        measured = interleaved(runs, rounds=rounds)
        times[length] = {n: ratio(measured, n, DIRECT) for n in runs}
        seconds[length] = medians(measured)[DIRECT]
        gradients = {n: run() for n, run in runs.items()}
        errors |= {n: _error(g, gradients[DIRECT]) for n, g in gradients.items()}
        # Executables of long loops hold much memory.
        del programs, runs
        gc.collect()
    tables = [
        _memory_table(memory),
        _time_table(times, seconds, errors),
    ]
    if peaks:
        longest = max(times)
        rows = [(n, f"{p / 2**20:.1f}") for n, p in peaks.items()]
        header = ("adjoint", f"device's peak so far, T = {longest}, MiB")
        tables.append(table(header, rows))
    return "\n\n".join(tables), _verdicts(problem, memory, times)


def _programs(problem: Problem, length: int) -> dict[str, Any]:
    """Compiled gradients `(params, windows) -> gradient`."""
    params, windows = _operands(problem, length)
    _, static = eqx.partition(problem.model, eqx.is_inexact_array)

    def gradient(loss: Callable[[Any, jax.Array], jax.Array]) -> Any:
        return jax.grad(lambda p, w: loss(eqx.combine(p, static), w))

    def ours(adjoint: AbstractAdjoint) -> Any:
        configuration = tx.configuration.Supervised(length, adjoint=adjoint)
        fn = gradient(lambda model, w: configuration(model, w)[0])
        return fast_convolutions(fn) if platform_needs_it(jax.default_backend()) else fn

    functions = {name: ours(a) for name, a in adjoints(length).items()}
    if length <= LONGEST_UNROLLED:
        functions[UNROLLED] = gradient(trainax.configuration.Supervised(length))
    return {
        name: jax.jit(fn).lower(params, windows).compile()
        for name, fn in functions.items()
    }


def _operands(problem: Problem, length: int) -> tuple[Any, jax.Array]:
    params = eqx.filter(problem.model, eqx.is_inexact_array)
    return params, problem.windows(length + 1)


def _run(program: Any, params: Any, windows: jax.Array) -> Callable[[], Any]:
    return lambda: program(params, windows)


def _device_peaks(
    runs: dict[str, Callable[[], Any]], memory: dict[str, int]
) -> dict[str, int]:
    """The device's peak after each run; it never falls, so the thriftiest run first."""
    if jax.local_devices()[0].memory_stats() is None:
        return {}
    peaks = {}
    for name in sorted(runs, key=memory.__getitem__):
        jax.block_until_ready(runs[name]())
        stats = jax.local_devices()[0].memory_stats()
        peaks[name] = stats["peak_bytes_in_use"]
    return peaks


def _error(gradient: Any, exact: Any) -> float:
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True))
    off = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    return math.sqrt(off / sum(float(jnp.sum(b**2)) for _, b in pairs))


def _memory_table(memory: dict[int, dict[str, int]]) -> str:
    rows = []
    for name in dict.fromkeys(n for row in memory.values() for n in row):
        cells = [
            f"{row[name] / row[DIRECT]:.4f}" if name in row else ""
            for row in memory.values()
        ]
        if name == DIRECT:
            cells = [f"{row[DIRECT] / 2**20:.2f} MiB" for row in memory.values()]
        rows.append((name, *cells))
    return table(("memory, relative to direct; T =", *map(str, memory)), rows)


def _time_table(
    times: dict[int, dict[str, float]],
    seconds: dict[int, float],
    errors: dict[str, float],
) -> str:
    rows = []
    for name in dict.fromkeys(n for row in times.values() for n in row):
        cells = [f"{row[name]:.2f}" if name in row else "" for row in times.values()]
        if name == DIRECT:
            cells = [f"{seconds[t] * 1e3:.1f} ms" for t in times]
        rows.append((name, *cells, f"{errors[name]:.0e}"))
    return table(("time, relative to direct; T =", *map(str, times), "error"), rows)


def _verdicts(
    problem: Problem,
    memory: dict[int, dict[str, int]],
    times: dict[int, dict[str, float]],
) -> list[str]:
    if DECIDING not in times:
        return []
    size, cost = memory[DECIDING], times[DECIDING]
    checks = [
        ("checkpoint, memory", size["checkpoint"] / size[DIRECT], 0.05),
        ("checkpoint, time", cost["checkpoint"], problem.dearest),
        ("k-step (4), memory", size["k-step, k = 4"] / size[DIRECT], 0.1),
    ]
    return [
        f"{what} at T = {DECIDING}: {value:.3f} of direct's, at most {limit} wanted: "
        f"{'met' if value <= limit else '**missed**'}."
        for what, value, limit in checks
    ]


if __name__ == "__main__":
    main()
