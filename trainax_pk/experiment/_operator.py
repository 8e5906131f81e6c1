"""Trained models as operators."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from trainax_pk.experiment._artifact import read_artifact
from trainax_pk.experiment._run import Run, check_precision, make_model
from trainax_pk.experiment._weights import load_weights
from trainax_pk.framework._whole_batch import evaluated


class Standardise(eqx.Module):
    """u -> (u - mean) / std.

    Attributes:
        mean: Taken out.
        std: Divided by.

    Example:
        >>> from trainax_pk.experiment import Standardise
        >>> scale = Standardise(10.0, 2.0)
        >>> scale(14.0), scale.inverse(2.0), scale.get_config()
        (2.0, 14.0, {'mean': 10.0, 'std': 2.0})
    """

    mean: float = eqx.field(static=True)
    std: float = eqx.field(static=True)

    def __call__(self, u: PyTree[jax.Array]) -> PyTree[jax.Array]:
        """Standardises."""
        return jax.tree.map(lambda x: (x - self.mean) / self.std, u)

    def inverse(self, u: PyTree[jax.Array]) -> PyTree[jax.Array]:
        """Undoes it."""
        return jax.tree.map(lambda x: self.mean + self.std * x, u)

    def get_config(self) -> dict[str, Any]:
        """Mean and standard deviation."""
        return {"mean": self.mean, "std": self.std}

    @property
    def state(self) -> dict[str, Any]:
        """Where to find its class, and its configuration."""
        return _state_of(self)


class Operator(eqx.Module):
    """A trained model as an operator: it steps, and says what it is.

    `operator(u)` is the next state, in the units of the data: what was done to them
    before training is done here, and undone. Its layers are those of evaluation, without
    dropout. It stands wherever a stepper may, such as `tx.rollout`, `tx.solver.cycle` or
    `tx.data.StepperModel`. A stepper that draws takes a key:
    `tx.Stepper(operator, stochastic=True)`. One of Flax or Keras may be called without:
    if it draws in evaluation too, it then draws the same each time.

    Attributes:
        model: The network with its trained weights.
        config: The artifact's run, JSON values alone.
        preprocessing: What brings data into the network's units, or None.

    Example:
        >>> from trainax_pk.experiment import Operator, Standardise
        >>> double = Operator(lambda u: 2 * u, {"seed": 0})
        >>> double(3.0), double.get_config()
        (6.0, {'seed': 0})
        >>> Operator(double.model, {}, Standardise(1.0, 10.0))(3.0)  # 1 + 2 (3 - 1)
        5.0
    """

    model: Any
    config: dict[str, Any] = eqx.field(static=True)
    preprocessing: Standardise | None = None

    def __call__(
        self, u: PyTree[jax.Array], *, key: PRNGKeyArray | None = None
    ) -> PyTree[jax.Array]:
        """The next state."""
        model, options = evaluated(self.model, key), {} if key is None else {"key": key}
        if self.preprocessing is None:
            return model(u, **options)
        return self.preprocessing.inverse(model(self.preprocessing(u), **options))

    def get_config(self) -> dict[str, Any]:
        """What it was trained with."""
        return self.config

    @property
    def state(self) -> dict[str, Any]:
        """Where to find its class, and its configuration."""
        return _state_of(self)


class Sequential(eqx.Module):
    """Operators one after another, as an operator.

    Attributes:
        operators: The first is applied first.

    Raises:
        ValueError: None, or something that cannot be called.

    Example:
        >>> from trainax_pk.experiment import Sequential, Standardise
        >>> both = Sequential(Standardise(1.0, 2.0), Standardise(0.0, 0.5))
        >>> both(5.0), both.get_config()["operators"][1]["config"]
        (4.0, {'mean': 0.0, 'std': 0.5})
    """

    operators: tuple[Any, ...]

    def __init__(self, *operators: Any) -> None:
        """Keeps them.

        Args:
            *operators: With `__call__`, and `state` where their configuration is wanted.
        """
        if not operators or not all(map(callable, operators)):
            raise ValueError(
                f"Expected operators, got {operators!r}. Pass one at least, each a "
                "function of a state."
            )
        self.operators = operators

    def __call__(self, u: PyTree[jax.Array]) -> PyTree[jax.Array]:
        """What comes out of the last."""
        for operator in self.operators:
            u = operator(u)
        return u

    def get_config(self) -> dict[str, Any]:
        """Those of the operators, in their order."""
        return {"operators": [getattr(o, "state", repr(o)) for o in self.operators]}

    @property
    def state(self) -> dict[str, Any]:
        """Where to find its class, and its configuration."""
        return _state_of(self)


def _state_of(operator: Any) -> dict[str, Any]:
    cls = type(operator)
    config = operator.get_config()
    return {"module": cls.__module__, "class": cls.__name__, "config": config}


def load_operator(source: str | Path) -> Operator:
    """A trained model from its artifact alone; no pickle is involved.

    Args:
        source: An artifact, or the folder that holds it.

    Returns:
        The operator.

    Raises:
        RunFileError: No artifact.
        ArtifactDamaged: Weights that are not the recorded ones.
        ValueError: JAX's 64-bit mode does not fit the run's precision.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, _, _ = experiment.train(run, folder)
        ...     operator = experiment.load_operator(folder)
        >>> u = jnp.ones(3)
        >>> bool((operator(u) == model(u)).all()), operator.state["class"]
        (True, 'Operator')
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    artifact = read_artifact(source)
    run = Run.model_validate_json(json.dumps(artifact["run"]))
    check_precision(run)
    like = make_model(run, jax.random.key(0))
    weights = artifact["weights"]
    model = load_weights(like, folder / weights["file"], weights["sha256"])
    scale = artifact.get("preprocessing")
    return Operator(model, artifact["run"], Standardise(**scale) if scale else None)
