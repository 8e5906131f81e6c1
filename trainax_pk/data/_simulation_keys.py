"""Keys of samples: one for each seed, split and index, and never the same twice."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, PRNGKeyArray, UInt32

from trainax_pk._tree import check_count

SPLITS = ("train", "val", "test")
# 29 bits of seed, 3 bits of stream, 32 bits of index: 64 bits, one block of the cipher.
_MAX_SEED = 2**29
_FRESH = 4
_ROOT = np.array([0x7EA12A8B, 0x51D0_0001], np.uint32)


def stream_word(seed: int, split: str, *, fresh: bool) -> np.uint32:
    """Seed, split and kind of stream in one word, injectively.

    Raises:
        ValueError: A seed out of range, an unknown split.
    """
    check_count("seed", seed, minimum=0)
    if seed >= _MAX_SEED:
        raise ValueError(
            f"Expected `seed` < {_MAX_SEED}, got {seed}. Seeds, splits and indices share "
            "64 bits, so that no two samples share a key."
        )
    if split not in SPLITS:
        raise ValueError(
            f"Expected `split` to be 'train', 'val' or 'test', got {split!r}. Choose "
            "one of them."
        )
    return np.uint32(seed * 8 + SPLITS.index(split) + (_FRESH if fresh else 0))


def sample_key(word: UInt32[Array, ""], index: UInt32[Array, ""]) -> PRNGKeyArray:
    """Key of sample `index` of a stream.

    The pair (word, index) is one block of 64 bits, which Threefry enciphers under a
    fixed key. A block cipher is a bijection: keys of different pairs are different, for
    certain and not only in all likelihood. As `jax.random.fold_in(root, index)` it is
    a pure function of the index, so that any sample can be made alone.

    Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    block = jnp.stack([jnp.uint32(word), jnp.uint32(index)])
    # Not the default implementation, which a flag may change.
    words = threefry_2x32(jnp.asarray(_ROOT), block)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
