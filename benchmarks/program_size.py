"""How do a program's size and compile time depend on the rollout's length?

python -m benchmarks.program_size [--quick]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pdequinox as pdeqx
import trainax

import trainax_pk as tx
from benchmarks._harness import report, table
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.engine import make_rewrite

LENGTHS = (2, 8, 32, 128)
BRANCH = 2
DIVERTED = f"DivertedChain, branches of {BRANCH}"
POST_PHYSICS = 2
MORE_LINES = 1.05
MORE_SECONDS = 1.5
REPEATS = 3
NUM_UPDATES = 1000

_REFERENCE = tx.sample_data.make_advection_1d_stepper(160)


def _residuum(u_next: jax.Array, u_prev: jax.Array) -> jax.Array:
    return u_next - _REFERENCE(u_prev)


OURS: dict[str, Callable[[int], AbstractConfiguration]] = {
    "Supervised": lambda t: tx.configuration.Supervised(t),
    DIVERTED: lambda t: tx.configuration.DivertedChain(
        t, BRANCH, ref_stepper=_REFERENCE
    ),
    f"MixChainPostPhysics, {POST_PHYSICS} after": lambda t: (
        tx.configuration.MixChainPostPhysics(t, POST_PHYSICS, ref_stepper=_REFERENCE)
    ),
    "Residuum": lambda t: tx.configuration.Residuum(t, residuum_fn=_residuum),
}
NOTE = """A whole train step (gradient and Adam) of a 1D conv net of 32 channels and depth
6, 160 points, batch of 20. Lines of StableHLO, and seconds that XLA takes to compile
them: the least of {repeats} compilations, the lengths in turn (trainax: of one). Ours is
the step as the engine compiles it, rewritten for the backend; trainax's is its trainer's
`step_fn`."""


def main() -> None:
    """Measures every configuration and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, no report")
    args = parser.parse_args()
    lengths = (2, 8) if args.quick else LENGTHS
    repeats = 1 if args.quick else REPEATS
    model = pdeqx.arch.ConvNet(
        1, 1, 1, hidden_channels=32, depth=1 if args.quick else 6,
        activation=jax.nn.relu, key=jax.random.key(0),
    )  # fmt: skip
    rows, verdicts = [], []
    for name, make in OURS.items():
        found = measure(lambda t, make=make: _ours(make(t), model), lengths, repeats)
        rows.append((name, *map(_cell, found)))
        # T = 2 with branches of 2 is a single branch, without a loop.
        verdicts += _verdicts(name, found[1:] if name == DIVERTED else found)
    found = measure(lambda t: _trainax(model, t), lengths, 1)
    rows.append(("trainax, Supervised", *map(_cell, found)))
    header = ("lines, seconds; T =", *map(str, lengths))
    body = "\n\n".join([NOTE.format(repeats=repeats), table(header, rows)])
    if args.quick:
        print(body, *verdicts, sep="\n")
    else:
        question = "Program size and compile time by the length of the rollout"
        report("program_size", question, body, "\n".join(verdicts))


def measure(
    lower: Callable[[int], Any], lengths: tuple[int, ...], repeats: int
) -> list[tuple[int, float]]:
    """Lines, and least seconds to compile, of the program of each length."""
    lines: dict[int, int] = {}
    seconds: dict[int, list[float]] = {t: [] for t in lengths}
    for _ in range(repeats):
        for t in lengths:
            # Lowered anew: what is lowered keeps what it was once compiled to.
            lowered = lower(t)
            lines[t] = lowered.as_text().count("\n")
            began = time.perf_counter()
            lowered.compile()
            seconds[t].append(time.perf_counter() - began)
    return [(lines[t], min(seconds[t])) for t in lengths]


def _ours(configuration: AbstractConfiguration, model: Any) -> Any:
    optimizer = optax.adam(1e-3)
    step = tx.make_train_step(configuration, optimizer)
    state = tx.TrainState.create(model, optimizer, key=jax.random.key(0))
    rewrite = make_rewrite(jax.default_backend(), NUM_UPDATES)
    batch = jnp.ones((20, configuration.num_times, 1, 160))
    return jax.jit(rewrite(step)).lower(state, batch)


def _trainax(model: Any, length: int) -> Any:
    trainer = trainax.trainer.SupervisedTrainer(
        jnp.ones((20, length + 1, 1, 160)),
        optimizer=optax.adam(1e-3),
        num_training_steps=NUM_UPDATES,
        batch_size=20,
        num_rollout_steps=length,
    )
    params, static = eqx.partition(model, eqx.is_array)
    opt_state = trainer.optimizer.init(params)

    def step(params: Any, opt_state: Any, batch: jax.Array) -> Any:
        stepper = eqx.combine(params, static)
        stepper, opt_state, loss = trainer.step_fn(stepper, opt_state, batch)
        return eqx.filter(stepper, eqx.is_array), opt_state, loss

    batch = jnp.ones((20, length + 1, 1, 160))
    return jax.jit(step).lower(params, opt_state, batch)


def _cell(found: tuple[int, float]) -> str:
    return f"{found[0]:,}, {found[1]:.2f} s"


def _verdicts(name: str, found: list[tuple[int, float]]) -> list[str]:
    (few, quick), (many, slow) = found[0], found[-1]
    checks = [
        ("lines", many / few, MORE_LINES),
        ("compile time", slow / quick, MORE_SECONDS),
    ]
    return [
        f"- {name}: {what} at the longest {value:.2f} of the shortest, at most {limit} "
        f"wanted: {'met' if value <= limit else '**missed**'}."
        for what, value, limit in checks
    ]


if __name__ == "__main__":
    main()
