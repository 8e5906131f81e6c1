"""A run file's data, loss and optimizer for a network of torch."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk.data as data
from trainax_pk._extras import load
from trainax_pk.configuration._base import window_steps
from trainax_pk.experiment._configuration import KStep, Supervised
from trainax_pk.experiment._data import Scale
from trainax_pk.experiment._optimizer import SGD, AbstractAdam, Adam, AdamW
from trainax_pk.experiment._run import Run, assemble, make_data, read_run
from trainax_pk.experiment._schedule import Clock
from trainax_pk.experiment._spec import AbstractSpec
from trainax_pk.framework import optax_for_torch
from trainax_pk.framework._torch import TORCH_LOSSES, rollout_loss

# Indices of so many updates are computed at once.
_CHUNK = 256
_NATIVE = (SGD, Adam, AdamW)


class HandOff(NamedTuple):
    """A run that Lightning trains; `to_lightning` makes it.

    Attributes:
        module: The `LightningModule`; `module.model` is the network.
        train: The batches of all updates, in their order.
        validation: Every window of the validation data once.
        num_steps: Updates of the run.
        scale: What was taken out of the states, or None.
    """

    module: Any
    train: "Batches"
    validation: "Batches"
    num_steps: int
    scale: Scale | None

    def trainer(self, **options: Any) -> Any:
        """A `lightning.Trainer` of as many updates as the run has.

        Args:
            **options: Those of `lightning.Trainer`.
        """
        lightning = load("lightning.pytorch", "lightning")
        return lightning.Trainer(max_steps=self.num_steps, max_epochs=-1, **options)

    def fit(self, **options: Any) -> Any:
        """Trains; the network is then `module.model`.

        Args:
            **options: Those of `lightning.Trainer`.

        Returns:
            The `lightning.Trainer`.
        """
        trainer = self.trainer(**options)
        trainer.fit(self.module, self.train, self.validation)
        return trainer


def to_lightning(
    run: Run | Path | str,
    model: Any,
    *,
    optimizer: Literal["auto", "torch", "optax"] = "auto",
) -> HandOff:
    """Hands a run over to PyTorch Lightning, for a network of torch.

    The network sees the batches that `experiment.train` would train on, in the same
    order, under the same loss, with the same optimizer, schedule and clipping; from the
    same weights it follows the same curve up to rounding. Taken of the run are `seed`,
    `precision`, `data`, `configuration` (`supervised`), `optimizer` and of `training`
    `num_steps` or `num_epochs`, `batch_size` and `window_stride`. `model`,
    `callbacks` and `trackers` stay behind; so do `accumulate` and `program`, which change
    rounding alone, and `nonfinite`, for which Lightning has `detect_anomaly`.

    Args:
        run: A run, or the path of its file.
        model: A `torch.nn.Module` that maps a batch of states `(B, ...)` to the next
            ones, in the run's precision.
        optimizer: "torch" takes the optimizer of torch.optim, which exists for `sgd`,
            `adam` and `adamw`: others of the same name differ, such as in where they add
            `eps`. "optax" updates torch's parameters by optax, for any kind but `lbfgs`
            (see `tx.framework.optax_for_torch`). "auto": torch's where there is one.

    Returns:
        Module and batches for `lightning.Trainer`; `fit()` trains.

    Raises:
        ValueError: No torch module, one of another precision; a configuration, loss or
            option of training that torch has no counterpart of; an optimizer likewise.
        RunFileError: As `read_run`.
        ImportError: torch or lightning is not installed.

    Example:
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: mlp
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> import torch  # doctest: +SKIP
        >>> net = torch.nn.Linear(3, 3)  # doctest: +SKIP
        >>> hand_off = experiment.to_lightning(run, net)  # doctest: +SKIP
        >>> trainer = hand_off.fit(logger=False)  # doctest: +SKIP
    """
    run = run if isinstance(run, Run) else read_run(Path(run))
    _check_run(run)
    _check_optimizer(run.optimizer, optimizer)
    _check_model(model, run.precision)
    made = make_data(run)
    parts = assemble(run, made)
    chosen = optimizer
    if optimizer == "auto":
        chosen = "torch" if isinstance(run.optimizer, _NATIVE) else "optax"
    module = _module_class()(run, model, parts.clock, chosen)
    batch_size = run.training.batch_size
    # As the trainer splits the run's seed, and a loop the trainer's key.
    _, key = jax.random.split(jax.random.key(run.seed))
    order_key, _ = jax.random.split(key)

    def windows(trajectories: Any, stride: int) -> Any:
        return data.as_items(
            trajectories,
            lambda t: window_steps(parts.configuration, t.time),
            stride=stride,
        )

    train = windows(made.split.train, run.training.window_stride)
    validation = windows(made.split.validation, 1)
    shuffled = data.ShuffledOrder(len(train), batch_size, order_key)
    total = parts.clock.total
    return HandOff(
        module,
        Batches(train, lambda i, n: shuffled.indices(i, n), total),
        Batches(
            validation,
            functools.partial(_in_turn, len(validation), batch_size),
            math.ceil(len(validation) / batch_size),
        ),
        total,
        made.scale,
    )


class Batches:
    """Batches of windows as tensors `(B, L, ...)`, one for each number.

    Iterating begins at the first, however far an earlier one came (Lightning's sanity
    check leaves after two); once, it goes on where `load_state_dict` says, as Lightning
    does when it resumes.
    """

    def __init__(self, windows: Any, indices: Any, count: int) -> None:
        self.windows = windows
        self._indices = indices
        self._count = count
        self._start = self._next = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        torch = load("torch", "lightning")
        begin, self._start = self._start, 0
        for start in range(begin, self._count, _CHUNK):
            size = min(_CHUNK, self._count - start)
            for i, indices in enumerate(self._indices(start, size), start + 1):
                state = self.windows[np.asarray(indices)].state
                self._next = i
                yield torch.from_numpy(np.array(state))
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there.

        Args:
            state: What `state_dict` gave.
        """
        self._start = self._next = state["next"]


def _in_turn(total: int, size: int, start: int, count: int) -> Iterator[Any]:
    """Indices of all windows once, in portions, the last of them shorter."""
    for i in range(start, start + count):
        yield np.arange(i * size, min((i + 1) * size, total))


@functools.cache
def _module_class() -> type:
    lightning = load("lightning.pytorch", "lightning")

    class TorchRun(lightning.LightningModule):
        """A torch network with the loss and the optimizer of a run."""

        def __init__(self, run: Run, model: Any, clock: Clock, chosen: str) -> None:
            super().__init__()
            self.model = model
            self.run, self.clock, self.chosen = run, clock, chosen

        def forward(self, u: Any) -> Any:
            return self.model(u)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validation", self.loss(batch), batch_size=len(batch))

        def loss(self, batch: Any) -> Any:
            """Of a batch of windows, as the run's configuration has it."""
            spec = self.run.configuration
            steps = spec.num_rollout_steps
            every = spec.cut_bptt_every if spec.cut_bptt else None
            weights = spec.time_level_weights or (1.0,) * steps
            return rollout_loss(
                self.model, batch, TORCH_LOSSES[spec.loss], weights, every
            )

        def configure_optimizers(self) -> Any:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            spec = self.run.optimizer
            if self.chosen == "optax":
                return optax_for_torch(parameters, spec.build(self.clock))
            return _torch_optimizer(spec, parameters, self.clock)

        def configure_gradient_clipping(
            self, optimizer: Any, *args: Any, **kwargs: Any
        ) -> None:
            if self.chosen == "torch":
                _clip(self.run.optimizer, self.model.parameters())
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    return TorchRun


def _torch_optimizer(spec: Any, parameters: list[Any], clock: Clock) -> Any:
    """torch's counterpart, and its learning rate over time."""
    optim = load("torch", "lightning").optim
    rate = spec.learning_rate
    scheduled = isinstance(rate, AbstractSpec)
    # LambdaLR multiplies: of 1 that is the schedule itself.
    options: dict[str, Any] = {"lr": 1.0 if scheduled else rate}
    if isinstance(spec, AbstractAdam):
        options |= {"betas": (spec.b1, spec.b2), "eps": spec.eps}
    if isinstance(spec, SGD):
        momentum = spec.momentum or 0.0
        nesterov = spec.nesterov and momentum > 0
        optimizer = optim.SGD(
            parameters, momentum=momentum, nesterov=nesterov, **options
        )
    elif isinstance(spec, AdamW):
        optimizer = optim.AdamW(_decayed(spec, parameters), **options)
    else:
        optimizer = optim.Adam(parameters, **options)
    if not scheduled:
        return optimizer
    # Compiled, as in our step: rounded otherwise, a rate differs in its last digit.
    schedule = jax.jit(rate.build(clock))
    scheduler = optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: float(schedule(jnp.int32(n)))
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


def _decayed(spec: AdamW, parameters: list[Any]) -> list[dict[str, Any]]:
    """Groups with and without decay of weights."""
    every = spec.decayed == "all"
    groups = {True: [], False: []}
    for parameter in parameters:
        groups[every or parameter.ndim >= 2].append(parameter)
    return [
        {"params": group, "weight_decay": spec.weight_decay if decays else 0.0}
        for decays, group in groups.items()
        if group
    ]


def _clip(spec: Any, parameters: Any) -> None:
    """As optax clips: torch's own clipping by norm adds 1e-6 to it."""
    torch = load("torch", "lightning")
    grads = [p.grad for p in parameters if p.grad is not None]
    if spec.clip_value is not None:
        for grad in grads:
            grad.clamp_(-spec.clip_value, spec.clip_value)
    if spec.clip_norm is not None and grads:
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        # The quotient of two numbers of which neither can be 0.
        scale = spec.clip_norm / norm.clamp(min=spec.clip_norm)
        for grad in grads:
            grad.mul_(scale)


def _check_run(run: Run) -> None:
    spec, training = run.configuration, run.training
    if not isinstance(spec, Supervised):
        raise ValueError(
            f"Expected the configuration `supervised` for torch, got `{spec.kind}`. Change "
            "it: others compute with steppers or noise of JAX."
        )
    if isinstance(spec.adjoint, KStep):
        raise ValueError(
            "Expected an adjoint with the whole gradient for torch, got `k_step`. Cut it "
            "by cut_bptt and cut_bptt_every, or leave `adjoint` out."
        )
    instead = {
        "compute_dtype": "lightning.Trainer(precision='bf16-mixed')",
        "ema_decay": "lightning's callback EMAWeightAveraging",
    }
    for name, remedy in instead.items():
        if getattr(training, name) is not None:
            raise ValueError(
                f"Expected a run without training.{name} for torch, got "
                f"{getattr(training, name)}. Remove it, and pass {remedy}."
            )
    if run.early_stopping is not None:
        raise ValueError(
            "Expected a run without early_stopping for torch, got one. Remove it, and pass "
            "lightning's callback EarlyStopping('validation')."
        )


def _check_optimizer(spec: Any, chosen: str) -> None:
    native = [cls.model_fields["kind"].default for cls in _NATIVE]
    if chosen not in ("auto", "torch", "optax"):
        raise ValueError(
            f"Expected `optimizer` to be 'auto', 'torch' or 'optax', got {chosen!r}. Pass "
            "one of these."
        )
    if spec.kind == "lbfgs":
        raise ValueError(
            "Expected an optimizer that needs gradients alone for torch, got `lbfgs`, "
            f"which evaluates the loss as it searches. Choose another, such as {native}."
        )
    if chosen == "torch" and not isinstance(spec, _NATIVE):
        raise ValueError(
            f"Expected an optimizer of which torch.optim has the same, {native}, got "
            f"{spec.kind!r}. Choose one of these, or pass optimizer='optax'."
        )


def _check_model(model: Any, precision: str) -> None:
    torch = load("torch", "lightning")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"Expected a torch.nn.Module, got {type(model).__name__}. Pass the network; "
            "those of Flax and Keras train in tx.trainer (tx.framework)."
        )
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if found != {precision}:
        raise ValueError(
            f"Expected parameters of {precision}, the run's precision, got "
            f"{sorted(found) or 'none'}. Cast the network with .to(torch.{precision}), or "
            "change `precision`."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "Expected a torch module with parameters to train, got "
            f"{type(model).__name__}, of which all are frozen. Call "
            "requires_grad_(True) on some."
        )
