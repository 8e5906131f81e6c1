"""Libraries that are loaded when they are first needed."""

import importlib
from typing import Any


def load(module: str, extra: str | None = None) -> Any:
    """A library by name; importing trainax_pk does not wait for it.

    Args:
        module: Its dotted name.
        extra: The extra of this package that installs it, None for a core dependency.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = "trainax_pk" if extra is None else f"trainax_pk[{extra}]"
        raise ImportError(
            f"Expected {module} to be installed, which is needed here. Run "
            f"`pip install '{package}'`."
        ) from error
