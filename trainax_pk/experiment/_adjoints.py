"""What the gradient of a run costs under other adjoints."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from trainax_pk.adjoint import AdjointReport, adjoint_report
from trainax_pk.experiment._run import Built, Run, build, make_model
from trainax_pk.experiment._schedule import Clock
from trainax_pk.experiment._spec import kinds_of

# By the name of a kind, and its fields.
_ADJOINTS: dict[str, dict[str, Any]] = {
    "direct": {"kind": "direct"},
    "checkpointed": {"kind": "checkpointed"},
    "k_step, k = 4": {"kind": "k_step", "k": 4},
    "k_step, k = 1": {"kind": "k_step", "k": 1},
}


def compare_adjoints(
    run: Run | Built, model: Any = None, *, rounds: int = 5
) -> AdjointReport | None:
    """Gradient quality, memory and time of a run's loss under several adjoints.

    Args:
        run: The description, or what `build` made of it.
        model: Where the gradient is taken; by default with the first weights.
        rounds: Of timing; 0 for none.

    Returns:
        As `tx.adjoint.adjoint_report`, on the first windows of the training data; None
        where neither configuration nor model has an adjoint.

    Raises:
        ValueError: As `build`.

    Example:
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: {kind: supervised, num_rollout_steps: 6}
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> report = experiment.compare_adjoints(run, rounds=0)
        >>> bool(report.rows["checkpointed"].total.cosine > 0.999)
        True
    """
    built = run if isinstance(run, Built) else build(run)
    described, windows = built.run, built.trainer.windows
    model = built.model if model is None else model
    rows = jnp.arange(described.training.batch_size, dtype=jnp.int32)
    batch = windows.gather(windows.arrays, rows)
    specs = {
        name: kinds_of("adjoint")[fields["kind"]].model_validate(fields)
        for name, fields in _ADJOINTS.items()
    }
    names = {name: name for name in specs}
    if "adjoint" in type(described.configuration).model_fields:
        stepper, clock = described.data.stepper(), Clock(1, 1.0)

        def of_rollout(model: Any, name: str) -> Any:
            changed = {"adjoint": specs[name]}
            spec = described.configuration.model_copy(update=changed)
            return spec.build(stepper, lambda _: clock)(model, batch, key=built.key)[0]

        return adjoint_report(of_rollout, model, names, rounds=rounds)
    if "solver_adjoint" in type(described.model).model_fields:
        configuration = built.trainer.configuration
        others = {name: _solver(described, spec) for name, spec in specs.items()}

        def of_solver(model: Any, name: str) -> Any:
            arrays = eqx.filter(model, eqx.is_array)
            whole = eqx.combine(arrays, others[name])
            return configuration(whole, batch, key=built.key)[0]

        return adjoint_report(of_solver, model, names, rounds=rounds)
    return None


def _solver(run: Run, adjoint: Any) -> Any:
    """What is no array of a solver with another adjoint."""
    changed = run.model.model_copy(update={"solver_adjoint": adjoint})
    other = make_model(run.model_copy(update={"model": changed}), jax.random.key(0))
    return eqx.filter(other, eqx.is_array, inverse=True)
