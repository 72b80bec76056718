"""Errors that a user can act on: the message says what, the value, what is allowed, and what to do."""

from __future__ import annotations


class BsExpError(Exception):
    """The base of all errors with a cause outside the code; shown as one message, without a traceback."""


class ConfigError(BsExpError, ValueError):
    """A setting is out of range or does not fit the model."""


class ModelError(BsExpError):
    """A model cannot be loaded, or its matrices cannot be found."""


class DataError(BsExpError):
    """A text is missing, unreadable or too short."""


class CalibrationError(BsExpError):
    """Statistics cannot be used, for example because activations are NaN."""


class DecompositionError(BsExpError):
    """The weights or the Gram of a group cannot be factorised."""


class ContractError(BsExpError):
    """A strategy that does not keep what its protocol asks for: a slip in the code of a plug-in, not in a setting."""


class SaveError(BsExpError, OSError):
    """The compressed model cannot be written."""


class UploadError(BsExpError):
    """A saved model cannot be uploaded to the hub."""


class CacheError(BsExpError):
    """The cache folder cannot be written, or lacks what was just written."""


class EstimateError(BsExpError):
    """A run would not fit into memory, or onto the disk."""


class RecordError(BsExpError):
    """A run record, or another file of results, cannot be written or read."""


class SearchError(BsExpError):
    """A search cannot start or continue: its study is unusable or another search's, or too many trials failed."""


class LaunchError(BsExpError):
    """The job of a sweep's point ended without a result: it was cancelled, killed, or out of time."""


class TrackingError(BsExpError):
    """The tracking service failed; the run goes on without it."""
