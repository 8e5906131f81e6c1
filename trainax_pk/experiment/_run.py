"""A whole run as one typed object, and how it is read and trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic
from pydantic import Field

import trainax_pk.checkpoint as checkpoint
import trainax_pk.data as data
import trainax_pk.evaluation as evaluation
import trainax_pk.trainer as trainer
from trainax_pk.experiment._data import Count, NonZero, Scale
from trainax_pk.experiment._read import as_typed, read_document
from trainax_pk.experiment._schedule import Clock, Positive
from trainax_pk.experiment._spec import AbstractSpec, Family


class Training(pydantic.BaseModel):
    """How long, in which portions, and how updates are made.

    Attributes:
        num_steps: Updates; or give `num_epochs`.
        num_epochs: Epochs; or give `num_steps`.
        batch_size: Windows of an update.
        accumulate: Parts that a batch is computed in.
        compute_dtype: Lower precision of forward and backward pass.
        ema_decay: Of the moving average of the weights.
        nonfinite: "raise", "skip" or "ignore".
        program: "auto", "loop" or "scan".
        window_stride: Distance between the first times of windows.
        save_seconds: Time between checkpoints.
        log_every: Updates per line of the metric log.
    """

    model_config = AbstractSpec.model_config

    num_steps: Count | None = None
    num_epochs: Positive | None = None
    batch_size: Count
    accumulate: Count = 1
    compute_dtype: Literal["bfloat16", "float16"] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    program: Literal["auto", "loop", "scan"] = "auto"
    window_stride: Count = 1
    save_seconds: Positive = 60.0
    log_every: Count = 100

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "expected either num_steps or num_epochs. Give one of them."
            )
        return self

    def options(self) -> dict[str, Any]:
        """What an update does, as `make_train_step` names it."""
        return {
            "accumulate": self.accumulate,
            "compute_dtype": self.compute_dtype and jnp.dtype(self.compute_dtype),
            "ema_decay": self.ema_decay,
        }

    def clock(self, num_windows: int) -> Clock:
        """How long the run is."""
        per_epoch = num_windows / self.batch_size
        steps = self.num_steps
        if steps is None:
            steps = max(1, round(self.num_epochs * per_epoch))
        return Clock(steps, per_epoch)


class EarlyStopping(pydantic.BaseModel):
    """`tx.evaluation.EarlyStopping`, by what a callback reports."""

    model_config = AbstractSpec.model_config

    monitor: str = "validation"
    patience: Count = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    mode: Literal["min", "max"] = "min"

    def build(self) -> evaluation.EarlyStopping:
        """The rule."""
        monitor = evaluation.Monitor(self.monitor, self.mode, self.min_delta)
        return evaluation.EarlyStopping(monitor, self.patience)


class Run(pydantic.BaseModel):
    """A training run: everything that determines its numbers.

    Attributes:
        seed: Of initial weights, order of the data, and noise.
        precision: "float64" needs JAX's 64-bit mode, which the command line turns on.
        data: Trajectories, or a system that they are simulated with.
        model: The network.
        configuration: The compute graph of the loss.
        optimizer: The optimizer.
        training: Length, batches, and how updates are made.
        callbacks: What looks at training on the way.
        early_stopping: When to end before; None for never.
        trackers: Where the metrics of a run in a folder are shown; they change nothing.

    Example:
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: advection_1d, num_samples: 10}
        ... model: {kind: mlp, width: 16}
        ... configuration: {kind: supervised, num_rollout_steps: 2}
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 20, batch_size: 16}
        ... ''')
        >>> run.optimizer.learning_rate
        0.001
        >>> model, history = experiment.build(run).train()
        >>> history.loss.shape
        (20,)
    """

    model_config = AbstractSpec.model_config

    seed: NonZero = 0
    precision: Literal["float32", "float64"] = "float32"
    data: Annotated[AbstractSpec, Family("data")]
    model: Annotated[AbstractSpec, Family("model")]
    configuration: Annotated[AbstractSpec, Family("configuration")]
    optimizer: Annotated[AbstractSpec, Family("optimizer")]
    training: Training
    callbacks: tuple[Annotated[AbstractSpec, Family("callback")], ...] = ()
    early_stopping: EarlyStopping | None = None
    trackers: tuple[Annotated[AbstractSpec, Family("tracker")], ...] = ()

    @pydantic.model_validator(mode="after")
    def _fit(self) -> "Run":
        given = getattr(self.data, "gives", "states")
        for name in ("configuration", "model"):
            part = getattr(self, name)
            needed = getattr(part, "needs", "states")
            if needed != given:
                raise ValueError(
                    f"expected parts that fit each other: data {self.data.kind} give "
                    f"{given}, {name} {part.kind} needs {needed}. Change one of them."
                )
            if getattr(part, "next_step", False):
                # Two states that follow each other are a field and its condition.
                given = "fields"
        if "rollout" in [c.kind for c in self.callbacks] and not self.is_stepper:
            raise ValueError(
                f"expected a model that steps with the callback rollout, got "
                f"{self.model.kind}. Remove it; `generation` scores draws."
            )
        return self

    @property
    def is_stepper(self) -> bool:
        """Whether the model maps a state to the next one."""
        return getattr(self.model, "is_stepper", True)

    def to_data(self) -> dict[str, Any]:
        """As a run file would have it, every field written out."""
        return self.model_dump(mode="json")


class Made(NamedTuple):
    """What runs of the same data share.

    Attributes:
        split: Training, validation and test data.
        stepper: The system's own stepper, or None.
        scale: What was taken out of the states, or None.
    """

    split: data.Split
    stepper: Any
    scale: Scale | None


class Parts(NamedTuple):
    """What an update is made of.

    Attributes:
        configuration: The compute graph of the loss.
        optimizer: The optax transformation.
        clock: How long the run is.
    """

    configuration: Any
    optimizer: Any
    clock: Clock


class Built(NamedTuple):
    """The objects that a run describes.

    Attributes:
        run: The description.
        split: Trajectories.
        model: With its first weights.
        trainer: What trains it.
        key: Key of the training.
        scale: What was taken out of the states, or None.
    """

    run: Run
    split: data.Split
    model: Any
    trainer: trainer.Trainer
    key: jax.Array
    scale: Scale | None = None

    def train(self, run_dir: Path | str | None = None) -> tuple[Any, Any]:
        """Trains; in a folder, it goes on where it was.

        Args:
            run_dir: As for `Trainer`.

        Returns:
            The model and the history.

        Raises:
            ImportError: A tracker whose package is not installed.
        """
        check_trackers(self.run)
        return self.trainer(self.model, key=self.key, run_dir=run_dir)


def read_run(
    source: str | Path, overrides: Sequence[str] = (), *, name: str = ""
) -> Run:
    """A run from a YAML file, or from YAML as text.

    A file is data: it names registered kinds and nothing else. Relative paths in it
    count from its folder.

    Args:
        source: A `Path`, or a text of YAML.
        overrides: Fields to replace, `"optimizer.learning_rate=1e-4"`.
        name: What messages call a text.

    Returns:
        The run.

    Raises:
        RunFileError: Every problem with file, line, field and remedy; nothing has been
            computed.

    Example:
        >>> from trainax_pk import experiment
        >>> try:
        ...     experiment.read_run("model: {kind: mlp, widht: 3}")
        ... except experiment.RunFileError as error:
        ...     print(error.problems[1].split(". ")[0])
        text:1: model.widht: unknown field
    """
    return as_typed(Run, read_document(source, overrides, name=name))


def build(run: Run, *, progress: bool = False) -> Built:
    """Makes data, model and trainer of a run.

    Args:
        run: The description.
        progress: Show a bar.

    Returns:
        The objects.

    Raises:
        ValueError: Parts that do not fit each other; float64 without JAX's 64-bit mode.

    Example:
        >>> from trainax_pk import experiment
        >>> built = experiment.build(experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_epochs: 2, batch_size: 19}
        ... '''))
        >>> built.trainer.num_training_steps
        16
    """
    return build_with(run, make_data(run), progress=progress)


def build_with(
    run: Run,
    made: Made,
    *,
    stop: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> Built:
    """As `build`, with data that were made before.

    Args:
        run: The description.
        made: Its data.
        stop: Train so many updates of the run; None for all of it.
        mesh: The devices; None for one.
        progress: Show a bar.
    """
    model_key, key = jax.random.split(jax.random.key(run.seed))
    model = make_model(run, model_key)
    model = getattr(run.model, "fitted", _as_it_is)(model, made.split.train)
    parts, training = assemble(run, made), run.training
    trained = trainer.Trainer(
        made.split.train,
        parts.configuration,
        optimizer=parts.optimizer,
        num_training_steps=parts.clock.total if stop is None else stop,
        batch_size=training.batch_size,
        callbacks=[c.build(parts.configuration, made.split) for c in run.callbacks],
        nonfinite=training.nonfinite,
        window_stride=training.window_stride,
        program=training.program,
        checkpoints=checkpoint.Policy(every_seconds=training.save_seconds),
        log_every=training.log_every,
        early_stopping=run.early_stopping and run.early_stopping.build(),
        trackers=[t.build() for t in run.trackers],
        mesh=mesh,
        progress=progress,
        **training.options(),
    )
    return Built(run, made.split, model, trained, key, made.scale)


def make_data(run: Run) -> Made:
    """Data of a run, and the stepper behind them."""
    check_precision(run)
    split, stepper = run.data.build(), run.data.stepper()
    scale = run.data.standardisation() if hasattr(run.data, "standardisation") else None
    return Made(split, stepper, scale)


def make_model(run: Run, key: jax.Array) -> Any:
    """The network of a run, with random weights; no data are made."""
    prior = run.data.prior() if hasattr(run.data, "prior") else None
    known = {} if prior is None else {"prior": prior}
    return run.model.build(run.data.state_shape(), key, **known)


def assemble(run: Run, made: Made) -> Parts:
    """Configuration and optimizer of a run; numbers in both may be traced."""

    def clock(num_times: int) -> Clock:
        return run.training.clock(_num_items(run, made, num_times))

    configuration = run.configuration.build(made.stepper, clock)
    length = clock(configuration.num_times)
    return Parts(configuration, run.optimizer.build(length), length)


def _num_items(run: Run, made: Made, num_times: int) -> int:
    items = data.as_items(
        made.split.train,
        lambda _: num_times - 1,
        stride=run.training.window_stride,
        only_initial=num_times == 1,
    )
    return len(items)


def _as_it_is(model: Any, train: Any) -> Any:
    del train
    return model


def check_trackers(run: Run) -> None:
    """Refuses a run that is to be trained with a tracker that is not installed."""
    for tracker in run.trackers:
        tracker.check()


def check_precision(run: Run) -> None:
    """Refuses a run of another precision than JAX is set to."""
    wide = jax.config.jax_enable_x64
    if wide != (run.precision == "float64"):
        state = "on" if wide else "off"
        raise ValueError(
            f"Expected JAX's 64-bit mode to fit precision {run.precision}, it is {state}. "
            "Set jax.config.update('jax_enable_x64', ...) first, or change `precision`."
        )
