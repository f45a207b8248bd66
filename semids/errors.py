"""The exceptions that a caller may catch, each with the exit code of sysexits(3) the command line ends with."""

from __future__ import annotations


class SemidsError(Exception):
    """Base of every error that semids raises on purpose. Never retried: the same input fails again."""

    exit_code = 70


class UsageError(SemidsError):
    """The configuration or the command line asks for something impossible."""

    exit_code = 64


class DataError(SemidsError):
    """An input, or a file that semids wrote earlier, does not hold what it must."""

    exit_code = 65


class ShapeError(DataError):
    """An array has the wrong number of dimensions, rows, columns or the wrong type of numbers."""


class CodesError(DataError):
    """Codes lie outside their codebooks."""


class CorruptionError(DataError):
    """A committed file differs from the digest that was recorded when it was written."""


class StorageError(SemidsError):
    """The file system refused a read or a write. Retried: what was finished is kept."""

    exit_code = 74


class ProcessError(SemidsError):
    """A process that a step was shared with died. Retried: what it had saved is kept."""

    exit_code = 71


class BusyError(SemidsError):
    """Another process owns the run folder."""

    exit_code = 75
