"""Libraries of the extra `amortized`, loaded when they are first needed."""

import importlib
from typing import Any


def load(module: str) -> Any:
    """A library by name; importing trainax_pk does not wait for it.

    Args:
        module: Its dotted name.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Expected {module} to be installed, which is needed here. Run "
            "`pip install 'trainax_pk[amortized]'`."
        ) from error
