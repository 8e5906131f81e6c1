"""Arguments of caches, checked."""

from typing import Any

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
    """The codec of a format, the fastest for "auto".

    Raises:
        ValueError: An unknown format, or a codec that it does not have.
    """
    if format not in _CODECS:
        raise ValueError(
            f"Expected `format` to be one of {', '.join(_CODECS)}, got {format!r}."
        )
    if compression == "auto":
        return _CODECS[format][0]
    if compression not in _CODECS[format]:
        raise ValueError(
            f"Expected `compression` of {format} to be one of {_CODECS[format]}, got "
            f"{compression!r}."
        )
    return compression
