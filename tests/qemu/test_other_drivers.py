# SPDX-License-Identifier: MIT
"""ssh, rbd, iscsi, nfs and gluster: used when QEMU has the driver, clear words when it has not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase, errors
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Connect, Layers, Unchanged

NOWHERE = {"type": "inet", "host": "127.0.0.1", "port": "1"}
SSH: dict[str, Any] = {
    "driver": "ssh",
    "server": {"host": "127.0.0.1", "port": "1"},
    "path": "/nowhere",
    "host-key-check": {"mode": "none"},
}
DESTINATIONS: dict[str, dict[str, Any]] = {
    "ssh": SSH,
    "rbd": {"driver": "rbd", "pool": "p", "image": "i", "conf": "/dev/null"},
    "iscsi": {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": "127.0.0.1:1",
        "target": "iqn.2026-11.example:t",
        "lun": 0,
    },
    "nfs": {"driver": "nfs", "server": {"type": "inet", "host": "127.0.0.1"}, "path": "/x"},
    "gluster": {"driver": "gluster", "volume": "v", "path": "p", "server": [NOWHERE]},
}


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot(
        *("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("driver", list(DESTINATIONS))
async def test_a_driver_that_cannot_be_used_is_named(
    vm: Qemu, connect: Connect, unchanged: Unchanged, layers: Layers, driver: str
) -> None:
    options = DESTINATIONS[driver]
    async with connect(vm) as machine:
        known = driver in (await machine.schema()).values("blockdev-add", "driver")
        with unchanged(vm, layers.folder), pytest.raises(errors.Refused) as raised:
            await machine.blockcopy("vda", f"json:{json.dumps(options)}", format="raw")
    said = str(raised.value)
    assert "\n" not in said
    if not known:
        assert isinstance(raised.value, errors.Unsupported)
        assert said.startswith(f"this QEMU has no driver '{driver}' for json:")
    else:
        assert isinstance(raised.value, errors.DestinationError)
        assert said.startswith("json:")
        assert len(said) > len(json.dumps(options)) + len("json:") + 5
        if "Unknown driver" in said:
            assert "qemu-block-extra" in said


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[int]:
    """The port of an SSH server of our own, which lets this user in with a key of its own."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("NO SSH SERVER HERE: install openssh-server to test the ssh driver")
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    words = [
        *(program, "-D", "-e", "-f", "/dev/null", "-h", str(tmp_path / "host")),
        *("-o", f"Port={port}", "-o", "ListenAddress=127.0.0.1", "-o", "StrictModes=no"),
        *("-o", f"AuthorizedKeysFile={tmp_path}/user.pub", "-o", "UsePAM=no"),
        *("-o", "Subsystem=sftp internal-sftp", "-o", f"PidFile={tmp_path}/pid"),
    ]
    (tmp_path / "log").touch()
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as server,
    ):
        until(lambda: "listening on" in (tmp_path / "log").read_text())
        yield port
        server.terminate()


@pytest.fixture
def agent(tmp_path: Path, sshd: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """An SSH agent with the user's key, for a QEMU that is started now."""
    path = tmp_path / "agent"
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(path)], stdin=subprocess.DEVNULL
    ) as process:
        until(path.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        add = ["ssh-add", "-q", str(tmp_path / "user")]
        subprocess.run(add, check=True, stdin=subprocess.DEVNULL)
        yield sshd
        process.terminate()


@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_a_file_behind_ssh(
    agent: int, boot: Boot, layers: Layers, connect: Connect, tmp_path: Path, ending: str
) -> None:
    vm = boot(
        *("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
    )
    content = layers.content(layers.snap2)
    far = tmp_path / "far"
    far.write_bytes(bytes(len(content)))
    where = SSH | {"server": {"host": "127.0.0.1", "port": str(agent)}, "path": str(far)}
    async with connect(vm) as machine:
        try:
            copy = await machine.blockcopy("vda", f"json:{json.dumps(where)}", format="raw")
        except errors.Refused as error:
            if "Unknown driver" in str(error) or isinstance(error, errors.Unsupported):
                pytest.skip(f"THIS QEMU CANNOT LOAD ITS SSH DRIVER: {error}")
            raise
        await copy.ready()
        result = await getattr(copy, ending)()
    assert result.outcome is (Phase.PIVOTED if ending == "pivot" else Phase.FINISHED)
    if ending == "pivot":
        vm.io("/machine/peripheral/vd0/virtio-backend", "write -P 0x71 1M 64k")
        vm.io("/machine/peripheral/vd0/virtio-backend", "flush")
        content = content[: 1 << 20] + b"\x71" * 65536 + content[(1 << 20) + 65536 :]
    assert far.read_bytes() == content
