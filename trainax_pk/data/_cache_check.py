"""Arguments of caches, checked."""

from typing import Any

from trainax_pk._files import AbstractFiles, find_damages, read_sealed
from trainax_pk.data._cache_manifest import MANIFEST, SCHEMA, CacheDamaged, Layout
from trainax_pk.data._simulation_plan import is_endless

# Of each format, the fastest first.
_CODECS: dict[str, tuple[str | None, ...]] = {
    "zarr": ("lz4", "zstd", None),
    "parquet": ("lz4", "zstd", "snappy", None),
    "tfrecord": (None,),
}


def check_source(source: Any) -> None:
    """Refuses what is no finite dataset.

    Raises:
        ValueError: A method that is missing, or an endless stream.
    """
    for name in ("__len__", "__getitem__", "content_hash", "with_split"):
        if not callable(getattr(source, name, None)):
            raise ValueError(
                f"Expected a dataset as source, got {type(source).__name__} without "
                f"`{name}`. Pass a SimulationDataset, or a class that has it."
            )
    if is_endless(source):
        raise ValueError(
            "Expected a finite dataset to store, got one with on_the_fly=True. "
            "Pass num_samples instead."
        )


def check_format(format: str, compression: str | None) -> str | None:
    """The codec of a format; "auto" of zarr is settled array by array.

    Raises:
        ValueError: An unknown format, or a codec that it does not have.
    """
    if format not in _CODECS:
        raise ValueError(
            f"Expected `format` to be one of {', '.join(_CODECS)}, got {format!r}."
        )
    if compression == "auto":
        return "auto" if format == "zarr" else _CODECS[format][0]
    if compression not in _CODECS[format]:
        raise ValueError(
            f"Expected `compression` of {format} to be one of {_CODECS[format]}, got "
            f"{compression!r}."
        )
    return compression


def read_manifest(files: AbstractFiles) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheDamaged: It is missing or damaged.
        ValueError: It is of another schema.
    """
    where = files.url("").rstrip("/")
    manifest = read_sealed(files, MANIFEST)
    if manifest is None:
        raise CacheDamaged(
            f"Expected a whole manifest in {where}, got a missing or damaged "
            f"{MANIFEST}. Call invalidate() and generate again.",
            parts=[],
        )
    read_layout(manifest["layout"], where)
    return manifest


def read_layout(value: dict[str, Any], where: str) -> Layout:
    """A layout that this version understands.

    Raises:
        ValueError: It is of another schema.
    """
    if value.get("schema") != SCHEMA:
        raise ValueError(
            f"Expected a cache of schema {SCHEMA} in {where}, got schema "
            f"{value.get('schema')}, of another version of trainax_pk. Call "
            "invalidate(), or pass another cache_dir."
        )
    return Layout.from_json(value)


def list_damage(
    files: AbstractFiles, manifest: dict[str, Any], *, full: bool
) -> list[tuple[int | None, str]]:
    """Parts that are not as they were written, None for what belongs to no part."""
    found: list[tuple[int | None, str]] = []
    texts = list(find_damages(files, manifest["metadata"], full=full))
    if texts:
        found.append((None, ", ".join(texts)))
    layout = read_layout(manifest["layout"], files.url("").rstrip("/"))
    for part, entry in enumerate(manifest["parts"]):
        texts = list(find_damages(files, entry["files"], full=full))
        if texts:
            start, stop = layout.rows(part)
            text = f"part {part} (rows {start} to {stop - 1}): {', '.join(texts)}"
            found.append((part, text))
    return found


def refuse_damage(where: str, damage: list[tuple[int | None, str]]) -> None:
    """Names all that is damaged.

    Raises:
        CacheDamaged: Anything is.
    """
    if damage:
        lines = "; ".join(text for _, text in damage)
        raise CacheDamaged(
            f"Expected the cache {where} as it was written, got: {lines}. "
            "Call repair() to make the damaged parts again, or invalidate().",
            parts=[part for part, _ in damage if part is not None],
        )
