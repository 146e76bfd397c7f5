# SPDX-License-Identifier: MIT
"""ssh, rbd, iscsi, nfs and gluster, as far as this QEMU has the drivers: by ``json:{...}``."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import Phase, errors
from qmpmirror.testing.process import Process
from tests.qemu.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Connect, Guest, Layers, Unchanged

SIZE = 8 << 20
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SERVER = {"host": "127.0.0.1", "port": "1"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ssh": {"server": SERVER, "path": "/nowhere", "user": "nobody"},
    "rbd": {"pool": "none", "image": "none", "conf": "/nowhere"},
    "iscsi": {"transport": "tcp", "portal": "127.0.0.1:1", "target": "iqn.none", "lun": 0},
    "nfs": {"server": {"type": "inet", "host": "127.0.0.1"}, "path": "/nowhere"},
    "gluster": {
        "volume": "none",
        "path": "/none",
        "server": [{"type": "inet", "host": "127.0.0.1", "port": "1"}],
    },
}


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


@pytest.mark.parametrize("driver", ["sheepdog", "vxhs", "nonsense"])
async def test_a_driver_that_this_qemu_does_not_have(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged, driver: str
) -> None:
    if driver in known_drivers(vm):
        pytest.skip(f"this QEMU has {driver}")
    text = f'json:{{"driver": "{driver}"}}'
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Unsupported) as error:
                await machine.blockcopy("vda", text)
    assert str(error.value) == f"this QEMU has no driver {driver!r} for {text}"


def known_drivers(vm: Qemu) -> frozenset[str]:
    from qmpmirror.schema import Schema  # noqa: PLC0415 - only here

    return Schema.parse(vm.execute("query-qmp-schema")).values("blockdev-add", "driver")


@pytest.mark.parametrize("driver", ["ssh", "iscsi", "nfs"])
async def test_a_server_that_is_not_there(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged, driver: str
) -> None:
    """One sentence with QEMU's reason, whether the driver cannot be loaded or nobody listens."""
    text = f"json:{json.dumps({'driver': driver, **OPTIONS[driver]})}"
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused) as error:
                await machine.blockcopy("vda", text)
    assert "\n" not in str(error.value)
    assert driver in str(error.value)


@pytest.mark.parametrize("driver", list(OPTIONS))
async def test_a_driver_that_cannot_be_loaded(
    boot: Boot,
    connect: Connect,
    layers: Layers,
    unchanged: Unchanged,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qemu_binary: str,
    driver: str,
) -> None:
    """The schema knows the driver, but the module is not installed."""
    binary = without_modules(Path(qemu_binary), tmp_path)
    monkeypatch.setenv("QEMU_MODULE_DIR", str(tmp_path))
    vm = boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}", binary=str(binary))
    if driver not in known_drivers(vm):
        pytest.skip(f"this QEMU was built without {driver}")
    text = f"json:{json.dumps({'driver': driver, **OPTIONS[driver]})}"
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused) as error:
                await machine.blockcopy("vda", text)
    assert "\n" not in str(error.value)
    if "Unknown driver" not in str(error.value):
        pytest.skip(f"NOT TESTED: the module was loaded all the same: {error.value}")
    assert "cannot load it: qemu-block-extra" in error.value.hint


def without_modules(binary: Path, folder: Path) -> Path:
    """The same QEMU, whose folder of modules has none of the block drivers."""
    text = binary.read_bytes()
    if not text.startswith(b"#!"):
        return binary
    lines = text.decode().replace('self=$(readlink -f -- "$0")', f'self="{binary.resolve()}"')
    for module in binary.resolve().parents[1].glob("root/usr/lib/*/qemu/*.so"):
        if not module.name.startswith("block-"):
            (folder / module.name).symlink_to(module)
    script = folder / "qemu-system-without-modules"
    kept = [line for line in lines.splitlines() if "QEMU_MODULE_DIR" not in line]
    script.write_text("\n".join(kept) + "\n")
    script.chmod(0o755)
    return script


@attrs.define(kw_only=True, eq=False)
class Sshd(Process):
    """An sshd of our own on loopback, for one user with one key.

    Attributes:
        home: the folder with its keys.
        port: its port.
    """

    home: Path
    port: int = attrs.field(factory=free_port)

    @property
    def command_line(self) -> list[str]:
        """The program and its arguments, as they are (or will be) executed."""
        options = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.home / "host",
            "AuthorizedKeysFile": self.home / "user.pub",
            "StrictModes": "no",
            "PermitRootLogin": "yes",
            "PidFile": self._path("pid"),
            "Subsystem": "sftp internal-sftp",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return [SSHD, "-D", "-e", "-f", "/dev/null", *words]

    def _answers(self) -> bool:
        return self._path("pid").exists()


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    if not Path(SSHD).exists() or not shutil.which("ssh-agent"):
        pytest.skip("NOT TESTED: openssh-server is not installed")
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "rsa", "-m", "PEM", "-N", "", "-f", str(tmp_path / key)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    with Sshd(directory=tmp_path, home=tmp_path) as server:
        yield server


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """QEMU finds the user's key in an agent, as it does not take one as an option."""
    socket = tmp_path / "agent"
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            (tmp_path / "user").chmod(0o600)
            subprocess.run(["ssh-add", "-q", str(tmp_path / "user")], check=True)
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_ssh(
    sshd: Sshd,
    agent: None,  # noqa: ARG001 - it has to run
    boot: Boot,
    connect: Connect,
    layers: Layers,
    guest: Callable[..., Guest],
    tmp_path: Path,
    ending: str,
) -> None:
    image = layers.images.create(tmp_path / "far", SIZE, fmt="raw")
    options = {
        "driver": "ssh",
        "server": {"host": "127.0.0.1", "port": str(sshd.port)},
        "path": str(image),
        "user": "root",
        "host-key-check": {"mode": "none"},
    }
    vm = boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")
    user = guest(vm)
    async with connect(vm) as machine:
        try:
            copy = await machine.blockcopy("vda", f"json:{json.dumps(options)}")
        except errors.Refused as error:
            if "Unknown driver" in str(error):
                pytest.skip(f"NOT TESTED: {error}")
            raise
        user.scribble()
        await copy.ready()
        user.scribble()
        result = await (copy.pivot() if ending == "pivot" else copy.finish())
    assert result.outcome is (Phase.PIVOTED if ending == "pivot" else Phase.FINISHED)
    user.check()
    vm.stop()
    assert image.read_bytes() == bytes(user.expected)
