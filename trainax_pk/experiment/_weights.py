"""Arrays of a model in a file, and their digest."""

import hashlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._files import LocalFiles
from trainax_pk.data._extras import load


class ArtifactDamaged(ValueError):
    """An artifact whose weights are not those that it names.

    Example:
        >>> from trainax_pk.experiment import ArtifactDamaged
        >>> issubclass(ArtifactDamaged, ValueError)
        True
    """


def save_weights(model: PyTree[Any], path: Path) -> None:
    """All arrays of a model, by their place in it."""
    safetensors = load("safetensors.numpy")
    LocalFiles(path.parent).write(path.name, safetensors.save(dict(name_arrays(model))))


def load_weights(like: PyTree[Any], path: Path) -> PyTree[Any]:
    """A model with the arrays of a file in place of its own."""
    safetensors = load("safetensors.numpy")
    stored = safetensors.load(path.read_bytes())
    expected = {name: (x.shape, x.dtype) for name, x in name_arrays(like)}
    got = {name: (x.shape, x.dtype) for name, x in stored.items()}
    if expected.keys() != got.keys() or any(
        expected[n][0] != got[n][0] for n in expected
    ):
        raise ArtifactDamaged(
            f"Expected arrays {sorted(expected)} in {path}, got {sorted(got)}, or of "
            "other shapes. Get the file that belongs to the artifact."
        )
    arrays, static = eqx.partition(like, eqx.is_array)
    leaves = jax.tree_util.tree_flatten_with_path(arrays)
    new = [stored[jax.tree_util.keystr(place)] for place, _ in leaves[0]]
    return eqx.combine(leaves[1].unflatten([jax.numpy.asarray(x) for x in new]), static)


def hash_weights(model: PyTree[Any]) -> str:
    """SHA-256 of names, types, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for name, x in sorted(name_arrays(model)):
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def name_arrays(model: PyTree[Any]) -> list[tuple[str, np.ndarray]]:
    """All arrays of a PyTree, each with its place."""
    arrays = eqx.filter(model, eqx.is_array)
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return [(jax.tree_util.keystr(p), np.asarray(x)) for p, x in leaves]
