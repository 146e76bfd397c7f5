# SPDX-License-Identifier: MIT
"""What a person or a program gets to see."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qmpmirror.life import Phase
    from qmpmirror.operations.handle import Progress
    from qmpmirror.operations.migration import MigrationProgress

_PLAIN_SECONDS: Final = 10.0
_STEP: Final = 1024
_MINUTE: Final = 60


class Output:
    """Messages on stdout, progress and errors on stderr; with ``--json`` one object per line.

    Args:
        as_json: whether stdout carries JSON only.
        label: what the progress line is about, in virsh's words.
    """

    def __init__(self, *, as_json: bool, label: str = "") -> None:
        self.as_json = as_json
        self._label = label
        self._line_open = False
        self._plain_next = 0.0
        self._plain_phase: Phase | str | None = None

    def say(self, message: str) -> None:
        """A message of virsh's, on stdout."""
        self.end_line()
        if not self.as_json:
            _write(message + "\n", sys.stdout)

    def note(self, message: str) -> None:
        """Something beyond virsh, on stderr."""
        self.end_line()
        if not self.as_json:
            _write(message + "\n", sys.stderr)

    def error(self, message: str) -> None:
        """An error, on stderr."""
        self.end_line()
        if not self.as_json:
            _write(f"error: {message}\n", sys.stderr)

    def left(self, entries: Iterable[str]) -> None:
        """What could not be cleaned up, on stderr."""
        for entry in entries:
            self.error(f"could not be cleaned up: {entry}")

    def event(self, event: str, **fields: Any) -> None:
        """An object for programs, on stdout."""
        if self.as_json:
            _write(json.dumps({"event": event, **fields}) + "\n", sys.stdout)

    def progress(self, progress: Progress | MigrationProgress) -> None:
        """One line that is drawn over again on a terminal; plain lines now and then elsewhere."""
        if self.as_json:
            return
        line = f"{self._label}: [{progress.percent:5.2f} %]{_details(progress)}"
        if sys.stderr.isatty():
            _write(f"\r{line}\x1b[K", sys.stderr)
            self._line_open = True
        elif time.monotonic() >= self._plain_next or progress.phase != self._plain_phase:
            _write(line + "\n", sys.stderr)
            self._plain_next = time.monotonic() + _PLAIN_SECONDS
            self._plain_phase = progress.phase

    def end_line(self) -> None:
        """Leave the progress line behind."""
        if self._line_open:
            _write("\n", sys.stderr)
            self._line_open = False


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as virsh draws it."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_row(header, widths), "-" * sum(width + 3 for width in widths)]
    lines.extend(_row(row, widths) for row in rows)
    return "\n".join(lines)


def human_size(number: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        shown = f"{number:.0f}" if unit == "B" else f"{number:.1f}"
        if float(shown) < _STEP:
            return f"{shown} {unit}"
        number /= _STEP
    return f"{number:.1f} TiB"


def _write(text: str, stream: TextIO) -> None:
    """Write at once. That nobody reads any more must not keep a copy from its end."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f" {cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
    return "".join(padded).rstrip()


def _details(progress: Progress | MigrationProgress) -> str:
    if progress.io_status != "ok":
        return f" stopped by an I/O error ({progress.io_status}); blockjob --resume lets it go on"
    if not progress.length:
        return ""
    details = f" {human_size(progress.offset)} of {human_size(progress.length)}"
    if progress.rate:
        details += f", {human_size(progress.rate)}/s"
    if progress.eta:
        minutes, seconds = divmod(round(progress.eta), _MINUTE)
        details += f", {minutes}:{seconds:02} left"
    return details
