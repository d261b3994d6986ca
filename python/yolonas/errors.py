"""Errors whose message is one sentence for the person at the keyboard: what is wrong, and what to do."""

from __future__ import annotations


class YolonasError(Exception):
    """An error that a command prints as `Error: <message>`, without a traceback."""


class CheckpointError(YolonasError):
    """A checkpoint that cannot be read, or does not fit what was asked of it."""


class DataError(YolonasError):
    """Images or labels that cannot be used."""


class WeightsError(YolonasError):
    """Published weights that cannot be had."""


class MissingPackageError(YolonasError, ModuleNotFoundError):
    """An optional package that is not installed; the message holds the line that installs it."""


class ExportError(YolonasError):
    """A model that cannot be exported as asked, or whose exported file does not give the model's results."""


class OptionError(YolonasError, ValueError):
    """An option that is not known, or does not go together with another or with the weights."""
