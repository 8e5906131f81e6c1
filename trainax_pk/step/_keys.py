"""Streams of random keys."""

import jax
from jaxtyping import Array, PRNGKeyArray

_STREAMS = {"train": 0, "evaluate": 1, "generate": 2}


def stream_key(root: PRNGKeyArray, stream: str, step: Array) -> PRNGKeyArray:
    """Key of a named stream at a step: evaluation cannot disturb training.

    Args:
        root: Root key.
        stream: "train", "evaluate" or "generate".
        step: Number of updates done.

    Returns:
        `fold_in(fold_in(root, stream), step)`.

    Raises:
        ValueError: An unknown stream.

    Example:
        >>> import jax
        >>> from trainax_pk.step import stream_key
        >>> stream_key(jax.random.key(0), "train", 3).shape
        ()
    """
    if stream not in _STREAMS:
        raise ValueError(
            f"Expected `stream` to be one of {sorted(_STREAMS)}, got {stream!r}. "
            "Choose one of them."
        )
    return jax.random.fold_in(jax.random.fold_in(root, _STREAMS[stream]), step)
