"""Event files that TensorBoard reads."""

from pathlib import Path
from typing import Any

from trainax_pk._extras import load
from trainax_pk.tracker._base import AbstractTracker, flat_values


class TensorBoard(AbstractTracker):
    """Writes event files into a folder of the run, `tensorboard/` by default.

    Needs the extra `tensorboard`, which brings tensorboardX; to look at them,
    `tensorboard --logdir`.

    Attributes:
        name: Name of the folder in the run directory.

    Example:
        >>> from trainax_pk.tracker import TensorBoard
        >>> TensorBoard("events").name
        'events'
    """

    def __init__(self, name: str = "tensorboard") -> None:
        self.name = name
        self._writer: Any = None

    def open(self, run_dir: Path) -> None:
        """Begins a new event file beside those of earlier calls."""
        library = load("tensorboardX", "tensorboard")
        self._writer = library.SummaryWriter(str(run_dir / self.name))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers as scalars: "rollout['nrmse']" becomes `rollout/nrmse/0` and so on."""
        for tag, number in flat_values(values).items():
            self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
