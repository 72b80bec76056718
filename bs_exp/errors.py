"""Errors that a user can act on: the message says what, the value, what is allowed, and what to do."""

from __future__ import annotations


class BsExpError(Exception):
    """Anything that stops a run for a reason outside the code; shown as one message, without a traceback."""


class ConfigError(BsExpError, ValueError):
    """A setting that is out of range or does not fit the model."""


class ModelError(BsExpError):
    """A model that cannot be loaded, or whose matrices cannot be found."""


class DataError(BsExpError):
    """Text that is missing, unreadable or too short."""


class CalibrationError(BsExpError):
    """Statistics that cannot be used, such as NaN activations."""


class DecompositionError(BsExpError):
    """A group whose weights or Gram cannot be factorised."""


class SaveError(BsExpError, OSError):
    """The compressed model cannot be written."""


class CacheError(BsExpError):
    """The cache folder cannot be written."""


class RecordError(BsExpError):
    """A run record that cannot be written or read."""


class SearchError(BsExpError):
    """A search that cannot begin or go on: its study is elsewhere, another one's, or too many trials failed."""


class LaunchError(BsExpError):
    """A point of a sweep whose job ended without a result: cancelled, killed, or out of time."""


class TrackingError(BsExpError):
    """The tracking service refuses; the run goes on without it."""
