"""What do adjoints cost, and what is their gradient worth, at every layer?

python -m benchmarks.adjoints [--quick] [rollout] [solve] [ode] [equation] [assimilation]

Each part takes up to three minutes and is kept in a file of its own; the report is
written anew from all parts that there are.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

import trainax_pk as tx
from benchmarks._harness import RESULTS, hardware, report
from trainax_pk.adjoint import (
    AdjointReport,
    BacksolveAdjoint,
    ImplicitAdjoint,
    adjoint_report,
    solve_ode,
)

NOTE = """Tables of `tx.adjoint.adjoint_report`: the gradient of a scalar loss with respect
to all parameters, one jitted program. Cosine, norm ratio and relative error are against
the first row. Temporaries are XLA's `memory_analysis().temp_size_in_bytes`. Time is the
median over rounds of the ratio to the first row within the round; the first row's time
itself is given above each table. Sizes of rollouts with a network of convolutions are in
the report of `benchmarks/rollout_adjoints.py`."""


def main() -> None:
    """Measures what is asked for and writes the report of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, no report")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    args = parser.parse_args()
    kept = RESULTS / f"adjoints_{hardware()}.json"
    texts = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.parts or PARTS:
        body = "\n\n".join(PARTS[name](quick=args.quick))
        print(body)
        texts[name] = body
        if not args.quick:
            kept.write_text(json.dumps(texts, indent=1))
    if not args.quick:
        ordered = [texts[name] for name in PARTS if name in texts]
        question = "What do adjoints cost, and what is their gradient worth?"
        report("adjoints", question, "\n\n".join([NOTE, *ordered]))


def _measured(
    title: str,
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    adjoints: dict[str, Any],
    *,
    rounds: int = 7,
) -> tuple[AdjointReport, str]:
    found = adjoint_report(loss_fn, params, adjoints, rounds=rounds)
    first = found.rows[found.reference].cost.seconds or math.nan
    text = f"### {title}\n\n{found.reference}: {1e3 * first:.1f} ms per gradient.\n\n"
    gc.collect()
    return found, text + found.markdown()


# Rollouts.


def rollouts(*, quick: bool) -> list[str]:
    """MLP on Lorenz-63: from few steps to many."""
    model = eqx.nn.MLP(3, 3, 64, 3, key=jax.random.key(0))
    texts = ["## Rollout layer: MLP 64 x 3, Lorenz-63, batch of 64"]
    for length in (8,) if quick else (16, 128, 1024):
        data = tx.sample_data.lorenz_rk4(
            64, temporal_horizon=length + 1, key=jax.random.key(1)
        )
        windows = (data - jnp.mean(data)) / jnp.std(data)

        def loss(model: Any, adjoint: Any, windows: Any = windows) -> Any:
            length = windows.shape[1] - 1
            configuration = tx.configuration.Supervised(length, adjoint=adjoint)
            return configuration(model, windows)[0]

        root = 2 * math.ceil(math.sqrt(length)) + 2
        adjoints = {
            "direct": tx.DirectAdjoint(),
            "checkpoint": tx.RecursiveCheckpointAdjoint(),
            f"checkpoint({root})": tx.RecursiveCheckpointAdjoint(root),
            "k = 8": tx.KStepAdjoint(8),
            "k = 4": tx.KStepAdjoint(4),
            "k = 1": tx.OneStepAdjoint(),
        }
        texts.append(_measured(f"T = {length}", loss, model, adjoints)[1])
    return texts


# Inner solves.


def solves(*, quick: bool) -> list[str]:
    """A deep equilibrium layer: x = tanh(W x + U b), iterated."""
    texts = [
        "## Inner-solve layer: optimistix.fixed_point of x = tanh(W x + b), a member of "
        "the batch per row, as many steps as given"
    ]
    sizes = ((16, 32, 8),) if quick else ((32, 64, 8), (32, 64, 64), (256, 256, 64))
    for batch, width, steps in sizes:
        key_w, key_b = jax.random.split(jax.random.key(0))
        weights = 0.5 * jax.random.normal(key_w, (width, width)) / math.sqrt(width)
        inputs = jax.random.normal(key_b, (batch, width))
        operands = (weights, inputs)

        def loss(operands: Any, adjoint: Any, steps: int = steps) -> Any:
            solution = optx.fixed_point(
                lambda x, o: jnp.tanh(x @ o[0] + o[1]),
                # No tolerance is met, so that all take the same steps.
                optx.FixedPointIteration(rtol=0.0, atol=1e-30),
                jnp.zeros_like(operands[1]),
                operands,
                adjoint=adjoint,
                max_steps=steps,
                throw=False,
            )
            return jnp.mean(solution.value**2)

        gmres = lx.GMRES(rtol=1e-5, atol=1e-5)
        adjoints = {
            "direct": tx.DirectAdjoint(),
            "checkpoint": tx.RecursiveCheckpointAdjoint(),
            "k = 4": tx.KStepAdjoint(4),
            "k = 2": tx.KStepAdjoint(2),
            "k = 1": tx.OneStepAdjoint(),
            "implicit, GMRES": ImplicitAdjoint(gmres),
        }
        title = f"batch {batch}, width {width}, {steps} steps"
        texts.append(_measured(title, loss, operands, adjoints)[1])
    return texts


# Ordinary differential equations.


def equations(*, quick: bool) -> list[str]:
    """A neural ODE by Heun's method, against a scan by hand."""
    texts = ["## ODE layer: neural ODE, Heun's method, MLP 64 x 2 on 4 numbers"]
    sizes = ((8, 20),) if quick else ((32, 100), (32, 1000), (1, 1000))
    for batch, steps in sizes:
        mlp = eqx.nn.MLP(4, 4, 64, 2, jnp.tanh, key=jax.random.key(0))
        start = jax.random.normal(jax.random.key(1), (batch, 4))
        span = 5.0

        def field(t: Any, y: Any, mlp: Any) -> Any:
            del t
            return jax.vmap(mlp)(y)

        def loss(
            mlp: Any,
            how: Any,
            start: Any = start,
            steps: int = steps,
            field: Any = field,
        ) -> Any:
            dt = span / steps
            if how is None:

                def heun(y: Any, _: None) -> Any:
                    k1 = field(0.0, y, mlp)
                    k2 = field(0.0, y + dt * k1, mlp)
                    return y + dt / 2 * (k1 + k2), None

                return jnp.mean(jax.lax.scan(heun, start, None, length=steps)[0] ** 2)
            solve_fn, adjoint = how
            solution = solve_fn(
                diffrax.ODETerm(field), diffrax.Heun(), 0.0, span, dt, start, mlp,
                adjoint=adjoint, max_steps=steps,
            )  # fmt: skip
            return jnp.mean(solution.ys**2)

        root = 2 * math.ceil(math.sqrt(steps)) + 2
        native = diffrax.diffeqsolve
        adjoints = {
            "scan by hand": None,
            "direct": (solve_ode, tx.DirectAdjoint()),
            "checkpoint": (solve_ode, tx.RecursiveCheckpointAdjoint()),
            f"checkpoint({root})": (solve_ode, tx.RecursiveCheckpointAdjoint(root)),
            "backsolve": (solve_ode, BacksolveAdjoint()),
            "diffrax, checkpoint": (native, diffrax.RecursiveCheckpointAdjoint()),
            "diffrax, direct": (native, diffrax.DirectAdjoint()),
        }
        found, text = _measured(f"batch {batch}, {steps} steps", loss, mlp, adjoints)
        texts.append(text)
        if steps == 1000:
            cost = found.rows["checkpoint"].cost.relative_time or math.nan
            texts.append(
                f"Checkpointed, {steps} steps, batch {batch}: {cost:.2f} of the scan's "
                f"time, at most 1.1 wanted: {'met' if cost <= 1.1 else '**missed**'}."
            )
    return texts


# Reports with pictures.


class ConvNet(eqx.Module):
    """A residual network of circular convolutions."""

    layers: tuple[eqx.nn.Conv1d, ...]

    def __init__(self, *, key: Any, width: int = 16) -> None:
        sizes = (1, width, width, 1)
        keys = jax.random.split(key, 3)
        self.layers = tuple(
            eqx.nn.Conv1d(a, b, 5, padding="SAME", padding_mode="CIRCULAR", key=k)
            for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )

    def __call__(self, u: Any) -> Any:
        """u plus a tenth of the network."""
        h = u
        for layer in self.layers[:-1]:
            h = jax.nn.gelu(layer(h))
        return u + 0.1 * self.layers[-1](h)


def kuramoto_sivashinsky(*, quick: bool) -> list[str]:
    """A corrected coarse stepper over 100 steps of a chaotic equation."""
    steps, points, batch = (10, 32, 2) if quick else (100, 64, 8)
    options = {"dt": 0.25, "domain_extent": 30.0}
    windows = tx.sample_data.kuramoto_sivashinsky_1d(
        points, batch, temporal_horizon=steps + 1, key=jax.random.key(0), **options
    )
    physics = tx.sample_data.make_kuramoto_sivashinsky_1d_stepper(points, **options)
    net = ConvNet(key=jax.random.key(1))

    def loss(net: Any, adjoint: Any) -> Any:
        step = lambda u: physics(u) + 0.02 * net(u)  # noqa: E731
        return tx.configuration.Supervised(steps, adjoint=adjoint)(step, windows)[0]

    adjoints = {
        "direct": tx.DirectAdjoint(),
        "checkpoint": tx.RecursiveCheckpointAdjoint(),
        "checkpoint(20)": tx.RecursiveCheckpointAdjoint(20),
        **{f"k = {k}": tx.KStepAdjoint(k) for k in (50, 25, 10, 4, 1)},
    }
    found, text = _measured(f"T = {steps}", loss, net, adjoints, rounds=5)
    title = (
        "## Kuramoto-Sivashinsky: a network that corrects the physics, "
        f"{points} points, batch of {batch}"
    )
    return [title, text, *_picture(found, "kuramoto_sivashinsky", quick=quick)]


def assimilation(*, quick: bool) -> list[str]:
    """4DVarNet in two dimensions: the adjoint of its ten steps."""
    shape = (1, 2, 8, 8) if quick else (2, 5, 64, 64)
    steps = 3 if quick else 10
    channels = shape[1]
    keys = jax.random.split(jax.random.key(0), 4)
    target = jax.random.normal(keys[0], shape)
    mask = jax.random.bernoulli(keys[1], 0.3, shape).astype(target.dtype)
    batch = tx.Batch2D(target * mask, mask, target)
    prior = tx.solver.BilinAEPrior2D(channels, 16, key=keys[2])
    modulator = tx.solver.ConvLSTMGradMod2D(channels, 32, key=keys[3])

    def loss(parts: Any, adjoint: Any) -> Any:
        net = tx.solver.FourDVarNet2D(*parts, steps, solver_adjoint=adjoint)
        return jnp.mean((net(batch) - target) ** 2)

    adjoints = {
        "direct": tx.DirectAdjoint(),
        "checkpoint": tx.RecursiveCheckpointAdjoint(),
        "k = 5": tx.KStepAdjoint(5),
        "k = 2": tx.KStepAdjoint(2),
        "k = 1": tx.OneStepAdjoint(),
    }
    found, text = _measured(
        f"{steps} steps", loss, (prior, modulator), adjoints, rounds=3
    )
    title = f"## 4DVarNet in two dimensions, untrained, fields {list(shape)}"
    return [title, text, *_picture(found, "four_d_var_net", quick=quick)]


def _picture(found: AdjointReport, name: str, *, quick: bool) -> list[str]:
    if quick:
        return []
    path = RESULTS / f"adjoints_{name}_{hardware()}.png"
    found.plot().savefig(path, dpi=130)
    return [f"![gradient quality, memory and time]({path.name})"]


PARTS = {
    "rollout": rollouts,
    "solve": solves,
    "ode": equations,
    "equation": kuramoto_sivashinsky,
    "assimilation": assimilation,
}

if __name__ == "__main__":
    main()
