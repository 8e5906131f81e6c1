"""What several processes that train one model have to agree upon."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Bytes of a message that goes to all.
_LONGEST = 2048
# How the runtime's messages begin.
_STATUS = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE|FAILED_P)"
)


class ProcessLost(RuntimeError):
    """What several processes compute together did not come to its end.

    Example:
        >>> from trainax_pk.checkpoint import ProcessLost
        >>> str(ProcessLost("a process has ended"))
        'a process has ended'
    """


class Team:
    """The processes of a run. All of them call the same methods in the same order.

    Whatever depends on clocks, signals or files is known to one process and has to be
    the same in all: how long a chunk is, when to save, when to end.

    Attributes:
        size: Number of processes; 1 where a run has one to itself.
        leads: Whether this process is the one that writes.
    """

    def __init__(self, *, together: bool) -> None:
        """Sends nothing.

        Args:
            together: Whether all processes that JAX knows train one model.
        """
        self.size = jax.process_count() if together else 1
        self.leads = self.size == 1 or jax.process_index() == 0

    def gather(self, numbers: Sequence[int]) -> np.ndarray:
        """The numbers of all processes, `(size, len(numbers))`."""
        own = np.asarray(numbers, np.int32)
        if self.size == 1:
            return own[None]
        return np.asarray(multihost_utils.process_allgather(own))

    def follow(self, *numbers: int) -> list[int]:
        """The numbers of the process that leads."""
        return [int(x) for x in self.gather(numbers)[0]]

    def check(self, error: BaseException | None) -> None:
        """Raises in all processes where one of them has failed.

        Args:
            error: What went wrong in this one, or None.

        Raises:
            RuntimeError: In the others, with the message of the first that failed.
        """
        if self.size > 1:
            texts = self._gather_text(_message(error))
        if error is not None:
            raise error
        for i, text in enumerate(texts if self.size > 1 else ()):
            if text:
                raise RuntimeError(
                    f"Expected all {self.size} processes to go on, got an error in "
                    f"process {i}: {text}"
                )

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns what JAX raises when a process is lost into what to do about it."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # Reading an array whose computation failed raises a ValueError.
            if self.size == 1 or not _STATUS.match(str(error)):
                raise
            raise ProcessLost(
                f"Expected {self.size} processes to compute together, got "
                f"{str(error).splitlines()[0]!r}: another process has probably ended. "
                "Start again with the same run_dir, on any number of devices; the run "
                "goes on from its last checkpoint."
            ) from error

    def _gather_text(self, text: str) -> list[str]:
        own = np.zeros(_LONGEST, np.uint8)
        content = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
        own[: len(content)] = content
        rows = np.asarray(multihost_utils.process_allgather(own))
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _message(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def whole(tree: Any) -> Any:
    """Arrays of which every process has only parts, gathered to all of them.

    Arrays that a process can read as they are stay as they are. Where one cannot, all
    processes have to call this. All are computed when it returns: programs of a CPU that
    run at the same time mix up their messages.
    """
    jax.block_until_ready(tree)

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            return x
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
