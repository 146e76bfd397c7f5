# SPDX-License-Identifier: MIT
"""Fixtures that connect the library to a QEMU under test; a part of the pytest plugin."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from qmpmirror import sync
    from qmpmirror.machine import _Connecting
    from qmpmirror.testing.launcher import MonitoredProcess

_COPYING = {"bandwidth": 1, "buf_size": 64 * 1024}
"""Holds a copy in the copying phase: QEMU moves 64 KiB, and then a byte per second."""


class QmpConnect(Protocol):
    """The ``qmp_connect`` fixture: `qmpmirror.connect` to a QEMU of the ``qemu`` fixture.

    With ``--qmp-transcript=DIR`` each connection writes a transcript of its own.
    """

    def __call__(self, vm: MonitoredProcess, **options: Any) -> _Connecting:
        """Connect; to be awaited, or entered with ``async with``."""
        ...


class PinnedCopy(Protocol):
    """The ``pinned_copy`` fixture: a copy that stays in one phase while a test looks at it."""

    def __call__(
        self,
        vm: MonitoredProcess,
        disk: str,
        destination: str | os.PathLike[str],
        *,
        phase: str = "copying",
        **options: Any,
    ) -> AbstractContextManager[sync.Copy]:
        """Start a copy and hold it; on leaving, it is aborted unless the test has ended it.

        Args:
            vm: the QEMU; its first QMP socket is taken meanwhile.
            disk: anything that identifies the disk.
            destination: where the copy goes.
            phase: ``copying`` or ``mirroring``.
            options: those of `qmpmirror.Machine.blockcopy`.
        """
        ...


@pytest.fixture
def qmp_transcript(request: pytest.FixtureRequest) -> Callable[[], str | None]:
    """Names of files for transcripts, one for each call; None without ``--qmp-transcript``."""
    folder = request.config.getoption("--qmp-transcript")
    name = re.sub(r"[^\w.-]+", "-", request.node.nodeid).strip("-")
    numbers = itertools.count(1)

    def make() -> str | None:
        if folder is None:
            return None
        Path(folder).mkdir(parents=True, exist_ok=True)
        return str(Path(folder) / f"{name}-{next(numbers)}.jsonl")

    return make


@pytest.fixture
def qmp_connect(qmp_transcript: Callable[[], str | None]) -> QmpConnect:
    """Connect the library to a QEMU (see `QmpConnect`)."""
    from qmpmirror.machine import connect  # noqa: PLC0415 - only when it is used

    def to(vm: MonitoredProcess, **options: Any) -> _Connecting:
        return connect(str(vm.qmp), **{"transcript": qmp_transcript(), **options})

    return to


@pytest.fixture
def pinned_copy(qmp_transcript: Callable[[], str | None]) -> PinnedCopy:
    """Hold a copy in the copying or in the mirroring phase (see `PinnedCopy`)."""
    from qmpmirror import sync  # noqa: PLC0415 - only when it is used

    @contextlib.contextmanager
    def hold(
        vm: MonitoredProcess,
        disk: str,
        destination: str | os.PathLike[str],
        *,
        phase: str = "copying",
        **options: Any,
    ) -> Iterator[sync.Copy]:
        if phase not in {"copying", "mirroring"}:
            raise ValueError(f"a copy is held in copying or in mirroring, not in {phase!r}")
        pin = _COPYING if phase == "copying" else {}
        with sync.connect(str(vm.qmp), transcript=qmp_transcript()) as machine:
            copy = machine.blockcopy(disk, destination, **{**pin, **options})
            try:
                if phase == "mirroring":
                    copy.ready()
                yield copy
            finally:
                if vm.running and copy.result is None and not copy.phase.over:
                    copy.abort(force=True)

    return hold
