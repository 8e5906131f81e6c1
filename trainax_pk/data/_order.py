"""Which window is trained on at which step: pure functions of (key, step)."""

import abc
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray, UInt32

from trainax_pk._tree import check_count
from trainax_pk.data._feistel import permute

_MAX_ITEMS = 2**31 - 1


class AbstractOrder(eqx.Module):
    """An endless sequence of batches of indices, addressed by step.

    Global position p = step · batch_size + j belongs to epoch p // num_items. A batch
    may straddle two epochs: every batch has one shape and nothing is dropped.

    To add one: a final class with the two static fields below and `indices`, which must
    not depend on how the steps are cut into calls.
    """

    num_items: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def indices(self, start_step: int | Int[Array, ""], n: int) -> Int32[Array, "n B"]:
        """Indices of the batches of steps start_step, ..., start_step + n - 1."""


class ShuffledOrder(AbstractOrder):
    """Every item once per epoch, in an order that the key and the epoch determine.

    index(p) = π_(key, p // N)(p mod N) for the global position p. No state and no
    table: memory is that of the indices asked for, and a run can be resumed at any
    step. Independent of chunking, of JAX's random number implementation, and of the
    x64 flag.

    A PyTree with the key as its leaf, to be vmapped over seeds.

    Attributes:
        num_items: N, 1 <= N < 2³¹.
        batch_size: B, 1 <= B <= N.
        key: Typed or legacy PRNG key.

    Raises:
        ValueError: A count below 1 or too large, a batch larger than the data, a key
            that is not one key.

    Example:
        >>> from trainax_pk.data import ShuffledOrder
        >>> order = ShuffledOrder(5, 2, 0)
        >>> sorted(order.indices(0, 5).reshape(2, 5)[0].tolist())  # first epoch
        [0, 1, 2, 3, 4]
        >>> bool((order.indices(0, 5)[3:] == order.indices(3, 2)).all())
        True
    """

    num_items: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(
        self, num_items: int, batch_size: int, seed_or_key: int | PRNGKeyArray
    ) -> None:
        _check_sizes(num_items, batch_size)
        self.num_items = num_items
        self.batch_size = batch_size
        self.key = _as_key(seed_or_key)

    def indices(self, start_step: int | Int[Array, ""], n: int) -> Int32[Array, "n B"]:
        """Indices of n consecutive batches.

        Args:
            start_step: First step, 0 <= start_step, start_step + n <= 2³²; may be
                traced.
            n: Number of steps, >= 1, static.

        Returns:
            `(n, batch_size)`, int32, in [0, num_items).

        Raises:
            ValueError: A `start_step` out of range, an `n` below 1.
        """
        epoch, position = _positions(self.num_items, self.batch_size, start_step, n)
        words = _key_words(self.key)
        indices = permute(position, epoch, words, self.num_items).astype(jnp.int32)
        # Fused into whatever reads a window, this arithmetic would be done again for
        # every entry: XLA then compiles some programs for minutes.
        return jax.lax.optimization_barrier(indices)


class SequentialOrder(AbstractOrder):
    """Items in the order of storage, over and over: index(p) = p mod N.

    Attributes:
        num_items: N, 1 <= N < 2³¹.
        batch_size: B, 1 <= B <= N.

    Raises:
        ValueError: A count below 1 or too large, a batch larger than the data.

    Example:
        >>> from trainax_pk.data import SequentialOrder
        >>> SequentialOrder(3, 2).indices(0, 2).tolist()
        [[0, 1], [2, 0]]
    """

    num_items: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        _check_sizes(self.num_items, self.batch_size)

    def indices(self, start_step: int | Int[Array, ""], n: int) -> Int32[Array, "n B"]:
        """As `ShuffledOrder.indices`."""
        _, position = _positions(self.num_items, self.batch_size, start_step, n)
        return position.astype(jnp.int32)


def _positions(
    num_items: int, batch_size: int, start_step: int | Int[Array, ""], n: int
) -> tuple[UInt32[Array, "n B"], UInt32[Array, "n B"]]:
    """Epoch and position in the epoch of the items of n batches."""
    check_count("n", n)
    if isinstance(start_step, (int, np.integer)):
        start_step = np.uint32(_check_step(int(start_step), n))
    return _positions_from(jnp.asarray(start_step), num_items, batch_size, n)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _positions_from(
    start_step: Int[Array, ""], num_items: int, batch_size: int, n: int
) -> tuple[UInt32[Array, "n B"], UInt32[Array, "n B"]]:
    # step · B passes 32 bits in long runs. So step is read as four digits of base 256:
    # quotient and remainder of digit · 256^k · B by N are tabulated exactly, and the
    # four remainders are added modulo N. Sums stay below 2N < 2³².
    step = start_step.astype(jnp.uint32) + jnp.arange(n, dtype=jnp.uint32)
    epoch = jnp.zeros((n,), jnp.uint32)
    position = jnp.zeros((n,), jnp.uint32)
    for k in range(4):
        steps = np.arange(256, dtype=np.uint64) << np.uint64(8 * k)
        quotient, remainder = np.divmod(steps * np.uint64(batch_size), num_items)
        digit = (step >> np.uint32(8 * k)) & np.uint32(255)
        epoch = epoch + jnp.asarray(quotient.astype(np.uint32))[digit]
        position = position + jnp.asarray(remainder.astype(np.uint32))[digit]
        epoch, position = _carry(epoch, position, num_items)
    within = jnp.arange(batch_size, dtype=jnp.uint32)
    return _carry(epoch[:, None], position[:, None] + within[None], num_items)


def _check_step(start_step: int, n: int) -> int:
    check_count("start_step", start_step, minimum=0)
    if start_step + n > 2**32:
        raise ValueError(
            f"Expected start_step + n <= 2**32, got {start_step} + {n}. Steps are "
            "counted in 32 bits: begin again with another key."
        )
    return start_step


def _carry(epoch: Array, position: Array, num_items: int) -> tuple[Array, Array]:
    past = position >= num_items
    position = jnp.where(past, position - jnp.uint32(num_items), position)
    return epoch + past.astype(jnp.uint32), position


def _key_words(key: PRNGKeyArray) -> UInt32[Array, " W"]:
    # The key's own words rather than numbers drawn from it: the order then survives a
    # change of random number implementation between a run and its resumption.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if typed else key


def _as_key(seed_or_key: Any) -> PRNGKeyArray:
    if isinstance(seed_or_key, int) and not isinstance(seed_or_key, bool):
        return jax.random.key(check_count("seed_or_key", seed_or_key, minimum=0))
    dtype = getattr(seed_or_key, "dtype", None)
    shape = getattr(seed_or_key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    legacy = dtype == jnp.uint32
    if not (typed and shape == ()) and not (legacy and shape in ((2,), (4,))):
        got = repr(seed_or_key) if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(
            f"Expected `seed_or_key` to be a seed >= 0 or one PRNG key, got {got}. "
            "Pass an int or jax.random.key(seed); for many seeds, build the order "
            "inside eqx.filter_vmap over the keys."
        )
    return jnp.asarray(seed_or_key)


def _check_sizes(num_items: int, batch_size: int) -> None:
    check_count("num_items", num_items)
    check_count("batch_size", batch_size)
    if num_items > _MAX_ITEMS:
        raise ValueError(
            f"Expected at most {_MAX_ITEMS} items, got {num_items}. Indices are int32: "
            "shorten the data, or use a larger `stride` of windows."
        )
    if batch_size > num_items:
        raise ValueError(
            f"Expected batch_size <= num_items, got batch_size={batch_size} and "
            f"num_items={num_items}. Pass a batch_size of at most {num_items}."
        )
