"""The one hierarchy of errors. Each message says what was got, what was needed, and what to do."""

from __future__ import annotations

__all__ = [
    "AutocompressError",
    "BudgetError",
    "CalibrationError",
    "InfeasibleError",
    "LayerError",
    "MismatchError",
    "OptionError",
    "StoreError",
    "TaskError",
]


class AutocompressError(Exception):
    """Anything that this project refuses on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 2


class TaskError(AutocompressError):
    """A task file is missing, cannot be imported, or lacks something that the command needs."""


class CalibrationError(AutocompressError):
    """Calibration data is empty, does not fit the model, or makes it produce values that are not finite."""


class LayerError(AutocompressError):
    """A layer cannot be compressed as asked, or a model has none that can."""


class OptionError(AutocompressError, ValueError):
    """An option name that is not one, or that nothing here can realise."""


class BudgetError(AutocompressError, ValueError):
    """A budget that is not one: unreadable text, zero, negative, not finite."""


class InfeasibleError(AutocompressError):
    """No choice fits the budget; `smallest_bytes` is the least size of the file that would do, with the other limits as
    they are.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class MismatchError(AutocompressError):
    """Two things that must belong together do not; the message names the field that differs."""


class StoreError(AutocompressError):
    """A profile store cannot be used: damaged, locked by another process, or not writable."""
