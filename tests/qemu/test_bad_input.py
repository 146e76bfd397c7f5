# SPDX-License-Identifier: MIT
"""What cannot work is refused in one sentence, with its exit code, and QEMU is as it was."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import qmpmirror
from qmpmirror import errors
from qmpmirror.testing import NbdServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmpmirror.testing import ImageTools, Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged

USAGE, NO_CONNECTION, REFUSED = 2, 3, 4


@attrs.frozen
class Refusals:
    """Asks for a copy that cannot be, of the library and of the command line."""

    layers: Layers
    connect: Connect
    cli: Cli
    unchanged: Unchanged

    async def expect(
        self,
        kind: type[errors.Error],
        sentence: str,
        vm: Qemu,
        disk: str = "vda",
        destination: Path | str = "",
        code: int = REFUSED,
        **options: Any,
    ) -> None:
        """Both must refuse: with this error, this exit code, and a sentence that matches."""
        destination = destination or self.layers.folder / "copy.img"
        with self.unchanged(vm, self.layers.folder):
            async with self.connect(vm) as machine:
                with pytest.raises(errors.Error) as caught:
                    await machine.blockcopy(disk, destination, **options)
            assert_is(caught.value, kind, sentence)
            words = [word for item in options.items() for word in as_words(*item)]
            run = self.cli("blockcopy", vm.qmp, disk, destination, "--pivot", *words)
        assert_said(run, sentence, code)


def assert_is(error: errors.Error, kind: type[errors.Error], sentence: str) -> None:
    assert type(error) is kind
    assert re.search(sentence, str(error)), str(error)
    assert "\n" not in str(error)


def assert_said(run: subprocess.CompletedProcess[str], sentence: str, code: int) -> None:
    """One line of error, and nothing else."""
    assert (run.returncode, run.stdout) == (code, ""), run.stderr
    assert re.fullmatch(rf"error: .*{sentence}.*\n", run.stderr), run.stderr


def as_words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if name == "bandwidth":
        return [option, str(value), "--bytes"]
    if isinstance(value, bool):
        return [option] if value else []
    return [option, str(value)]


@pytest.fixture
def refusals(layers: Layers, connect: Connect, cli: Cli, unchanged: Unchanged) -> Refusals:
    return Refusals(layers, connect, cli, unchanged)


@pytest.fixture
def vm(layers: Layers, boot: Boot) -> Qemu:
    """Its disks are vda, on ``snap2``, and an empty CD-ROM drive."""
    disk = f"if=virtio,id=drv0,format=qcow2,file={layers.snap2}"
    return boot("-drive", disk, "-device", "ide-cd,id=cd0")


@pytest.mark.parametrize("name", ["vdb", "nothing", "/no/such/image", "/machine/peripheral/dev9"])
async def test_unknown_disk(name: str, vm: Qemu, refusals: Refusals) -> None:
    there = rf"there is vda = drv0 = #block\d+ = {refusals.layers.snap2}; .*cd0 \(empty\)"
    sentence = f"disk '{name}' not found: {there}"
    await refusals.expect(errors.DiskNotFound, sentence, vm, name)


async def test_ambiguous_disk(layers: Layers, boot: Boot, refusals: Refusals) -> None:
    words = [
        word
        for number in (1, 2)
        for word in (
            *("-drive", f"if=none,id=drv{number},format=qcow2,read-only=on,file={layers.snap2}"),
            *("-device", f"virtio-blk-pci,drive=drv{number}"),
        )
    ]
    sentence = f"disk '{layers.snap2}' is ambiguous: vda = drv1 = .*; vdb = drv2 = "
    vm = boot(*words)
    await refusals.expect(errors.AmbiguousDisk, sentence, vm, str(layers.snap2))


@pytest.mark.parametrize("name", ["cd0", "hda"])
async def test_empty_drive(name: str, vm: Qemu, refusals: Refusals) -> None:
    await refusals.expect(errors.EmptyDrive, f"disk '{name}' has no medium", vm, name)


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
    elif subprocess.run(
        mount, stdin=subprocess.DEVNULL, capture_output=True, check=False
    ).returncode:
        yield type(folder)("/proc")
    else:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("via", ["blockdev-mirror", "drive-mirror"])
@pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
async def test_destination_in_a_read_only_folder(
    shallow: bool, via: str, vm: Qemu, read_only_folder: Path, refusals: Refusals
) -> None:
    destination = read_only_folder / "copy.qcow2"
    why = "Read-only file system|Permission denied|No such file or directory"
    await refusals.expect(
        errors.DestinationError,
        rf"{destination}.*({why})",
        vm,
        destination=destination,
        shallow=shallow,
        via=via,
    )


async def test_destination_in_a_missing_folder(vm: Qemu, refusals: Refusals) -> None:
    folder = refusals.layers.folder / "missing"
    sentence = f"{folder}/copy .*there is no folder {folder}"
    await refusals.expect(errors.DestinationError, sentence, vm, destination=folder / "copy")


async def test_destination_under_a_file(vm: Qemu, refusals: Refusals) -> None:
    destination = refusals.layers.base / "copy"
    sentence = f"{destination} .*Not a directory"
    await refusals.expect(errors.DestinationError, sentence, vm, destination=destination)


async def test_destination_is_a_folder(vm: Qemu, refusals: Refusals) -> None:
    folder = refusals.layers.folder
    await refusals.expect(errors.DestinationError, f"{folder} is a folder", vm, destination=folder)


async def test_destination_is_a_device(vm: Qemu, refusals: Refusals) -> None:
    sentence = "/dev/null is no regular file"
    await refusals.expect(errors.DestinationError, sentence, vm, destination="/dev/null")


async def test_destination_exists(vm: Qemu, refusals: Refusals) -> None:
    destination = refusals.layers.folder / "precious"
    destination.write_text("data")
    sentence = f"{destination} exists already and is not empty"
    await refusals.expect(errors.DestinationExists, sentence, vm, destination=destination)


@pytest.mark.parametrize("layer", ["snap2", "snap1", "base"])
@pytest.mark.parametrize("link", ["itself", "symlink", "hard-link", "other-spelling"])
async def test_destination_is_in_the_chain(
    link: str, layer: str, vm: Qemu, refusals: Refusals
) -> None:
    folder = refusals.layers.folder
    image: Path = getattr(refusals.layers, layer)
    destination: Path | str = folder / "link"
    if link == "itself":
        destination = image
    elif link == "symlink":
        (folder / "link").symlink_to(image.name)
    elif link == "hard-link":
        (folder / "link").hardlink_to(image)
    else:
        destination = f"{folder}/../{folder.name}//{image.name}"
    sentence = "is the source disk itself, or in its backing chain"
    await refusals.expect(errors.DestinationError, sentence, vm, destination=destination)


async def test_destination_is_locked_by_another_process(
    vm: Qemu, refusals: Refusals, tmp_path: Path, qemu_binary: str
) -> None:
    destination = refusals.layers.folder / "locked"
    destination.touch()
    with NbdServer(directory=tmp_path, image=destination, qemu=qemu_binary):
        sentence = f"{destination}.*Failed to get .* lock"
        await refusals.expect(errors.DestinationError, sentence, vm, destination=destination)


async def test_disk_with_a_copy_under_way(vm: Qemu, refusals: Refusals, connect: Connect) -> None:
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", refusals.layers.folder / "first.qcow2")
        await copy.ready()
    sentence = f"disk 'vda' already has a block job: {copy.id}"
    await refusals.expect(errors.DiskBusy, sentence, vm)


async def test_disk_with_a_job_of_somebody_else(
    vm: Qemu, refusals: Refusals, images: ImageTools, connect: Connect
) -> None:
    theirs = images.create(refusals.layers.folder / "theirs.raw", "8M", "raw")
    vm.execute("blockdev-add", driver="file", node_name="theirs", filename=str(theirs))
    vm.execute("blockdev-mirror", job_id="their-job", device="drv0", target="theirs", sync="full")
    async with connect(vm) as machine:
        while not (await machine.jobs())[0].ready:
            pass
    await refusals.expect(errors.DiskBusy, "disk 'vda' already has a block job: their-job", vm)


@pytest.mark.parametrize("name", ["qcow3", "file", "nbd", "QCOW2", "raw,size=1"])
async def test_unknown_format(name: str, vm: Qemu, refusals: Refusals) -> None:
    sentence = f"format '{name}' cannot be created by this QEMU: it offers .*qcow2.*raw"
    await refusals.expect(errors.Unsupported, sentence, vm, format=name)


async def test_shallow_into_a_format_without_backing(vm: Qemu, refusals: Refusals) -> None:
    sentence = "shallow copy of disk 'vda' into a raw file is not possible"
    await refusals.expect(errors.Refused, sentence, vm, shallow=True, format="raw")


@pytest.mark.parametrize("value", [-1, 2**63, 10**30])
async def test_bandwidth_out_of_range(value: int, vm: Qemu, refusals: Refusals) -> None:
    sentence = rf"bandwidth '?{value}'?.* is out of range"
    await refusals.expect(errors.UsageError, sentence, vm, bandwidth=value, code=USAGE)


@pytest.mark.parametrize("value", ["fast", "1.5", "10X", "9E"])
def test_bandwidth_that_is_none(value: str, vm: Qemu, layers: Layers, cli: Cli) -> None:
    run = cli("blockcopy", vm.qmp, "vda", layers.folder / "copy", "--bandwidth", value)
    assert_said(run, f"bandwidth '{value}' is (no number|out of range)", USAGE)


@pytest.mark.parametrize("value", [-512, 1, 256, 1000, 65537, 128 << 20])
async def test_granularity_that_is_none(value: int, vm: Qemu, refusals: Refusals) -> None:
    sentence = f"granularity '?{value}'? .*power of two"
    await refusals.expect(errors.UsageError, sentence, vm, granularity=value, code=USAGE)


@attrs.frozen
class Unreachable:
    """Asks for a connection that cannot be had."""

    cli: Cli

    async def expect(self, kind: type[errors.Error], sentence: str, domain: Path | str) -> None:
        """Library and command line must both refuse, with a sentence that matches."""
        with pytest.raises(errors.Error) as caught:
            await qmpmirror.connect(str(domain), timeout=0.5)
        assert_is(caught.value, kind, sentence)
        run = self.cli("domblklist", domain, "--connect-timeout", "0.5")
        assert_said(run, sentence, NO_CONNECTION)


@pytest.fixture
def unreachable(cli: Cli) -> Unreachable:
    return Unreachable(cli)


async def test_no_such_socket(tmp_path: Path, unreachable: Unreachable) -> None:
    path = tmp_path / "socket"
    sentence = f"{path}: No such file or directory"
    await unreachable.expect(errors.NoSuchMonitor, sentence, path)


async def test_path_that_is_no_socket(tmp_path: Path, unreachable: Unreachable) -> None:
    sentence = f"{tmp_path} is not a socket"
    await unreachable.expect(errors.NoSuchMonitor, sentence, tmp_path)


async def test_socket_with_nobody_behind_it(tmp_path: Path, unreachable: Unreachable) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        bound.listen()
    sentence = f"nobody listens on {path}: Connection refused"
    await unreachable.expect(errors.NotListening, sentence, path)


async def test_port_with_nobody_behind_it(unreachable: Unreachable) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        sentence = f"nobody listens on {address}: "
        await unreachable.expect(errors.NotListening, sentence, address)


async def test_monitor_taken_by_another_client(
    vm: Qemu, layers: Layers, unchanged: Unchanged, unreachable: Unreachable
) -> None:
    with socket.socket(socket.AF_UNIX) as other, unchanged(vm, layers.folder):
        other.connect(str(vm.qmp))
        other.recv(65536)
        sentence = f"{vm.qmp} within 0.5 s: another client holds this monitor"
        await unreachable.expect(errors.MonitorBusy, sentence, vm.qmp)


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH\r\n", b"{}\n", b'["QMP"]\n', b"\xff\xfe\n", b"\n"]
)
async def test_server_that_does_not_speak_qmp(
    said: bytes, tmp_path: Path, unreachable: Unreachable
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(said)
                    connection.recv(65536)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        await unreachable.expect(errors.NotQMP, f"{path} does not speak QMP", path)


async def test_server_that_says_nothing(tmp_path: Path, unreachable: Unreachable) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        await unreachable.expect(errors.MonitorBusy, f"no QMP greeting from {path}", path)


async def test_human_monitor(
    layers: Layers, tmp_path: Path, boot: Boot, unchanged: Unchanged, unreachable: Unreachable
) -> None:
    path = tmp_path / "hmp"
    disk = f"if=virtio,format=qcow2,file={layers.snap2}"
    vm = boot("-drive", disk, "-monitor", f"unix:{path},server=on,wait=off")
    with unchanged(vm, layers.folder):
        await unreachable.expect(errors.NotQMP, f"{path} does not speak QMP", path)


async def test_two_qemus_of_one_name(boot: Boot, unreachable: Unreachable) -> None:
    one = boot(machine="none")
    other = boot(machine="none", name=one.name)
    candidates = (
        rf"{one.name} \(pid {one.pid}, {one.qmp}.*{one.name} \(pid {other.pid}, {other.qmp}"
    )
    sentence = f"2 QEMUs are named '{one.name}': {candidates}"
    await unreachable.expect(errors.AmbiguousDomain, sentence, str(one.name))


async def test_name_that_no_qemu_has(unreachable: Unreachable) -> None:
    name = f"nobody-{os.getpid()}"
    await unreachable.expect(errors.NoSuchMonitor, f"no QEMU named '{name}' runs here", name)


async def test_pid_that_is_no_qemu(unreachable: Unreachable) -> None:
    pid = str(os.getpid())
    await unreachable.expect(errors.NoSuchMonitor, f"no QEMU runs here as process {pid}", pid)
