"""Arrays of a model in a file, and their digest."""

import hashlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from trainax_pk._extras import load
from trainax_pk._files import LocalFiles


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


def load_weights(like: PyTree[Any], path: Path, sha256: str) -> PyTree[Any]:
    """A model with the arrays of a file in place of its own.

    Args:
        like: A model of the same structure.
        path: The file.
        sha256: What `hash_weights` gave.

    Raises:
        ArtifactDamaged: No such file, another digest, arrays of other names or shapes.
    """
    stored = _read(path)
    if (found := _digest(stored)) != sha256:
        raise ArtifactDamaged(
            f"Expected weights of SHA-256 {sha256} in {path}, got {found}. Get the file "
            "that belongs to the artifact, or train again."
        )
    expected = {name: x.shape for name, x in name_arrays(like)}
    got = {name: x.shape for name, x in stored.items()}
    if expected != got:
        raise ArtifactDamaged(
            f"Expected arrays {expected} in {path}, got {got}. Load it with the version "
            "of the network that it was trained with."
        )
    arrays, static = eqx.partition(like, eqx.is_array)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    new = [jnp.asarray(stored[jax.tree_util.keystr(place)]) for place, _ in leaves]
    return eqx.combine(treedef.unflatten(new), static)


def hash_weights(model: PyTree[Any]) -> str:
    """SHA-256 of names, types, shapes and bytes of all arrays."""
    return _digest(dict(name_arrays(model)))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ArtifactDamaged(
            f"Expected weights in {path}, found no such file. Keep it beside the artifact."
        )
    safetensors = load("safetensors")
    try:
        return load("safetensors.numpy").load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ArtifactDamaged(
            f"Expected safetensors in {path}, got something else: {error}. Get the file "
            "that belongs to the artifact, or train again."
        ) from None


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def name_arrays(model: PyTree[Any]) -> list[tuple[str, np.ndarray]]:
    """All arrays of a PyTree, each with its place."""
    arrays = eqx.filter(model, eqx.is_array)
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return [(jax.tree_util.keystr(p), np.asarray(x)) for p, x in leaves]
