"""Makes a cache, or what is missing of it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm.auto import tqdm

from trainax_pk._files import (
    AbstractFiles,
    find_damage,
    fingerprints,
    read_sealed,
    seal,
)
from trainax_pk._signals import Interrupts
from trainax_pk.data._cache_manifest import (
    FINISHING,
    HEADER,
    LEDGER,
    MANIFEST,
    METADATA,
    CacheDamaged,
    Layout,
    ledger_name,
    make_leaves,
)
from trainax_pk.data._cache_parts import PartReader
from trainax_pk.data._cache_store import AbstractStore, Rows

# What a part holds: large enough for a disk's full speed, small enough to lose.
_PART_BYTES = 2**25
# A loss of power costs no more of what was written.
_SETTLE_SECONDS = 2.0
_PROMISE = (
    "generation ends after this part, on SIGTERM in 5 s at the latest (once more: at "
    "once); what is written stays"
)
_LOSS = "generation ends without the part under way"


def plan_layout(
    source: Any,
    spec: PyTree[Any],
    content_hash: str,
    format: str,
    chunk_size: int | None,
    compression: str | None,
    memory_budget: int | None = None,
) -> Layout:
    """How a new cache is laid out."""
    leaves = make_leaves(spec)
    if chunk_size is not None:
        part_size = chunk_size // 2
    else:
        row_bytes = max(1, sum(leaf.nbytes for leaf in leaves))
        part_bytes = _PART_BYTES
        if memory_budget is not None:
            # One is simulated, with its blocks and what they are made of; one is encoded
            # and written.
            part_bytes = min(part_bytes, memory_budget // 16)
        part_size = max(1, part_bytes // row_bytes)
        block = getattr(source, "block_size", 1)
        # Whole blocks, since a part of one costs as much; within the memory budget.
        count = _round(max(1, part_size // block), up=False)
        # As even as can be: the last one takes as much of the disk as any.
        num_blocks = -(-len(source) // block)
        count = _round(-(-num_blocks // -(-num_blocks // count)), up=True)
        part_size = min(count * block, getattr(source, "chunk_size", part_size))
    return Layout(
        content_hash,
        format,
        len(source),
        min(part_size, len(source)),
        compression,
        leaves,
    )


def _round(count: int, *, up: bool) -> int:
    """To some factors of two, else a part might be cut into single rows, or not at all."""
    step = 1 << max(0, count.bit_length() - 6)
    return -(-count // step) * step if up else count - count % step


def generate(
    source: Any,
    files: AbstractFiles,
    wanted: Layout,
    make_store: Callable[[Layout, AbstractFiles], AbstractStore],
    read_layout: Callable[[dict[str, Any]], Layout],
    *,
    progress: bool,
) -> None:
    """Writes the parts that are not whole, then the manifest. The lock is held.

    The order is what makes it safe against an end at any instant: header, metadata of
    the format, then for every part its files and a sealed note, then the manifest, and
    none is believed without its checksum. A killed process loses the open chunk alone,
    a loss of power some seconds of work: parts go to the disk while others are made, and
    the manifest comes when all of them are there. SIGTERM and SIGINT are obeyed between
    two parts.
    """
    layout = _begin(files, wanted, read_layout)
    store = make_store(layout, files)
    metadata = _create(files, store)
    entries = _finished(files, layout)
    reader = PartReader(source, layout)
    missing = [c for c in range(layout.num_parts) if c not in entries]
    done = sum(_length(layout, c) for c in entries)
    bar = tqdm(
        total=layout.num_samples, initial=done, unit=" samples", disable=not progress
    )
    # One writer and one part in its hands: two parts are open at a time, the one that
    # is written and the one that is simulated.
    with (
        Interrupts(promise=_PROMISE, loss=_LOSS) as interrupts,
        bar,
        _Settler(files, [HEADER, METADATA, *metadata]) as settler,
        ThreadPoolExecutor(1) as writer,
    ):
        # What an earlier process has written it may not have made durable.
        settler.add(entries)
        pending: tuple[int, Future] | None = None
        for part in [*missing, None]:
            ends = part is None or interrupts.received is not None
            made = None if ends else reader.read(part)
            written = {} if pending is None else {pending[0]: pending[1].result()}
            if made is not None:
                pending = part, writer.submit(_write, store, files, part, *made)
            entries.update(written)
            bar.update(sum(_length(layout, c) for c in written))
            settler.add(written)
            if ends:
                break
        settler.finish()
        if len(entries) == layout.num_parts:
            _check_any_succeeded(source, layout, entries)
            _commit(files, layout, metadata, entries)
        if interrupts.received is not None:
            interrupts.obeyed.set()
            raise interrupts.end()


def check_ours(names: list[str], where: str) -> None:
    """Refuses a folder that this package has not begun.

    Raises:
        ValueError: Files, but no header among them.
    """
    if HEADER not in names:
        raise ValueError(
            f"Expected {where} to be empty or a cache of trainax_pk, got other files, "
            f"{names[:3]} among them. Pass another cache_dir."
        )


def _begin(
    files: AbstractFiles, wanted: Layout, read_layout: Callable[[Any], Layout]
) -> Layout:
    # Temporary files of a writer that was killed are nobody's.
    names = [n for n in files.names() if not n.rsplit("/", 1)[-1].startswith(".")]
    if not names:
        files.write(HEADER, seal(wanted.to_json()))
        return wanted
    where = files.url("").rstrip("/")
    check_ours(names, where)
    header = read_sealed(files, HEADER)
    if header is None:
        raise CacheDamaged(
            f"Expected a whole {HEADER} in {where}, got a damaged one. Call "
            "invalidate() and generate again.",
            parts=[],
        )
    layout = read_layout(header)
    same = (layout.content_hash, layout.num_samples, layout.leaves) == (
        wanted.content_hash,
        wanted.num_samples,
        wanted.leaves,
    )
    if not same:
        raise ValueError(
            f"Expected the cache {where} to be of this source, got one of another "
            f"({layout.content_hash[:12]}, {layout.num_samples} samples). Call "
            "invalidate(), or pass another cache_dir."
        )
    return layout


def _create(files: AbstractFiles, store: AbstractStore) -> dict[str, list[int]]:
    """Fingerprints of what belongs to no part; writes it if it is not whole."""
    metadata = read_sealed(files, METADATA)
    if metadata is None or find_damage(files, metadata, full=True):
        # What parts there are hang on it, so they go with it.
        files.remove(LEDGER)
        metadata = fingerprints(files, store.create())
        files.write(METADATA, seal(metadata), durable=False)
    return metadata


def _finished(files: AbstractFiles, layout: Layout) -> dict[int, dict[str, Any]]:
    there = set(files.names())
    found = {}
    for part in range(layout.num_parts):
        name = ledger_name(part)
        note = read_sealed(files, name) if name in there else None
        if note is None or note.pop("part", None) != part:
            continue
        if find_damage(files, note["files"], full=True) is None:
            found[part] = note
    return found


def _write(
    store: AbstractStore, files: AbstractFiles, part: int, rows: Rows, num_failed: int
) -> dict[str, Any]:
    note = {"files": store.write(part, rows), "num_failed": num_failed}
    files.write(ledger_name(part), seal({**note, "part": part}), durable=False)
    return note


class _Settler:
    """Brings parts to the disk by a thread of its own, while others are made.

    Each is begun with at once; that it arrived is waited for once in a while, for all
    that were: a file system takes as long for one as for many.
    """

    def __init__(self, files: AbstractFiles, first: list[str]) -> None:
        """Begins with the files that belong to no part.

        In any case, since an earlier process may not have come to it.
        """
        self._files = files
        self._waiting: dict[int, dict[str, Any]] = {}
        self._since = time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._task = self._thread.submit(files.settle, first)

    def __enter__(self) -> "_Settler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown()

    def add(self, entries: dict[int, dict[str, Any]]) -> None:
        """Begins with parts; waits until the ones before are begun with."""
        self._task.result()
        self._task = self._thread.submit(self._begin, dict(entries))

    def finish(self) -> None:
        """Waits until everything is durable."""
        self._task.result()
        self._thread.submit(self._settle).result()

    def _begin(self, entries: dict[int, dict[str, Any]]) -> None:
        self._files.hasten(_names(entries))
        self._waiting |= entries
        if time.monotonic() - self._since > _SETTLE_SECONDS:
            self._settle()
            self._since = time.monotonic()

    def _settle(self) -> None:
        try:
            self._files.settle(_names(self._waiting))
        except BaseException:
            # What could not be brought to the disk may still be read from memory: that
            # these parts are whole is taken back.
            for part in self._waiting:
                self._files.remove(ledger_name(part))
            raise
        self._waiting = {}


def _names(entries: dict[int, dict[str, Any]]) -> list[str]:
    """Files of parts, their notes last."""
    files = [name for entry in entries.values() for name in entry["files"]]
    return files + [ledger_name(part) for part in entries]


def _check_any_succeeded(
    source: Any, layout: Layout, entries: dict[int, dict[str, Any]]
) -> None:
    """A source that masks refuses nothing but failures; its parts may hide that."""
    failed = sum(entry["num_failed"] for entry in entries.values())
    masks = getattr(source, "on_failure", None) == "mask"
    if masks and failed >= layout.num_samples:
        raise FloatingPointError(
            f"Expected some finite simulations, got {layout.num_samples} samples that all "
            "failed. The forward model diverges everywhere: check its time step and the "
            "prior's scale, or pass on_failure='keep' to look at the output."
        )


def _commit(
    files: AbstractFiles,
    layout: Layout,
    metadata: dict[str, list[int]],
    entries: dict[int, dict[str, Any]],
) -> None:
    parts = [entries[c] for c in range(layout.num_parts)]
    own = {**metadata, **fingerprints(files, [HEADER, METADATA])}
    expected = set(own).union(*(entry["files"] for entry in parts))
    for name in files.names():
        # Left by a writer that was killed in the middle of a file.
        if name not in expected and not name.startswith(f"{LEDGER}/"):
            files.remove(name)
    manifest = {"layout": layout.to_json(), "metadata": own, "parts": parts}
    # The ledger goes file by file: its own remains could not tell that there are any.
    files.write(FINISHING, b"", durable=False)
    files.write(MANIFEST, seal(manifest))
    tidy(files)


def tidy(files: AbstractFiles) -> None:
    """Removes what only a generation under way needs."""
    files.remove(LEDGER)
    files.remove(FINISHING)


def _length(layout: Layout, part: int) -> int:
    start, stop = layout.rows(part)
    return stop - start


def row_spec(source: Any) -> PyTree[Any]:
    """Shapes and dtypes of one row, told by the source or seen in one."""
    spec = getattr(source, "element_spec", None)
    if spec is None:
        row = source[0:1]
        spec = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], np.asarray(x).dtype), row
        )
    if not jax.tree.leaves(spec):
        raise ValueError(
            "Expected rows that hold arrays, got a PyTree without any. Pass a source of "
            "arrays."
        )
    return spec
