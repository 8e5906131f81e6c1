"""Training data that are made: a forward model and a prior, sample by sample."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._tree import check_flag, describe
from trainax_pk.data._forward import Parametric, split_observers
from trainax_pk.data._hash import hash_content, precision_flags
from trainax_pk.data._hash_code import version_of
from trainax_pk.data._simulation_keys import stream_word
from trainax_pk.data._simulation_plan import (
    as_rows,
    check_failures,
    check_num_samples,
    check_unmasked,
    make_recipe,
    plan_block,
    plan_chunk,
    row_bytes,
)
from trainax_pk.data._simulation_program import check_fit
from trainax_pk.data._simulation_run import Runner, Simulated
from trainax_pk.data._simulation_windows import SimulatedWindows
from trainax_pk.data._trajectories import Trajectories

OnFailure = Literal["raise", "mask", "keep", "resample"]


class SimulationDataset:
    """Pairs (params, output) of a forward model and a prior, made when they are read.

    Sample i is a pure function of (seed, split, i): of a key that no other seed, split
    or index has, of the prior and the forward model. So any sample or slice can be made
    alone, and is bitwise the one of the whole whatever the chunk size and the number of
    devices. All samples run vmapped in blocks of one width, compiled once; blocks go
    round the devices.

    `dataset[i]` is one pair; `dataset[i:j]` and `dataset[array]` are pairs with a
    leading axis, as NumPy arrays; iterating gives one pair after another. Making one
    sample costs as much as making `block_size` of them.

    Attributes:
        seed: Seed of the stream.
        split: "train", "val" or "test".
        block_size: Samples of one compiled block.
        chunk_size: Samples that are made at once when iterating.
        element_spec: Shapes and dtypes of one pair.
        on_the_fly: Whether batches are fresh simulations made in the training step.
        num_failed: Failed draws among all that this object has made.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> lorenz = tx.data.StepperModel(
        ...     tx.sample_data.make_lorenz_63_stepper(0.01), dt=0.01
        ... )
        >>> dataset = tx.data.SimulationDataset(
        ...     lorenz, tx.data.Normal(jnp.zeros(3), 5.0), 100, num_steps=20, stride=4
        ... )
        >>> params, output = dataset[:8]
        >>> params.shape, output.shape
        ((8, 3), (8, 6, 3))
        >>> bool((dataset[5][1] == output[5]).all())
        True
        >>> held_out = dataset.with_split("val")
    """

    def __init__(
        self,
        forward_model: Any,
        prior: Any,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        split: str = "train",
        num_steps: int | None = None,
        stride: int = 1,
        num_warmup_steps: int = 0,
        observation: Any = None,
        on_failure: OnFailure = "raise",
        divergence_limit: float | None = None,
        max_attempts: int = 8,
        on_the_fly: bool = False,
        memory_budget: int = 2**29,
        chunk_size: int | None = None,
        block_size: int | None = None,
        devices: Any = None,
    ) -> None:
        """Checks everything, shapes included; simulates nothing.

        Args:
            forward_model: Anything with `step(state, dt)` and `dt`, stepped from the
                state that the prior draws; a `Parametric` model; a callable
                `params -> output`; or a `Stochastic` simulator, which gets a key as
                well. May be a chain `model | operator`.
            prior: `sample(key) -> params`, one draw.
            num_samples: N >= 1; None with `on_the_fly`.
            seed: 0 <= seed < 2²⁹. No two seeds share a key.
            split: Which of three streams; none shares a key with another.
            num_steps: Steps T of a trajectory: outputs get a leading axis of
                T / stride + 1 times, the state after the warm-up first. None: one step
                of a forward model, or the value of a callable.
            stride: Steps between kept times; divides `num_steps`.
            num_warmup_steps: Steps before the first kept time.
            observation: Operator of one state, an `Observation` for noise.
            on_failure: What becomes of a sample whose state is not finite or exceeds
                `divergence_limit`. "raise": FloatingPointError with its indices.
                "mask": its output is NaN throughout. "keep": as it came. "resample":
                drawn again from the prior, at most `max_attempts` times, then raised.
                `num_failed` counts them in any case.
            divergence_limit: Largest magnitude of a healthy state, or None.
            max_attempts: Draws for one sample, with "resample".
            on_the_fly: An endless stream of fresh samples, to be trained on within the
                compiled step (`windows()`, or handed to a Trainer).
            memory_budget: Bytes that a chunk may take, its copies included.
            chunk_size: Samples of a chunk; None derives it from `memory_budget`.
            block_size: Samples of one compiled block; None for a power of two that
                depends on shapes alone. Part of the content: the last bits of a program
                depend on its width.
            devices: Devices to go round; None for all local ones.

        Raises:
            ValueError: A number out of range, an unknown option, a prior and a model
                that do not fit (with their shapes), a budget below one block.
        """
        self.on_the_fly = check_flag("on_the_fly", on_the_fly)
        self._num_samples = check_num_samples(num_samples, on_the_fly=on_the_fly)
        self._recipe = make_recipe(
            forward_model, prior, num_steps, stride, num_warmup_steps,
            observation, on_failure, divergence_limit, max_attempts,
        )  # fmt: skip
        self.on_failure = on_failure
        self.seed, self.split = seed, split
        self._word = stream_word(seed, split, fresh=on_the_fly)
        draw, self._drawn = check_fit(self._recipe)
        self.element_spec = (draw.params, draw.output)
        if not jax.tree.leaves(draw.output):
            raise ValueError(
                "Expected a forward model that returns arrays, got a PyTree without "
                "any. Return at least one array."
            )
        nbytes = row_bytes(self.element_spec)
        self.block_size = plan_block(block_size, nbytes, self._num_samples)
        self.chunk_size = plan_chunk(chunk_size, nbytes, memory_budget, self.block_size)
        self.num_failed = 0
        self._runner = Runner(
            self._recipe, self.block_size, devices or jax.local_devices()
        )

    @property
    def forward_model(self) -> Any:
        """The forward model with its observers."""
        return self._recipe.forward

    @property
    def prior(self) -> Any:
        """What is drawn from."""
        return self._recipe.prior

    @property
    def num_times(self) -> int | None:
        """Kept times of a trajectory, or None for single outputs."""
        if self._recipe.num_steps is None:
            return None
        return self._recipe.num_steps // self._recipe.stride + 1

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, indices: Any) -> tuple[PyTree[Any], PyTree[Any]]:
        """Pairs of an index, a slice or an integer array; IndexError outside."""
        simulated = self.simulate(indices)
        pair = simulated.params, simulated.output
        if isinstance(indices, (int, np.integer)):
            return jax.tree.map(lambda x: x[0], pair)
        return pair

    def __iter__(self) -> Iterator[tuple[PyTree[Any], PyTree[Any]]]:
        for params, output in self.chunks():
            for i in range(len(jax.tree.leaves(params)[0])):
                yield jax.tree.map(lambda x, i=i: x[i], (params, output))

    def chunks(self) -> Iterator[tuple[PyTree[Any], PyTree[Any]]]:
        """Pairs with a leading axis of `chunk_size`, the last one shorter."""
        for start in range(0, len(self), self.chunk_size):
            yield self[start : start + self.chunk_size]

    def simulate(self, indices: Any) -> Simulated:
        """Samples with what is known about them.

        Args:
            indices: As for indexing.

        Returns:
            Params and output with a leading axis, `failed` and `attempts`, `(n,)`.

        Raises:
            FloatingPointError: A failure that `on_failure` does not allow, or nothing
                but failures.
            IndexError: An index outside of the dataset.
        """
        rows = as_rows(indices, len(self))
        simulated = self._runner.run(self._word, rows)
        # Every draw but the last of a sample has failed, and the last if it says so.
        self.num_failed += int((simulated.attempts - 1 + simulated.failed).sum())
        check_failures(simulated, rows, self.on_failure, len(self))
        return simulated

    def with_split(self, split: str) -> "SimulationDataset":
        """The same dataset of another split; nothing is compiled again.

        Args:
            split: "train", "val" or "test".

        Returns:
            A dataset that shares no sample with this one.
        """
        other = copy.copy(self)
        other.split, other.num_failed = split, 0
        other._word = stream_word(self.seed, split, fresh=self.on_the_fly)
        return other

    def trajectories(self) -> Trajectories:
        """All samples as trajectories, to be trained on like any others.

        Parameters of a `Parametric` model become `sample`, for conditioned steppers.

        Returns:
            State `(num_samples, num_times, ...)`.

        Raises:
            ValueError: The dataset holds no trajectories, is endless, or has masked
                failures.
        """
        if self.num_times is None or self.on_the_fly:
            raise ValueError(
                "Expected a finite dataset of trajectories, got num_steps="
                f"{self._recipe.num_steps} and on_the_fly={self.on_the_fly}. Pass "
                "num_steps, or use windows()."
            )
        params, output = self.finite_rows()
        return Trajectories(output, sample=params if self.is_parametric else None)

    def finite_rows(self) -> tuple[PyTree[Any], PyTree[Any]]:
        """All pairs, to be trained on.

        Returns:
            Pairs with a leading axis.

        Raises:
            ValueError: Samples that failed and were masked with NaN.
        """
        simulated = self.simulate(slice(None))
        check_unmasked(self.on_failure, int(simulated.failed.sum()), len(self))
        return simulated.params, simulated.output

    @property
    def is_parametric(self) -> bool:
        """Whether the physics depend on the parameters."""
        return isinstance(split_observers(self._recipe.forward)[0], Parametric)

    def windows(
        self,
        num_rollout_steps: Callable[[SimulatedWindows], int] | None = None,
        *,
        stride: int = 1,
    ) -> SimulatedWindows:
        """What an engine's feed gathers from: batches made within the training step.

        Args:
            num_rollout_steps: `windows -> steps of a window` that is needed, which
                `num_steps / stride` of the dataset must equal; None for any.
            stride: As for `Windows`; 1, since every window is a simulation of its own.

        Returns:
            An object with the interface of `Windows`. Its windows are whole
            trajectories, or pairs (params, output) where there are none.

        Raises:
            ValueError: The dataset is not `on_the_fly`, or makes windows of another
                length.
        """
        if not self.on_the_fly:
            raise ValueError(
                "Expected a dataset with on_the_fly=True, got one of "
                f"{len(self)} stored samples. Pass on_the_fly=True, or train on "
                "`dataset.trajectories()`."
            )
        windows = SimulatedWindows(
            self._recipe, self._word, len(self), self.num_times, self.is_parametric
        )
        if stride != 1:
            raise ValueError(
                f"Expected window_stride=1 for simulations on the fly, got {stride}. "
                "Every window is a simulation of its own."
            )
        needed = None if num_rollout_steps is None else num_rollout_steps(windows)
        if needed is not None and self.num_times not in (None, needed + 1):
            raise ValueError(
                f"Expected simulations of {needed + 1} times, the window that is "
                f"trained on, got {self.num_times}. Pass num_steps={needed} (times the "
                "stride) to the SimulationDataset."
            )
        return windows

    def content_hash(self) -> str:
        """SHA-256 of all that changes numbers, as `hash_content` sees it.

        Forward model, prior, number of samples, steps, policy of failures, seed, split,
        width of a block, JAX's precision settings and versions. Not chunk size, memory
        budget or devices, which change nothing.
        """
        recipe = self._recipe
        return hash_content(
            "SimulationDataset",
            version_of("trainax_pk"),
            # Field by field: how the recipe is carried out is this package's version.
            {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)},
            self.on_failure,
            None if self.on_the_fly else len(self),
            int(self._word),
            self.block_size,
            precision_flags(),
        )

    def __repr__(self) -> str:
        params, output = map(describe, self.element_spec)
        size = "endless" if self.on_the_fly else str(len(self))
        return (
            f"SimulationDataset({size}, seed={self.seed}, split={self.split!r}, "
            f"params=({params}), output=({output}))"
        )
