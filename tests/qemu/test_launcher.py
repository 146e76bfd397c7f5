# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from qmpmirror.testing import CommandError, ImageError, LaunchError, NbdServer, StorageDaemon
from qmpmirror.testing.process import SUN_PATH_MAX, sibling

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import ImageTools
    from qmpmirror.testing.plugin import QemuFactory


def disk(path: Path, device: str = "virtio-blk-pci") -> list[str]:
    return [
        "-S",
        "-blockdev",
        f"qcow2,node-name=fmt0,file.driver=file,file.filename={path}",
        "-device",
        f"{device},drive=fmt0,id=vd0",
    ]


def greeting(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        return connection.recv(65536)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_started_qemu_serves_on_the_socket_of_the_code_under_test(qemu: QemuFactory) -> None:
    vm = qemu().start()
    assert b'"QMP"' in greeting(vm.qmp)
    assert not is_gone(vm.pid)
    assert os.getsid(vm.pid) == vm.pid


def test_harness_can_execute_while_the_code_under_test_is_connected(qemu: QemuFactory) -> None:
    vm = qemu(qmp_sockets=2).start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(vm.qmp))
        connection.recv(65536)
        version = vm.execute("query-version")["qemu"]
        assert (version["major"], version["minor"], version["micro"]) == vm.version
    assert len({*vm.sockets}) == 2


def test_execute_turns_underscores_of_keywords_only_into_dashes(qemu: QemuFactory) -> None:
    vm = qemu().start()
    vm.execute("blockdev-add", driver="null-co", node_name="a", read_zeroes=True)
    assert [node["node-name"] for node in vm.execute("query-named-block-nodes")] == ["a"]
    with pytest.raises(CommandError, match="node_name") as caught:
        vm.execute("blockdev-add", {"driver": "null-co", "node_name": "b"})
    assert (caught.value.command, caught.value.error_class) == ("blockdev-add", "GenericError")


def test_stop_ends_and_reaps_and_may_be_repeated(qemu: QemuFactory) -> None:
    vm = qemu().start()
    vm.stop()
    assert is_gone(vm.pid)
    assert vm.returncode == 0
    vm.stop()


def test_stop_kills_a_qemu_that_ignores_sigterm(qemu: QemuFactory) -> None:
    vm = qemu(stop_timeout=0.2).start()
    os.kill(vm.pid, signal.SIGSTOP)
    vm.stop()
    assert vm.returncode == -signal.SIGKILL


def test_kill_reaps(qemu: QemuFactory) -> None:
    vm = qemu().start()
    vm.kill()
    assert is_gone(vm.pid)
    with pytest.raises(ConnectionError):
        vm.execute("query-status")


def test_qemu_that_dies_at_the_start_says_why(qemu: QemuFactory) -> None:
    vm = qemu("-device", "no-such-device")
    with pytest.raises(LaunchError, match=r"exited with status 1: .*no-such-device") as caught:
        vm.start()
    assert caught.value.returncode == 1
    assert not vm.running


def test_context_manager_starts_and_stops_and_a_stopped_qemu_starts_again(
    qemu: QemuFactory,
) -> None:
    vm = qemu()
    with vm:
        first = vm.pid
    assert is_gone(first)
    with vm.start():
        assert vm.pid != first
        assert vm.execute("query-status")["status"] in {"running", "prelaunch"}
        with pytest.raises(RuntimeError, match="runs already"):
            vm.start()


def test_sockets_in_a_long_directory_are_short_and_removed(
    qemu: QemuFactory, tmp_path: Path
) -> None:
    vm = qemu(directory=tmp_path / ("long" * 30)).start()
    assert len(bytes(vm.qmp)) <= SUN_PATH_MAX
    directory = vm.qmp.parent
    assert b'"QMP"' in greeting(vm.qmp)
    vm.stop()
    assert not directory.exists()


def test_command_line_of_a_bare_qemu(qemu: QemuFactory) -> None:
    words = qemu(name=None, accelerator=None, display=None, defaults=True).command_line
    assert not {"-name", "-accel", "-display", "-nodefaults"} & {*words}
    usual = qemu("-S", machine="pc").command_line
    assert usual[1:11] == [
        *("-machine", "pc", "-name", "testvm", "-accel", "tcg", "-display", "none"),
        *("-nodefaults", "-S"),
    ]


def test_arguments_are_not_one_string(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list"):
        StorageDaemon(directory=tmp_path, arguments="--help")


@pytest.mark.parametrize("device", ["virtio-blk-pci", "ide-hd"])
def test_io_on_a_guest_device(qemu: QemuFactory, qemu_chain: list[Path], device: str) -> None:
    vm = qemu(*disk(qemu_chain[-1], device), machine="pc").start()
    vm.io("vd0", "write -P 0x77 1M 64k")
    vm.io("vd0", "read -P 0x77 1M 64k")
    vm.io("fmt0", "read -P 0x77 1M 64k")
    vm.io("vd0", "flush")
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        vm.io("vd0", "read -P 0x78 1M 64k")


def test_io_on_a_drive(qemu: QemuFactory) -> None:
    vm = qemu("-drive", "if=none,id=drv0,driver=null-co,read-zeroes=on").start()
    vm.io("drv0", "read -P 0 0 4k")


@pytest.mark.parametrize(
    ("device", "command"),
    [
        ("nope", "read 0 4k"),
        ("vd0", "read 1G 4k"),
        ("vd0", "write 0 nonsense"),
        ("vd0", "write -P 256 0 4k"),
        ("vd0", "no-such-command"),
        ("vd0", "write"),
        ("ro", "write 0 4k"),
        ("bad", "write 0 4k"),
        ("bad", "read -q 0 4k"),
        ("vd0", "discard 1G 4k"),
    ],
)
def test_io_that_fails_raises(
    qemu: QemuFactory, qemu_chain: list[Path], device: str, command: str
) -> None:
    vm = qemu(
        *disk(qemu_chain[-1]),
        *("-drive", "if=none,id=ro,driver=null-co,read-only=on"),
        *(
            "-drive",
            "if=none,id=bad,driver=blkdebug,image.driver=null-co,inject-error.0.event=none",
        ),
        machine="pc",
    ).start()
    with pytest.raises(ImageError):
        vm.io(device, command)


def test_storage_daemon(qemu_binary: str, images: ImageTools, tmp_path: Path) -> None:
    image = images.create(tmp_path / "a.qcow2", "1M")
    with StorageDaemon(
        binary=sibling(qemu_binary, "qemu-storage-daemon"),
        directory=tmp_path,
        arguments=["--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={image}"],
    ) as daemon:
        assert b'"QMP"' in greeting(daemon.qmp)
        nodes = daemon.execute("query-named-block-nodes")
        assert "a" in {node["node-name"] for node in nodes}
        pid = daemon.pid
    assert is_gone(pid)


def test_nbd_server(
    qemu: QemuFactory, qemu_binary: str, qemu_chain: list[Path], tmp_path: Path
) -> None:
    with NbdServer(
        qemu=qemu_binary, directory=tmp_path, image=qemu_chain[0], fmt="qcow2", export="e"
    ) as server:
        vm = qemu().start()
        address = {"type": "unix", "path": str(server.socket)}
        vm.execute("blockdev-add", driver="nbd", node_name="n", server=address, export="e")
        vm.io("n", "read -P 0x11 0 64k")
        vm.stop()
        assert server.running


def test_nbd_server_that_cannot_open_its_image_says_why(qemu_binary: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="missing"):
        NbdServer(qemu=qemu_binary, directory=tmp_path, image=tmp_path / "missing").start()
