"""Keyed permutations of {0, ..., N - 1} that are computed, not stored."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# 2³² divided by the golden ratio, odd: multiples spread well over 32 bits.
_GOLDEN = np.uint32(0x9E3779B9)


@functools.partial(jax.jit, static_argnums=3)
def permute(
    position: UInt32[Array, "..."],
    epoch: UInt32[Array, "..."],
    words: UInt32[Array, " W"],
    num_items: int,
) -> UInt32[Array, "..."]:
    """π_(words, epoch)(position): for each epoch a bijection of {0, ..., N - 1}.

    A position is written as h·a + l, in rows h of a columns l; the last row holds only
    the first r. Rounds add a keyed hash of one of the two to the other, l ← l + F(h)
    modulo the length of row h and h ← h + F(l) modulo the height of column l in turn.
    Each is a bijection of the ragged rectangle whatever F is, so no value ever falls
    outside and none has to be permuted again. Unbalanced Feistel network over
    Z_a x Z_b: Black & Rogaway 2002, doi:10.1007/3-540-45760-7_9.

    Good shuffling, no cryptography. Memory is O(1) in N; only 32-bit arithmetic.

    Args:
        position: Values < N.
        epoch: Which permutation, same shape as `position`.
        words: Key material, any number of words.
        num_items: N, 1 <= N < 2³¹.

    Returns:
        Values < N, same shape.
    """
    a, b = split_domain(num_items)
    r = num_items - (b - 1) * a
    # One hash of the epoch per element, the same for all rounds, so that a round costs
    # one hash: rounds differ by their own words.
    tweak = _mix(_mix(epoch * _GOLDEN + np.uint32(1)))
    h, low = jnp.divmod(position, jnp.uint32(a))
    for i, key in enumerate(_round_keys(words, num_rounds(num_items))):
        if i % 2 == 0:
            length = a if r == a else jnp.where(h == b - 1, np.uint32(r), np.uint32(a))
            low = _add_modulo(low, _mix(h ^ tweak ^ key), length)
        else:
            height = b if r == a else jnp.where(low < r, np.uint32(b), np.uint32(b - 1))
            h = _add_modulo(h, _mix(low ^ tweak ^ key), height)
    return h * jnp.uint32(a) + low


def split_domain(num_items: int) -> tuple[int, int]:
    """Row length a and number of rows b, nearly square: (b - 1)·a < N <= b·a.

    Two rows at least, since one row can only rotate; both below 2¹⁶.
    """
    a = max(1, math.isqrt(num_items - 1) + 1 if num_items > 3 else (num_items + 1) // 2)
    return a, -(-num_items // a)


def num_rounds(num_items: int) -> int:
    """More rounds for small domains, where a hash has few values to mix with.

    Chi-square tests of ordered pairs over 40,000 epochs see 10 rounds at N <= 17 and
    nothing at N >= 64; see none from 16 rounds on at any N.
    """
    return 24 if num_items < 64 else 10


def _round_keys(words: UInt32[Array, " W"], rounds: int) -> list[Array]:
    keys = jnp.asarray(np.arange(1, rounds + 1, dtype=np.uint32) * _GOLDEN)
    for i in range(words.shape[0]):
        keys = _mix(keys ^ words[i])
    return [keys[i] for i in range(rounds)]


def _add_modulo(x: Array, y: Array, modulus: int | Array) -> Array:
    # The upper half of the hash, scaled to [0, modulus): a product of 16 by 16 bits,
    # where a remainder by a constant costs three times as much. x < modulus < 2¹⁶.
    modulus = jnp.uint32(modulus)
    total = x + (((y >> np.uint32(16)) * modulus) >> np.uint32(16))
    return jnp.where(total >= modulus, total - modulus, total)


def _mix(x: Array) -> Array:
    """Bijection of 32-bit words that flips each output bit with odds of nearly 1/2.

    The constants are those of C. Wellons' search for low-bias hashes (public domain,
    github.com/skeeto/hash-prospector).
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
