"""Every error this package raises on purpose.

    TinyAlignError            the base: catch this one
    ├── InputError            what the caller gave is wrong: a path, a file, a row, an option (exit code 2)
    │   └── UnsupportedError  well-formed, but of a kind this version does not handle (exit code 2)
    ├── BundleError           a bundle, checkpoint or memory bank is damaged, hostile or too new (exit code 2)
    ├── GateError             the exported files do not compute what torch computes (exit code 3)
    └── MissingExtraError     a command needs packages of an extra that is not installed (exit code 1)

A message is one line: what is wrong, the value, the remedy. `DegradedWarning` is the only warning.
"""

from __future__ import annotations


class TinyAlignError(Exception):
    """Base class of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(TinyAlignError):
    """An argument, file or row given by the caller is wrong."""

    exit_code = 2


class UnsupportedError(InputError):
    """A well-formed input of a kind this version does not handle; the message lists what it does handle."""


class BundleError(TinyAlignError):
    """A bundle, checkpoint or memory bank is damaged, hostile, or written by a newer version."""

    exit_code = 2


class GateError(TinyAlignError):
    """The quantised files failed the comparison with torch; nothing was written."""

    exit_code = 3


class MissingExtraError(TinyAlignError):
    """A command needs an extra that is not installed."""


class DegradedWarning(UserWarning):
    """The bundle that was loaded failed the comparison with torch; it was written all the same, as was asked."""


def first_line(error: BaseException) -> str:
    """The first line of what another library says, or the error's kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
