# SPDX-License-Identifier: MIT
"""Start real QEMUs, storage daemons and NBD servers for tests, and talk to them blockingly."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror.testing import oneshot
from qmpmirror.testing.images import ImageTools, check_io
from qmpmirror.testing.process import Process, sibling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Version = tuple[int, int, int]


@cache
def version_of(binary: str | Path) -> Version:
    """The version of a QEMU program, read once from its ``--version``.

    Args:
        binary: A path, or a name on ``PATH``.

    Raises:
        OSError: It cannot be executed.
        ValueError: It does not answer like QEMU.
    """
    run = subprocess.run(
        [str(binary), "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", run.stdout)
    if match is None:
        said = (run.stdout + run.stderr).strip()
        raise ValueError(f"{binary} --version does not answer like QEMU: {said or '(no output)'}")
    major, minor, micro = map(int, match.groups())
    return major, minor, micro


def _strings(arguments: Sequence[str | Path]) -> tuple[str, ...]:
    if isinstance(arguments, str):
        raise TypeError("arguments is a list of strings, not one string")
    return tuple(map(str, arguments))


@attrs.define(kw_only=True, eq=False)
class MonitoredProcess(Process):
    """A process with QMP sockets: some for the code under test, one more for the harness.

    A QMP socket serves one client at a time, so the harness has its own.

    Attributes:
        arguments: Further arguments, after those that the launcher gives.
        qmp_sockets: How many QMP sockets there are for the code under test.
        command_timeout: Seconds that `execute` waits for each answer.
    """

    arguments: tuple[str, ...] = attrs.field(converter=_strings, default=())
    qmp_sockets: int = 1
    command_timeout: float = 30.0
    _patience: float = attrs.field(init=False, default=1.0)

    @property
    def sockets(self) -> list[Path]:
        """The QMP sockets for the code under test."""
        return [self._socket(f"qmp{number}") for number in range(self.qmp_sockets)]

    @property
    def qmp(self) -> Path:
        """The first QMP socket."""
        return self.sockets[0]

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, /, **keywords: Any
    ) -> Any:
        """Execute one QMP command on the harness's own socket.

        Args:
            command: Name of the command.
            arguments: Arguments that are sent as they are.
            keywords: Arguments whose underscores become dashes: ``node_name="a"``.

        Returns:
            What QEMU returned.

        Raises:
            CommandError: QEMU refused.
            ConnectionError: QEMU does not run, or died of the command.
            TimeoutError: QEMU did not answer within ``command_timeout``.
        """
        dashed = {name.replace("_", "-"): value for name, value in keywords.items()}
        return oneshot.execute(
            self._harness, command, {**(arguments or {}), **dashed}, timeout=self.command_timeout
        )

    @property
    def _harness(self) -> Path:
        return self._socket("harness")

    def _answers(self) -> bool:
        # It is bound last, and a complete answer needs QEMU's main loop: then all is set up.
        try:
            oneshot.execute(self._harness, "query-version", {}, timeout=self._patience)
        except TimeoutError:
            # QEMU 5.2 and 7.2 may block in accept() if a client comes early, until the next comes.
            self._patience *= 2
            return False
        except (ConnectionError, FileNotFoundError, BlockingIOError):
            return False
        return True


@attrs.define(kw_only=True, eq=False)
class Qemu(MonitoredProcess):
    """A QEMU system emulator.

    ::

        with Qemu(directory=tmp_path, arguments=["-blockdev", ...]) as vm:
            vm.execute("query-named-block-nodes")

    Attributes:
        binary: A path, or a name on ``PATH``.
        name: For ``-name``, or None to give none.
        machine: For ``-machine``. ``none`` has nodes and jobs, but no bus for a disk: a
            guest device needs ``pc`` or the like.
        accelerator: For ``-accel``, or None to give none.
        defaults: Whether QEMU adds its default devices.
        display: For ``-display``, or None to give none.
    """

    binary: str = attrs.field(converter=str, default="qemu-system-x86_64")
    name: str | None = "testvm"
    machine: str = "none"
    accelerator: str | None = "tcg"
    defaults: bool = False
    display: str | None = "none"

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        words = [self.binary, "-machine", self.machine]
        for option, value in (
            ("-name", self.name),
            ("-accel", self.accelerator),
            ("-display", self.display),
        ):
            words += [option, value] if value is not None else []
        words += [] if self.defaults else ["-nodefaults"]
        words += self.arguments
        for path in (*self.sockets, self._harness):
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        return words

    @property
    def version(self) -> Version:
        """The version of the binary."""
        return version_of(self.binary)

    @property
    def images(self) -> ImageTools:
        """The image tools of the same version."""
        return ImageTools(qemu=self.binary)

    def hmp(self, line: str) -> str:
        """Execute one line of the human monitor (``human-monitor-command``).

        Returns:
            What the monitor printed. A refusal is a text that begins with ``Error:``.
        """
        text: str = self.execute("human-monitor-command", command_line=line)
        return text.replace("\r\n", "\n")

    def io(self, device: str, command: str) -> str:
        """Do guest I/O without a guest: a ``qemu-io`` command on a device, drive or node.

        On a device the request takes the path of the guest's own: through its throttling and the
        filters above the image. On a node name it does not. Sizes and offsets are qemu-io's::

            vm.io("vd0", "write -P 0x11 0 64k")
            vm.io("vd0", "read -P 0x11 0 64k")

        Args:
            device: A qdev id, QOM path, ``-drive`` id or node name.
            command: A qemu-io command.

        Returns:
            What qemu-io printed. An ``aio_`` command ends later: its outcome is not seen here.

        Raises:
            AssertionError: ``read -P`` found another pattern.
            ImageError: The command failed.
        """
        quoted = command.replace("\\", "\\\\").replace('"', '\\"')
        said = ""
        for target in (
            f"-d {device}",
            # Some devices are only a shell around the one that owns the disk.
            f"-d /machine/peripheral/{device}/virtio-backend",
            device,
        ):
            before = len(self.stdout), len(self.stderr)
            said = self.hmp(f'qemu-io {target} "{quoted}"')
            if not re.search(r"not found|does not have a block device backend", said):
                # What qemu-io prints inside of QEMU goes to QEMU's own output.
                said += self.stdout[before[0] :] + self.stderr[before[1] :]
                break
        return check_io(command, said)


@attrs.define(kw_only=True, eq=False)
class StorageDaemon(MonitoredProcess):
    """A ``qemu-storage-daemon``: QEMU's block layer without a guest.

    Attributes:
        binary: A path, or a name on ``PATH``.
    """

    binary: str = attrs.field(converter=str, default="qemu-storage-daemon")

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        words = [self.binary, *self.arguments]
        for number, path in enumerate((*self.sockets, self._harness)):
            words += ["--chardev", f"socket,id=qmp{number},path={path},server=on,wait=off"]
            words += ["--monitor", f"chardev=qmp{number}"]
        return words

    @property
    def version(self) -> Version:
        """The version of the binary."""
        return version_of(self.binary)

    @property
    def images(self) -> ImageTools:
        """The image tools of the same version."""
        return ImageTools(qemu=self.binary)


@attrs.define(kw_only=True, eq=False)
class NbdServer(Process):
    """A ``qemu-nbd`` that exports an image on a unix socket, to any number of clients in turn.

    Attributes:
        image: The image.
        fmt: Its format.
        export: Name of the export; the empty name is NBD's default export.
        qemu: The QEMU whose ``qemu-nbd`` is used.
        arguments: Further arguments of qemu-nbd.
    """

    image: str = attrs.field(converter=str)
    fmt: str = "raw"
    export: str = ""
    qemu: str = attrs.field(converter=str, default="qemu-system-x86_64")
    arguments: tuple[str, ...] = attrs.field(converter=_strings, default=())

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        return [
            sibling(self.qemu, "qemu-nbd"),
            "--persistent",
            f"--format={self.fmt}",
            f"--export-name={self.export}",
            f"--socket={self.socket}",
            f"--pid-file={self._path('pid')}",
            *self.arguments,
            self.image,
        ]

    @property
    def socket(self) -> Path:
        """The socket it listens on."""
        return self._socket("nbd")

    @property
    def uri(self) -> str:
        """The export as an NBD URI."""
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def _answers(self) -> bool:
        # Written once it listens: to ask the socket itself would use up a client.
        try:
            return self._path("pid").read_text().strip() == str(self.pid)
        except FileNotFoundError:
            return False
