"""The updates of one call of a trainer: in compiled chunks, or one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from trainax_pk.compat._feed import StackerFeed
from trainax_pk.compat._mixer import EpochOrder, PermutationMixer
from trainax_pk.compat._schedule import absent, interval, is_due
from trainax_pk.configuration import Aux
from trainax_pk.engine import ChunkClock, Engine, chunk_size, join_chunks
from trainax_pk.step import Info, TrainState


class EagerRun:
    """One update after another, its windows fetched from Python."""

    def __init__(self, trainer: Any, mixer: PermutationMixer) -> None:
        self.trainer = trainer
        self.mixer = mixer

    def __call__(self, stepper: Any, opt_state: Any, bar: Any) -> tuple[Any, Any, list]:
        """`(stepper, losses (num_minibatches,), callback's results)`."""
        trainer, losses, aux = self.trainer, [], []
        if opt_state is None:
            params = eqx.filter(stepper, eqx.is_inexact_array)
            opt_state = trainer.optimizer.init(params)
        update = eqx.filter_jit(trainer.step_fn)
        for i in range(self.mixer.num_minibatches):
            indices, place = self.mixer(i, return_info=True)
            data = trainer.trajectory_sub_stacker(indices)
            if trainer.callback_fn is not None:
                aux.append(trainer.callback_fn(i, stepper, data))
            stepper, opt_state, loss = update(stepper, opt_state, data)
            losses.append(loss)
            _report(bar, 1, place)
        return stepper, jnp.stack(losses) if losses else jnp.zeros(0), aux


class CompiledRun:
    """Chunks of updates between callbacks and epochs' remainders."""

    def __init__(self, trainer: Any, mixer: PermutationMixer) -> None:
        self.callback = trainer.callback_fn
        self.optimizer = trainer.optimizer
        self.total = mixer.num_minibatches
        self.per_epoch = mixer.num_minibatches_per_epoch
        self.rest = mixer.num_total_samples % mixer.batch_size
        self.full_order = EpochOrder(
            mixer.permutations, mixer.batch_size, mixer.batch_size, self.per_epoch
        )
        self.rest_order = EpochOrder(
            mixer.permutations, self.rest, mixer.batch_size, self.per_epoch
        )
        self.loss_dtype: Any = jnp.result_type(float)
        self.feed = StackerFeed(trainer, None)
        self.clock = ChunkClock()
        every = interval(self.callback)
        self.size = chunk_size(min(every, self.total), 4 * mixer.batch_size)

    def __call__(self, stepper: Any, opt_state: Any, bar: Any) -> tuple[Any, Any, list]:
        """`(stepper, losses (num_minibatches,), callback's results)`."""
        if self.total == 0:
            return stepper, jnp.zeros(0), []
        # Nothing is drawn with the key: the order of the batches has its own.
        state = TrainState.create(stepper, self.optimizer, key=jax.random.key(0))
        if opt_state is not None:
            state = dataclasses.replace(state, opt_state=_strong(opt_state))
        step, self.feed = self._lifted(state)
        engine = Engine(step, self.feed, num_updates=self.total)
        losses, aux, done = [jnp.zeros(0)], [], 0
        while done < self.total:
            is_rest = self.rest > 0 and (done + 1) % self.per_epoch == 0
            order = self.rest_order if is_rest else self.full_order
            count = 1 if is_rest else self._count(done)
            if self.callback is not None:
                aux.extend(self._call_back(engine, state, order, done, count))
            self.clock.begin()
            size = 1 if is_rest else self.size
            state, records = engine.run(state, order, done, count, size)
            self.clock.end(count)
            losses.append(records["loss"])
            done += count
            _report(bar, count, divmod(done - 1, self.per_epoch))
        return state.model, join_chunks(losses).astype(self.loss_dtype), aux

    def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        trainer, data = batch
        model, opt_state, loss = self.feed.trainer_with(trainer).step_fn(
            state.model, state.opt_state, data
        )
        self.loss_dtype = loss.dtype
        params, buffers = state.split(model)
        state = dataclasses.replace(
            state, params=params, buffers=buffers, opt_state=opt_state
        )
        return state, Info(loss, Aux(), jnp.zeros(()), None, jnp.zeros((), bool))

    def _lifted(self, state: TrainState) -> tuple[Callable[..., Any], StackerFeed]:
        """The step, and a feed of all that it reads, captured tracers included.

        An optimizer is functions; its learning rate may be a tracer of a vmap around the
        trainer. The engine runs chunks apart from that vmap: they take operands alone.
        """
        forms = {}
        for order in (self.full_order, self.rest_order):
            if order.batch_size == 0:
                continue
            arrays = self.feed.load(order, 0, 1, 1)
            windows = jax.eval_shape(self.feed.single, arrays, 0, 0)[2]
            batch = (arrays[2], windows)
            form = eqx.filter_closure_convert(self._step, state, batch)
            forms[order.batch_size] = form
        captured, static = eqx.partition(forms, eqx.is_array)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Info]:
            size = jax.tree.leaves(batch[2])[0].shape[0]
            return eqx.combine(batch[0][size], static[size])(state, batch[1:])

        return step, dataclasses.replace(self.feed, captured=captured)

    def _count(self, done: int) -> int:
        """Updates up to the next callback, the epoch's remainder or the end."""
        count = min(self.total - done, self.clock.limit(self.size))
        if self.rest:
            count = min(count, self.per_epoch - 1 - done % self.per_epoch)
        due = (n for n in range(1, count) if is_due(self.callback, done + n))
        return next(due, count)

    def _call_back(
        self, engine: Engine, state: Any, order: EpochOrder, done: int, count: int
    ) -> list[dict[str, Any]]:
        """Results of `count` updates, of which at most the first one is due."""
        results = []
        first = done
        if is_due(self.callback, done):
            *_, batch = engine.batch(order, done)
            results.append(self.callback(done, state.model, batch))
            first += 1
        return results + [absent(self.callback, i) for i in range(first, done + count)]


def _strong(opt_state: PyTree[Any]) -> PyTree[Array]:
    """Arrays of definite type: a loop carries neither Python numbers nor weak types."""

    def strong(x: Any) -> Array:
        x = jnp.asarray(x)
        return jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(strong, opt_state)


def _report(bar: Any, count: int, place: tuple[int, int]) -> None:
    epoch, batch = place
    bar.update(count)
    bar.set_description(f"E: {epoch:05d}, B: {batch:05d}", refresh=False)
