"""What callbacks returned after the last update: a finished run does not ask them again."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from trainax_pk._files import LocalFiles, make_folder, read_sealed, seal
from trainax_pk.checkpoint._arrays import to_host
from trainax_pk.checkpoint._identity import Fields, Identity

NAME = "finished.json"
# Larger results are asked for again.
_LARGEST = 2**26


def source_of(identity: Identity, callbacks: Fields) -> str:
    """What tells results of a run and its callbacks from those of others.

    Args:
        identity: Of the run.
        callbacks: Described with their data; names alone would not tell.

    Returns:
        A digest.
    """
    fields = json.dumps([identity.must, callbacks], sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()


def keep_results(
    folder: Path, step: int, results: Mapping[str, PyTree[Any]], source: str
) -> None:
    """Writes results whole, or leaves what was there.

    Args:
        folder: The run directory.
        step: Number of updates done.
        source: Of which run and which callbacks they are.
        results: By callback. Those that are more than arrays and text in dicts, lists and
            tuples, such as a network, are left out, and so are very large ones.

    Raises:
        OSError: The file system refused.
    """
    texts = {}
    for name, value in results.items():
        small = sum(x.nbytes for x in jax.tree.leaves(value) if hasattr(x, "nbytes"))
        text = _encode(value) if small <= _LARGEST else None
        if text is not None:
            texts[name] = text
    make_folder(folder)
    LocalFiles(folder).write(
        NAME, seal({"step": step, "source": source, "results": texts})
    )


def load_results(folder: Path, step: int, source: str) -> dict[str, PyTree[Any]]:
    """The results of a step by callback; none where the file is damaged, or of another
    step, run or set of callbacks.

    Args:
        folder: The run directory.
        step: Number of updates done.
        source: As for `keep_results`.
    """
    try:
        found = read_sealed(LocalFiles(folder), NAME)
    except OSError:
        return {}
    if found is None or (found["step"], found.get("source")) != (step, source):
        return {}
    return {name: _decode(text) for name, text in found["results"].items()}


def _encode(x: Any) -> Any:
    """A tree as JSON; None for what cannot be told from it."""
    # Exact types: a subclass would come back as something else.
    if x is None:
        return {"none": True}
    if type(x) is str:
        return {"text": x}
    if isinstance(x, jax.Array):
        host, key = to_host(x)
        content = base64.b64encode(np.ascontiguousarray(host).tobytes()).decode()
        return {"array": [host.dtype.name, list(host.shape), key, content]}
    if type(x) is dict and all(type(k) is str for k in x):
        children = {k: _encode(v) for k, v in x.items()}
        return None if None in children.values() else {"dict": children}
    if type(x) in (list, tuple):
        items = [_encode(v) for v in x]
        return None if None in items else {type(x).__name__: items}
    return None


def _decode(text: dict[str, Any]) -> PyTree[Any]:
    ((kind, value),) = text.items()
    if kind == "array":
        dtype, shape, key, content = value
        flat = np.frombuffer(base64.b64decode(content), np.dtype(dtype))
        array = jnp.array(flat.reshape(shape))
        return array if key is None else jax.random.wrap_key_data(array, impl=key)
    if kind == "dict":
        return {k: _decode(v) for k, v in value.items()}
    if kind in ("list", "tuple"):
        items = [_decode(v) for v in value]
        return items if kind == "list" else tuple(items)
    return value if kind == "text" else None
