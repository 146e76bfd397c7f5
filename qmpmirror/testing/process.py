# SPDX-License-Identifier: MIT
"""A process that serves on unix sockets: started, waited for, and always reaped."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import tempfile
import time
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

SUN_PATH_MAX = 107
"""Longest path of a unix socket on Linux, in bytes (``sun_path`` less its NUL)."""

_POLL = 0.01
_serial_numbers = itertools.count(1)


class LaunchError(Exception):
    """A process did not come up.

    Attributes:
        command_line: What was started.
        returncode: Its exit status, or None when it runs but does not answer.
        stderr: The last lines it wrote there.
    """

    def __init__(self, command_line: list[str], returncode: int | None, stderr: str) -> None:
        self.command_line = command_line
        self.returncode = returncode
        self.stderr = stderr
        what = "does not answer" if returncode is None else f"exited with status {returncode}"
        super().__init__(f"{Path(command_line[0]).name} {what}: {stderr.strip() or '(no output)'}")


def fits_socket(path: Path) -> bool:
    """Whether a unix socket can have this path."""
    return len(bytes(path)) <= SUN_PATH_MAX


def sibling(binary: str | Path, tool: str) -> str:
    """Path of the ``tool`` that was installed together with ``binary``.

    Several QEMU versions live side by side, each with a ``bin`` directory of its own, and an image
    should be made by the qemu-img of the QEMU that opens it. Falls back to ``PATH``.

    Args:
        binary: A QEMU binary: a path, or a name on ``PATH``.
        tool: For example ``qemu-img``.

    Raises:
        FileNotFoundError: Neither beside the binary nor on ``PATH``.
    """
    found = shutil.which(binary)
    beside = shutil.which(tool, path=str(Path(found).absolute().parent)) if found else None
    path = beside or shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} is neither beside {binary} nor on PATH")
    return path


@attrs.define(kw_only=True, eq=False)
class Process:
    """What the launchers have in common: one process, its output files and its sockets.

    As a context manager it starts on entry and stops on exit. After `stop` it may be started again.

    Attributes:
        directory: Where output files and sockets go. Sockets go to a directory of their own under
            ``/tmp`` when this one is too long for a unix socket.
        start_timeout: Seconds until a process that does not answer counts as failed.
        stop_timeout: Seconds between SIGTERM and SIGKILL in `stop`.
        after_start: Called with the process each time it has started and serves.
    """

    directory: Path = attrs.field(converter=Path)
    start_timeout: float = 30.0
    stop_timeout: float = 10.0
    after_start: Callable[[Any], object] | None = attrs.field(default=None, repr=False)
    label: str = attrs.field(init=False)
    _process: subprocess.Popen[bytes] | None = attrs.field(init=False, default=None)
    _socket_directory: Path | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.directory = self.directory.absolute()
        self.label = f"{type(self).__name__.lower()}-{next(_serial_numbers)}"

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the freshly started process is ready to serve."""

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not exited."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id, also after the exit.

        Raises:
            RuntimeError: Never started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.label} was not started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def stdout(self) -> str:
        """All that the process has written to its standard output."""
        return self._output("stdout")

    @property
    def stderr(self) -> str:
        """All that the process has written to its standard error."""
        return self._output("stderr")

    def tail(self, lines: int = 20) -> str:
        """The last lines of standard error."""
        return "\n".join(self.stderr.splitlines()[-lines:])

    def start(self) -> Self:
        """Start the process in a session of its own and wait until it serves.

        Returns:
            The process itself, so that ``vm = Qemu(...).start()`` reads well.

        Raises:
            RuntimeError: It runs already.
            LaunchError: It exited, or did not answer within ``start_timeout``; it is gone then.
        """
        if self.running:
            raise RuntimeError(f"{self.label} runs already (pid {self.pid})")
        self.directory.mkdir(parents=True, exist_ok=True)
        command_line = self.command_line
        with self._path("stdout").open("ab") as stdout, self._path("stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                command_line,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            self._wait_for_answer()
            if self.after_start is not None:
                self.after_start(self)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Ask the process to end (SIGTERM), kill it if it does not, and reap it. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self.stop_timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._remove_socket_directory()

    def kill(self) -> None:
        """Kill the process (SIGKILL) as a host crash would, and reap it. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._remove_socket_directory()

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            # Looked at first: what a process that dies meanwhile has answered does not count.
            answers = self._answers()
            if not self.running:
                raise LaunchError(self.command_line, self.returncode, self.tail())
            if answers:
                return
            if time.monotonic() > deadline:
                raise LaunchError(self.command_line, None, self.tail())
            time.sleep(_POLL)

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.label}.{suffix}"

    def _output(self, suffix: str) -> str:
        try:
            return self._path(suffix).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _socket(self, suffix: str) -> Path:
        """Path of one of this process's sockets, short enough to be bound."""
        path = self._path(suffix)
        if fits_socket(path):
            return path
        if self._socket_directory is None:
            # Not $TMPDIR, which may be the very thing that is too long.
            self._socket_directory = Path(tempfile.mkdtemp(prefix="qmpmirror-", dir="/tmp"))
        return self._socket_directory / path.name

    def _remove_socket_directory(self) -> None:
        if self._socket_directory is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._socket_directory)
            self._socket_directory = None
