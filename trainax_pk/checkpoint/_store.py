"""Checkpoints in a folder: whole or not there, verified, kept as long as asked."""

import contextlib
import dataclasses
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainax_pk._files import (
    LocalFiles,
    find_damage,
    fingerprints,
    make_folder,
    read_sealed,
    seal,
    sync_folder,
)
from trainax_pk.checkpoint._arrays import (
    Leaf,
    digest,
    make_leaves,
    read_arrays,
    write_arrays,
)

# 1: moving averages among the other arrays. 2: in files of their own.
SCHEMA = 2
MANIFEST = "manifest.json"
ARRAYS = "arrays"
# Folders of ours whose name begins so are on their way in or out.
_PASSING = "."
_PASSING_NAME = re.compile(r"\.\d{12}(\.[0-9a-f]{8})?\.(writing|removing)")
_DAMAGED = "damaged"
_NAME = re.compile(r"[0-9]{12}")
# How often a checkpoint is begun whose folder somebody removes meanwhile, and how long that
# may take.
_ATTEMPTS = 3
_PAUSE = 0.2


class NotRemoved(OSError):
    """Checkpoints that need not be kept could not be removed; all others are whole.

    Example:
        >>> from trainax_pk.checkpoint._store import NotRemoved
        >>> str(NotRemoved("that of step 10: Permission denied"))
        'that of step 10: Permission denied'
    """


class CheckpointDamaged(RuntimeError):
    """No checkpoint of a run is what was written.

    Attributes:
        problems: By step, what is wrong.

    Example:
        >>> from trainax_pk.checkpoint import CheckpointDamaged
        >>> CheckpointDamaged("20 is damaged", {20: "a file is missing"}).problems
        {20: 'a file is missing'}
    """

    def __init__(self, message: str, problems: dict[int, str]) -> None:
        super().__init__(message)
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        # Left to itself, pickle would call the class with the message alone.
        return type(self), (*self.args, self.problems), self.__dict__


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        step: Number of updates done.
        leaves: What is known of its arrays, by path.
        arrays: Its arrays in host memory, by path.
        meta: What else was written, JSON values.
    """

    step: int
    leaves: Mapping[str, Leaf]
    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]


class Store:
    """The checkpoints of a run, one folder for each.

    A checkpoint is written under a passing name: arrays, then the manifest, each
    durable before the next; it is read back and compared; then it is renamed, which
    commits it.

    Attributes:
        folder: Where they lie.
        guard: Called with a step, raises where the folder is no longer this writer's.
    """

    def __init__(
        self, folder: Path, guard: Callable[[int], None] = lambda step: None
    ) -> None:
        """Reads and writes nothing.

        Args:
            folder: Where they lie.
            guard: Called with a step before its checkpoint is begun and before it is
                committed; what it raises is why it is not.
        """
        self.folder = folder
        self.guard = guard
        # Whoever the folder belongs to meanwhile may write the same step.
        self._token = uuid.uuid4().hex[:8]

    def steps(self) -> list[int]:
        """Steps of the checkpoints that lie there, whatever their state, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(p.name) for p in self.folder.iterdir() if _NAME.fullmatch(p.name)
        )

    def has(self, step: int) -> bool:
        """Whether a checkpoint of a step lies there, whatever its state."""
        return self._path(step).exists()

    def write(
        self, step: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Writes, verifies and commits a checkpoint.

        Where the folder is removed meanwhile it is made again, and the checkpoint too.

        Args:
            step: Number of updates done.
            arrays: Arrays by path, on the host or on devices.
            meta: JSON values.

        Raises:
            OSError: The file system refused, or the guard; what was there before is
                untouched.
            CheckpointDamaged: What was read back is not what was written.
        """
        final = self._path(step)
        if final.exists():
            return
        leaves = make_leaves(arrays)
        for left in reversed(range(_ATTEMPTS)):
            passing = self.folder / f"{_PASSING}{final.name}.{self._token}.writing"
            try:
                self._commit(passing, final, step, leaves, meta)
                return
            except Exception as error:
                # Orbax has errors of its own for it; a full disk is another matter.
                gone = isinstance(error, FileNotFoundError)
                gone |= not (isinstance(error, OSError) or passing.exists())
                shutil.rmtree(passing, ignore_errors=True)
                if not (gone and left):
                    raise
                time.sleep(_PAUSE)
            except BaseException:
                shutil.rmtree(passing, ignore_errors=True)
                raise

    def _commit(
        self, passing: Path, final: Path, step: int, leaves: list[Any], meta: Any
    ) -> None:
        self.guard(step)
        make_folder(self.folder)
        shutil.rmtree(passing, ignore_errors=True)
        passing.mkdir()
        write_arrays(passing / ARRAYS, leaves)
        self._write_manifest(passing, step, [leaf for leaf, _ in leaves], meta)
        self._verify(passing, step)
        self.guard(step)
        os.rename(passing, final)
        sync_folder(self.folder)

    def read(self, step: int) -> Checkpoint:
        """Reads and verifies one checkpoint.

        Raises:
            CheckpointDamaged: It is not what was written.
            ValueError: A later version of this package wrote it.
        """
        return self._verify(self._path(step), step)

    def newest(self, *, move: bool = True) -> Checkpoint | None:
        """The newest valid checkpoint; newer ones that are damaged are set aside.

        Args:
            move: Without, damaged ones stay where they are.

        Returns:
            The checkpoint, or None if there is none at all.

        Raises:
            CheckpointDamaged: There are checkpoints, and none is valid. Nothing was
                moved.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self.read(step)
            except CheckpointDamaged as error:
                problems.update(error.problems)
                continue
            for bad, why in problems.items():
                self._set_aside(bad, why, found.step, move=move)
            return found
        if problems:
            lines = "; ".join(f"{step}: {why}" for step, why in problems.items())
            raise CheckpointDamaged(
                f"Expected a valid checkpoint in {self.folder}, got none ({lines}). "
                "Restore one of them from a copy, or remove the folder to begin anew.",
                problems,
            )
        return None

    def retain(self, keep: Callable[[list[int]], set[int]]) -> None:
        """Removes the checkpoints that need not be kept; the newest always is.

        Args:
            keep: `steps, ascending -> those to keep`.

        Raises:
            NotRemoved: The file system refused; all that can go is gone.
        """
        steps, problems = self.steps(), []
        for step in sorted(set(steps[:-1]) - keep(steps)):
            try:
                self.remove(step)
            except OSError as error:
                problems.append(f"that of step {step}: {error}")
        if problems:
            raise NotRemoved("; ".join(problems))

    def remove(self, step: int) -> None:
        """Removes a checkpoint; half removed it is no checkpoint."""
        passing = self.folder / f"{_PASSING}{self._path(step).name}.removing"
        # Who has removed it already has done no harm.
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path(step), passing)
            shutil.rmtree(passing)

    def tidy(self) -> None:
        """Removes what a process that was killed left half written or half removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                # Others may keep files of their own here.
                if _PASSING_NAME.fullmatch(path.name):
                    self._tidy_one(path)

    def _tidy_one(self, path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.warn(
                f"{path}, left by a process that was killed or could not remove it, cannot "
                f"be removed ({error}). It is not read: remove it by hand.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:012d}"

    def _write_manifest(
        self, folder: Path, step: int, leaves: list[Leaf], meta: Mapping[str, Any]
    ) -> None:
        files = LocalFiles(folder)
        names = files.names()
        files.settle(names)
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
            "files": fingerprints(files, names),
            "meta": dict(meta),
        }
        files.write(MANIFEST, seal(manifest))

    def _verify(self, folder: Path, step: int) -> Checkpoint:
        def damaged(why: str) -> CheckpointDamaged:
            return CheckpointDamaged(f"{folder}: {why}", {step: why})

        files = LocalFiles(folder)
        try:
            manifest = read_sealed(files, MANIFEST)
        except OSError as error:
            raise damaged(f"{MANIFEST} cannot be read ({error})") from error
        if manifest is None:
            raise damaged(f"{MANIFEST} is missing or not what was written")
        if manifest["schema"] > SCHEMA:
            raise ValueError(
                f"Expected a checkpoint of schema {SCHEMA} or older, got "
                f"{manifest['schema']} in {folder}. Install the version that wrote it: "
                f"{manifest['meta'].get('versions')}."
            )
        if manifest["step"] != step:
            raise damaged(f"{MANIFEST} is that of step {manifest['step']}")
        why = find_damage(files, manifest["files"], full=True)
        if why is not None:
            raise damaged(why)
        leaves = [Leaf(**{**x, "shape": tuple(x["shape"])}) for x in manifest["leaves"]]
        arrays = read_arrays(folder / ARRAYS, leaves)
        for leaf in leaves:
            x = arrays[leaf.path]
            if x.shape != leaf.shape or digest(x) != leaf.digest:
                raise damaged(f"{leaf.path} is not what was written")
        named = {leaf.path: leaf for leaf in leaves}
        return Checkpoint(step, named, arrays, manifest["meta"])

    def _set_aside(self, step: int, why: str, used: int, *, move: bool) -> None:
        if not move:
            self._warn(step, why, "it stays where it is", used)
            return
        aside = self.folder / _DAMAGED
        aside.mkdir(exist_ok=True)
        for i in range(len(list(aside.iterdir())) + 1):
            target = aside / f"{self._path(step).name}-{i}"
            if not target.exists():
                break
        os.rename(self._path(step), target)
        self._warn(step, why, f"it was moved to {target}", used)

    def _warn(self, step: int, why: str, where: str, used: int) -> None:
        warnings.warn(
            f"The checkpoint of step {step} is damaged ({why}); {where}, and that of step "
            f"{used} is used.",
            RuntimeWarning,
            stacklevel=4,
        )
