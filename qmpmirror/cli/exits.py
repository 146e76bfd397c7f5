# SPDX-License-Identifier: MIT
"""What the exit codes mean."""

from __future__ import annotations

import enum

from qmpmirror import errors


class Exit(enum.IntEnum):
    """The exit code of a command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NO_CONNECTION = 3
    REFUSED = 4
    DEADLINE = 5
    LOST = 6
    NOT_CLEAN = 7


_CODES = (
    (errors.UsageError, Exit.USAGE),
    (errors.ConnectError, Exit.NO_CONNECTION),
    (errors.ConnectionLost, Exit.LOST),
    (errors.DeadlineExceeded, Exit.DEADLINE),
    (errors.Refused, Exit.REFUSED),
    (errors.NotReady, Exit.REFUSED),
    (errors.EndingAlreadyAsked, Exit.REFUSED),
    (errors.JobNotFound, Exit.REFUSED),
    (errors.Error, Exit.FAILED),
)


def exit_code(error: errors.Error) -> Exit:
    """The exit code for an error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))
