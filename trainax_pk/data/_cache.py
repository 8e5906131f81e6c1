"""Datasets kept on disk: simulated once, verified, resumed, never stale."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk._files import AbstractFiles, seal
from trainax_pk._tree import check_count, check_flag
from trainax_pk.data._cache_check import (
    check_format,
    check_source,
    list_damage,
    read_layout,
    read_manifest,
    refuse_damage,
)
from trainax_pk.data._cache_files import open_files
from trainax_pk.data._cache_generate import (
    check_ours,
    generate,
    plan_layout,
    row_spec,
    tidy,
)
from trainax_pk.data._cache_manifest import (
    FINISHING,
    HEADER,
    MANIFEST,
    METADATA,
    Layout,
    Leaf,
    ledger_name,
    make_leaves,
)
from trainax_pk.data._cache_store import AbstractStore
from trainax_pk.data._parquet_store import ParquetStore
from trainax_pk.data._simulation_plan import as_rows, check_unmasked
from trainax_pk.data._tfrecord_store import TFRecordStore
from trainax_pk.data._trajectories import Trajectories
from trainax_pk.data._zarr_store import ZarrStore

Format = Literal["zarr", "parquet", "tfrecord"]
_STORES = {"zarr": ZarrStore, "parquet": ParquetStore, "tfrecord": TFRecordStore}


class CachedDataset:
    """Any dataset, computed once and read from disk from then on.

    The cache lies in `cache_dir/<content hash>-<format>`: a source whose physics, prior,
    seed or precision differs has another folder, so that nothing stale is read. It is
    made when it is first read, or by `generate`. While one part is written the next is
    simulated: these two are the open chunk. A part counts once its files are what a
    sealed note says; the manifest is committed last, when all is on the disk. What was
    killed, by whatever signal, goes on at the first part that is missing and ends in
    the same bytes; at most the open chunk is made again.

    Opening compares the manifest's seal and the sizes of all files; `verify(full=True)`
    reads every byte. One writer at a time holds a lock that the kernel releases with its
    process.

    Attributes:
        source: The dataset.
        cache_dir: Local path, or an fsspec URL. Remote stores have no lock: see to it
            that one process writes.
        format: "zarr", "parquet" or "tfrecord".
        memory_budget: Bytes that generation and training may hold, or None.
        element_spec: Shapes and dtypes of one row.
        num_failed: Failed samples of the source, of those that are stored.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> source = tx.data.SimulationDataset(
        ...     jnp.sin, tx.data.Normal(jnp.zeros(2), 1.0), 10
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cached = tx.data.CachedDataset(source, folder)
        ...     theta, x = cached[:4]
        ...     cached.verify(full=True)
        >>> bool((x == source[:4][1]).all())
        True
    """

    def __init__(
        self,
        source: Any,
        cache_dir: Any,
        format: Format = "zarr",
        *,
        chunk_size: int | None = None,
        compression: str | None = "auto",
        memory_budget: int | None = None,
        lock_timeout: float = 0.0,
        progress: bool = False,
    ) -> None:
        """Checks the arguments; touches no file.

        Args:
            source: A dataset with `len`, slicing, `content_hash()` and `with_split`.
            cache_dir: Where caches are kept; made if it is not there.
            format: "zarr" (version 3, sharded), "parquet", which needs the extra
                `trainax_pk[parquet]`, or "tfrecord".
            chunk_size: Samples that a kill may cost, >= 2: those of the open chunk, of
                two parts. None for parts of about 32 MiB. A cache that exists keeps its
                own.
            compression: "lz4", "zstd", for parquet "snappy" as well, or None. "auto":
                in zarr "lz4" for integers and flags and None for floating-point numbers,
                of which compression saves little and costs most of the time.
            memory_budget: Bytes that generation and training may hold of the data. A
                trainer streams data that need more; generation makes smaller parts.
                None: data up to half of the machine's memory are trained on in memory,
                larger ones streamed through 512 MiB.
            lock_timeout: Seconds to wait for another writer of the same cache.
            progress: Show samples per second and the time left while generating.

        Raises:
            ValueError: An unknown format or codec, a bad number, a source that is
                endless or lacks one of the methods.
        """
        check_source(source)
        compression = check_format(format, compression)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size, minimum=2)
        if memory_budget is not None:
            check_count("memory_budget", memory_budget)
        if not lock_timeout >= 0:
            raise ValueError(f"Expected `lock_timeout` >= 0, got {lock_timeout!r}.")
        self.source, self.cache_dir, self.format = source, cache_dir, format
        self.memory_budget = memory_budget
        self.num_failed = 0
        self._options = {
            "chunk_size": chunk_size,
            "compression": compression,
            "memory_budget": memory_budget,
            "lock_timeout": lock_timeout,
            "progress": check_flag("progress", progress),
        }
        self._hash = source.content_hash()
        self.element_spec = row_spec(source)
        self._store: AbstractStore | None = None

    @property
    def directory(self) -> str:
        """Folder or URL of this cache."""
        return self._files().url("").rstrip("/")

    def content_hash(self) -> str:
        """That of the source: the same data."""
        return self._hash

    @property
    def num_times(self) -> int | None:
        """Times of a trajectory of the source, None if it holds none."""
        return getattr(self.source, "num_times", None)

    @property
    def is_parametric(self) -> bool:
        """Whether the source's physics depend on its parameters."""
        return getattr(self.source, "is_parametric", False)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory."""
        return len(self) * sum(x.nbytes for x in make_leaves(self.element_spec))

    @property
    def leaves(self) -> PyTree[Leaf]:
        """What the store calls the arrays of a row, in the structure of a row."""
        treedef = jax.tree.structure(self.element_spec)
        return jax.tree.unflatten(treedef, make_leaves(self.element_spec))

    def with_split(self, split: str) -> "CachedDataset":
        """The cache of another split of the source.

        Args:
            split: As the source takes it.

        Returns:
            A cache in the same directory.
        """
        other = self.source.with_split(split)
        return CachedDataset(other, self.cache_dir, self.format, **self._options)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Any) -> PyTree[Any]:
        """Rows of an index, a slice or an integer array, as the source gives them."""
        store = self.open()
        rows = as_rows(indices, len(self))
        is_slice = isinstance(indices, slice) and indices.step in (None, 1)
        if is_slice and len(rows):
            found = store.read(int(rows[0]), int(rows[-1]) + 1)
        else:
            found = store.take(rows)
        leaves = [found[leaf.name] for leaf in store.layout.leaves]
        tree = jax.tree.unflatten(jax.tree.structure(self.element_spec), leaves)
        if isinstance(indices, (int, np.integer)):
            return jax.tree.map(lambda x: x[0], tree)
        return tree

    def __iter__(self) -> Iterator[PyTree[Any]]:
        for part in self.chunks():
            for i in range(len(jax.tree.leaves(part)[0])):
                yield jax.tree.map(lambda x, i=i: x[i], part)

    def chunks(self) -> Iterator[PyTree[Any]]:
        """Rows with a leading axis, a stored part at a time."""
        layout = self.open().layout
        for part in range(layout.num_parts):
            yield self[slice(*layout.rows(part))]

    def trajectories(self) -> Trajectories:
        """All samples as trajectories in memory, to be trained on.

        Returns:
            State `(num_samples, num_times, ...)`; parameters of a `Parametric` source
            as `sample`.

        Raises:
            ValueError: The source holds no trajectories, or has masked failures.
        """
        if self.num_times is None:
            raise ValueError(
                "Expected a source of trajectories, got one of single outputs. Pass "
                "num_steps to the SimulationDataset."
            )
        params, output = self.finite_rows()
        return Trajectories(output, sample=params if self.is_parametric else None)

    def finite_rows(self) -> PyTree[Any]:
        """All rows, to be trained on.

        Returns:
            Rows with a leading axis.

        Raises:
            ValueError: Samples that failed and were masked with NaN.
        """
        self.check_finite()
        return self[:]

    def check_finite(self) -> None:
        """Refuses masked failures, as the manifest counts them.

        Raises:
            ValueError: Samples that failed and were masked with NaN.
        """
        on_failure = getattr(self.source, "on_failure", None)
        if on_failure == "mask":
            self.open()
            check_unmasked(on_failure, self.num_failed, len(self))

    def generate(self) -> None:
        """Makes what is missing; returns at once if nothing is.

        Raises:
            TimeoutError: Another process is writing this cache.
            OSError: A full disk, or a directory that cannot be written. What was
                finished stays, and the next call goes on from there.
            CacheDamaged: A finished cache is not what was written.
            ValueError: A directory that is no cache, or one of another schema.
        """
        self.open()

    def verify(self, *, full: bool = False) -> None:
        """Compares what lies there with what was written.

        Args:
            full: Compare the checksum of every file too, not only sizes.

        Raises:
            CacheDamaged: Something differs; the message names every damaged part and
                its file.
        """
        check_flag("full", full)
        files = self._files()
        if files.size(MANIFEST) is None:
            self.open()
        damage = list_damage(files, read_manifest(files), full=full)
        refuse_damage(self.directory, damage)

    def repair(self) -> None:
        """Makes damaged parts again, and nothing else.

        Raises:
            CacheDamaged: The manifest itself is damaged: only `invalidate` helps.
        """
        files = self._files()
        with files.locked(self._options["lock_timeout"]):
            manifest = read_manifest(files)
            damage = dict(list_damage(files, manifest, full=True))
            if not damage:
                return
            if None in damage:
                # Nothing that hangs on damaged metadata is believed. What goes on from
                # here finds the layout in the header.
                files.write(HEADER, seal(manifest["layout"]))
                files.remove(METADATA)
            for part, entry in enumerate(manifest["parts"]):
                if part not in damage:
                    files.write(ledger_name(part), seal({**entry, "part": part}))
            files.remove(MANIFEST)
        self._store = None
        self.open()

    def invalidate(self) -> None:
        """Deletes this cache; the next read makes it anew.

        Raises:
            ValueError: The directory is no cache.
            TimeoutError: Another process is writing it.
        """
        files = self._files()
        with files.locked(self._options["lock_timeout"]):
            names = files.names()
            if names:
                check_ours(names, self.directory)
                files.remove(MANIFEST)
                files.remove(last=HEADER)
        self._store, self.num_failed = None, 0

    def __repr__(self) -> str:
        return f"CachedDataset({self.source!r}, {self.directory!r})"

    def _files(self) -> AbstractFiles:
        return open_files(self.cache_dir, f"{self._hash[:40]}-{self.format}")

    def open(self) -> AbstractStore:
        """The store, made and compared with its manifest if that has not been done."""
        if self._store is not None:
            return self._store
        files = self._files()
        if files.size(MANIFEST) is None:
            self._generate(files)
        elif files.size(FINISHING) is not None:
            # The writer was killed between the manifest and the end.
            with contextlib.suppress(TimeoutError, OSError), files.locked(0.0):
                if files.size(MANIFEST) is not None:
                    tidy(files)
        manifest = read_manifest(files)
        layout = self._layout_of(manifest["layout"])
        refuse_damage(self.directory, list_damage(files, manifest, full=False))
        self._store = _STORES[self.format](layout, files)
        self.num_failed = sum(entry["num_failed"] for entry in manifest["parts"])
        return self._store

    def _layout_of(self, value: dict[str, Any]) -> Layout:
        return read_layout(value, self.directory)

    def _generate(self, files: AbstractFiles) -> None:
        try:
            files.make()
            with files.locked(self._options["lock_timeout"]):
                # Another process may have finished while this one waited.
                if files.size(MANIFEST) is None:
                    generate(
                        self.source,
                        files,
                        plan_layout(
                            self.source,
                            self.element_spec,
                            self._hash,
                            self.format,
                            self._options["chunk_size"],
                            self._options["compression"],
                            self.memory_budget,
                        ),
                        _STORES[self.format],
                        self._layout_of,
                        progress=self._options["progress"],
                    )
        except TimeoutError:
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"Expected to write the cache {self.directory}, got: "
                f"{error.strerror or error}. Parts that were finished stay: make room "
                "or pass another cache_dir, and call generate() again to go on",
            ) from error
