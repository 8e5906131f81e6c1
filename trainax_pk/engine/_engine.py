"""Runs many updates with one host round trip per chunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk.engine._choice import Choice, choose
from trainax_pk.engine._feed import AbstractFeed
from trainax_pk.engine._inspect import inspect_work
from trainax_pk.engine._lift import lift
from trainax_pk.engine._members import (
    TINY,
    check_members,
    decide_members,
    finite_members,
    join_groups,
    num_groups,
    only_norms_overflow,
    place_members,
    run_side_by_side,
    split_groups,
    split_members,
    stack_members,
)
from trainax_pk.engine._program import Programs, Step
from trainax_pk.engine._rewrite import make_rewrite
from trainax_pk.step import TrainState


class Engine:
    """Many updates of a train step on a feed of batches.

    Two families of programs compute the same and differ in the last bits: one jitted
    update per dispatch ("loop"), and a compiled loop over many ("scan"). The engine
    decides once which is faster here, by rule where one is certain and by measurement
    elsewhere, says what it chose in `choice`, and keeps to it.

    Mapped over with `jax.vmap` (an ensemble), every chunk is handed all members at once
    and decides likewise between members vmapped and a program for each member. On a CPU
    programs run side by side, as many at a time as there are cores.

    Attributes:
        choice: The family, or None before the first chunk.
        members: Whether an ensemble's members run vmapped, and why; None for one model.
        vmapped: Whether members are to run vmapped; None to leave it to the engine.

    Raises:
        ValueError: A `program` that is not known.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> sgd = optax.sgd(0.1)
        >>> windows = tx.data.Windows(jnp.ones((4, 5, 2)), 1)
        >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> state = tx.TrainState.create(model, sgd, key=jax.random.key(1))
        >>> engine = tx.engine.Engine(
        ...     tx.make_train_step(tx.configuration.Supervised(), sgd),
        ...     tx.engine.make_feed(windows), num_updates=10, program="scan",
        ... )
        >>> order = tx.data.ShuffledOrder(len(windows), 8, 0)
        >>> state, records = engine.run(state, order, 0, 10, 10)
        >>> int(state.step), records["loss"].shape
        (10, (10,))
    """

    def __init__(
        self,
        step: Step,
        feed: AbstractFeed,
        *,
        num_updates: int,
        program: str = "auto",
        raises: bool = False,
        guarded: Step | None = None,
        lifts: bool = False,
        split: jax.sharding.NamedSharding | None = None,
        settle: Callable[[Any], Any] | None = None,
        measures: bool = True,
    ) -> None:
        """Compiles nothing.

        Args:
            step: `(state, batch) -> (state, info)`.
            feed: Where batches come from.
            num_updates: Number of updates that lie ahead.
            program: "loop", "scan", or "auto".
            raises: Whether training ends when a member is not finite.
            guarded: What runs in place of `step` where nobody can look at records and
                parameters before the next chunk: inside `jax.jit`; and once more in
                place of a chunk after which members of an ensemble are not finite.
            lifts: Whether the step holds arrays of a transformation around the run.
            split: How the members of an ensemble are split over devices, if they are.
            settle: What a program does to the state and records that it returns.
            measures: Whether to decide by the clock, which other processes do not see.
        """
        if program not in ("auto", "loop", "scan"):
            raise ValueError(
                f"Expected `program` to be 'auto', 'loop' or 'scan', got {program!r}. "
                "Choose one of them."
            )
        self._feed = feed
        self._num_updates = num_updates
        self._program = program
        self._raises = raises
        self._rewrite = make_rewrite(jax.default_backend(), num_updates)
        self._steps = (step, guarded or step)
        self._lifts = lifts
        self._split = split
        self._measures = measures
        self._settle = settle
        self._programs = Programs(step, feed, self._rewrite, settle)
        self._in_jit = self._programs
        if self._steps[1] is not step:
            self._in_jit = Programs(guarded, feed, self._rewrite, settle)
        self._choices: dict[Any, Choice] = {}
        self._decisions: dict[Any, tuple[bool, str]] = {}
        self._lifted: dict[Any, Any] = {}
        self.choice: Choice | None = None
        self.members: tuple[bool, str] | None = None
        self.vmapped: bool | None = None

    @property
    def num_traces(self) -> int:
        """How often the train step was traced by the programs."""
        return self._programs.num_traces

    def describe(self) -> str:
        """What runs, and why."""
        if self.members is not None and self.members[0]:
            return f"members vmapped: {self.members[1]}"
        family = "scan: traced inside a transformation"
        if self.choice is not None:
            family = f"{self.choice.family}: {self.choice.reason}"
        if self.members is not None:
            return f"{family}; members apart: {self.members[1]}"
        return family

    def run(
        self, state: TrainState, order: Any, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        """Updates `start … start + count - 1`.

        Args:
            state: State before update `start`.
            order: Order of the batches.
            start: Number of the first update.
            count: How many.
            size: Longest chunk of the run, which programs are compiled for.

        Returns:
            The new state, and records of loss and gradient norm, each `(count,)`.
        """
        if self._lifts:
            self._lift(state, order, start)
        arrays = self._feed.load(order, start, count, size)
        self.members = None
        if _is_traced((state, arrays)):
            state, records = self._run_traced(state, arrays, start, count, size)
            return state, jax.tree.map(lambda x: x[:count], records)
        state, records = self._run_chunks(state, arrays, start, count, size)
        if count < size:
            # Cut on the host: on the device every new length is compiled anew, and so it
            # is by jnp.asarray.
            records = jax.tree.map(
                lambda x: jax.device_put(np.asarray(x)[:count]), records
            )
        return state, records

    def batch(self, order: Any, start: int) -> PyTree[Array]:
        """Batch of update `start`."""
        batch = self._programs.batch(self._feed.load(order, start, 1, 1), start, 0)
        return batch[1] if self._lifted else batch

    def _lift(self, state: TrainState, order: Any, start: int) -> None:
        """Programs that take what the step has captured as operands."""
        kind = (jax.tree.structure(state), _shapes(state))
        if kind not in self._lifted:
            feed = self._feed.feed if self._lifted else self._feed
            lifted = [lift(s, feed, state, order, start) for s in self._steps]
            programs = [Programs(s, f, self._rewrite, self._settle) for s, f in lifted]
            self._lifted[kind] = (lifted[0][1], *programs)
        self._feed, self._programs, self._in_jit = self._lifted[kind]

    def _run_chunks(
        self, state: TrainState, arrays: PyTree, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        run = getattr(self._programs, self._family(state, arrays, start, size))
        return run(state, arrays, start, count, size)

    def _family(self, state: TrainState, arrays: PyTree, start: int, size: int) -> str:
        kind = (jax.tree.structure(state), _shapes(state), size == 1)
        if kind not in self._choices:
            self._choices[kind] = self._choose(state, arrays, start, size)
        self.choice = self._choices[kind]
        return self.choice.family

    def _choose(
        self, state: TrainState, arrays: PyTree, start: int, size: int
    ) -> Choice:
        if self._program != "auto":
            return Choice(self._program, "fixed by the user", {})
        programs = self._programs

        def probe(family: str) -> Any:
            run = getattr(programs, family)
            return lambda count: run(state, arrays, start, min(count, size), size)

        return choose(
            {family: probe(family) for family in ("loop", "scan")},
            num_updates=self._num_updates,
            certain=self._certain(state, arrays, size) or self._unmeasured(),
        )

    def _certain(self, state: TrainState, arrays: PyTree, size: int) -> Choice | None:
        if size == 1:
            return Choice("loop", "every update is followed by a host callback", {})
        if jax.default_backend() != "cpu":
            return None
        work = inspect_work(self._programs.jaxpr(state, arrays, size))
        if not (work.convolutions or work.ffts):
            reason = "no convolution or FFT, which alone run slower in a loop on a CPU"
            return Choice("scan", reason, {})
        if work.multiply_adds <= TINY and not work.ffts:
            return Choice("scan", "an update is dispatch, not arithmetic", {})
        return None

    def _unmeasured(self) -> Choice | None:
        if self._measures:
            return None
        family = "loop" if jax.default_backend() == "cpu" else "scan"
        return Choice(family, "not measured: clocks of processes differ", {})

    def _run_traced(
        self, state: TrainState, arrays: PyTree, start: int, count: int, size: int
    ) -> tuple[TrainState, PyTree[Array]]:
        # Under vmap the rule sees the members' concrete arrays and is free to run any
        # program on them; under jit (or without vmap) the scan is traced as it is.
        @jax.custom_batching.custom_vmap
        def chunk(state: TrainState, arrays: PyTree) -> Any:
            return self._in_jit.scan(state, arrays, start, count, size)

        @chunk.def_vmap
        def _(axis_size: int, batched: Any, state: Any, arrays: Any) -> Any:
            state = jax.tree.map(
                lambda x, b: x if b else jnp.broadcast_to(x, (axis_size, *x.shape)),
                state,
                batched[0],
            )
            axes = jax.tree.map(lambda b: 0 if b else None, batched[1])
            run = self._ensemble(axes, axis_size, start, count, size)
            out = run(state, arrays)
            if not _is_traced(out):
                out = self._checked(out, axes, state, arrays, start, count, size)
            return out, jax.tree.map(lambda _: True, out)

        return chunk(state, arrays)

    def _ensemble(
        self, axes: PyTree, axis_size: int, start: int, count: int, size: int
    ) -> Any:
        programs = self._programs
        # Updates that are dispatched one by one stay so.
        family = "loop" if self._program == "loop" or size == 1 else "scan"
        groups = 1
        if family == "scan" and jax.default_backend() == "cpu" and not self._split:
            groups = num_groups(axis_size)

        def together(state: TrainState, arrays: PyTree, count: int) -> Any:
            if _is_traced((state, arrays)):
                return self._in_jit.members(
                    family, axes, state, arrays, start, count, size
                )
            if groups == 1:
                return programs.members(family, axes, state, arrays, start, count, size)
            parts = zip(
                split_groups(state, _all(state), groups),
                split_groups(arrays, axes, groups),
                strict=True,
            )
            calls = [(*part, np.int32(start), np.int32(count)) for part in parts]
            program = programs.executable(*calls[0][:2], size, axes)
            return join_groups(run_side_by_side(program, calls))

        def apart(state: TrainState, arrays: PyTree, count: int) -> Any:
            states = split_members(state, _all(state), axis_size)
            members = list(
                zip(states, split_members(arrays, axes, axis_size), strict=True)
            )
            choice = self._family(*members[0], start, size)
            if choice == "scan" and jax.default_backend() == "cpu":
                program = programs.executable(*members[0], size)
                results = run_side_by_side(
                    program, [(*m, np.int32(start), np.int32(count)) for m in members]
                )
            else:
                run = getattr(programs, choice)
                results = [run(*m, start, count, size) for m in members]
            return stack_members(results)

        def run(state: TrainState, arrays: PyTree) -> Any:
            if _is_traced((state, arrays)):
                return together(state, arrays, count)
            if self._split is not None:
                state = place_members(state, _all(state), self._split)
                arrays = place_members(arrays, axes, self._split)
            kind = (jax.tree.structure((state, axes)), _shapes(state), size)
            fixed = self._fixed_members()
            if fixed is None and kind not in self._decisions:
                self._decisions[kind] = self._decide(
                    together, apart, state, arrays, axes, size
                )
            self.members = fixed or self._decisions[kind]
            form = together if self.members[0] else apart
            return form(state, arrays, count)

        return run

    def _checked(self, out: Any, axes: PyTree, state: TrainState, *rest: Any) -> Any:
        """What a chunk made of members, or where some broke unseen, the guarded one."""
        if not self._raises and self._steps[0] is self._steps[1]:
            return out
        kept = finite_members(out[0].params, state.params)
        family = "loop" if rest[-1] == 1 else "scan"
        if self._raises:
            records, chunk = out[1], rest[1:3]
            differs = self._steps[0] is not self._steps[1]
            if differs and only_norms_overflow(records, *chunk[1:]):
                # Of large but finite gradients: that is no failure. The guarded step
                # takes norms that overflow no earlier than they have to.
                records = self._in_jit.members(family, axes, state, *rest)[1]
            check_members(records, kept, *chunk)
        elif not kept.all():
            return self._in_jit.members(family, axes, state, *rest)
        return out

    def _fixed_members(self) -> tuple[bool, str] | None:
        """Whether members run vmapped, where nothing is left to decide."""
        if self._split is not None:
            return True, "split over the devices of a mesh"
        return None if self.vmapped is None else (self.vmapped, "fixed by the user")

    def _decide(
        self,
        together: Any,
        apart: Any,
        state: TrainState,
        arrays: PyTree,
        axes: PyTree,
        size: int,
    ) -> tuple[bool, str]:
        one = [
            split_members(t, a, 1)[0] for t, a in ((state, _all(state)), (arrays, axes))
        ]
        return decide_members(
            inspect_work(self._programs.jaxpr(*one, size)),
            lambda n: together(state, arrays, n),
            lambda n: apart(state, arrays, n),
            num_updates=self._num_updates,
            longest=size,
            raises=self._raises,
        )


def _all(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: 0, tree)


def _shapes(tree: PyTree) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(tree))


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
