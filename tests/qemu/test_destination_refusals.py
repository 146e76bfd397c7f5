# SPDX-License-Identifier: MIT
"""Destinations that QEMU itself cannot use: one sentence with its reason, and nothing changed.

What is refused without QEMU's help is in `tests.qemu.test_bad_input`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import errors
from qmpmirror.testing import NbdServer
from qmpmirror.testing.launcher import version_of
from qmpmirror.testing.process import sibling
from tests.qemu.servers import TcpServer, certificates, free_port, needs_openssl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged

SIZE = 8 << 20
FAST = {"qcow2": {"encrypt.iter-time": "10"}, "luks": {"iter-time": "10"}}
"""Otherwise each attempt at a passphrase takes seconds."""


@attrs.frozen
class Refusals:
    """Asks for a copy that cannot be, of the library and of the command line."""

    layers: Layers
    connect: Connect
    cli: Cli
    unchanged: Unchanged

    async def expect(
        self,
        reason: str,
        vm: Qemu,
        destination: Path | str,
        *words: str,
        named: bool = True,
        **options: Any,
    ) -> None:
        """One sentence that has QEMU's reason, and the destination; QEMU and files as before."""
        objects = vm.execute("qom-list", path="/objects")
        with self.unchanged(vm, self.layers.folder):
            async with self.connect(vm) as machine:
                with pytest.raises(errors.Refused, match=reason) as error:
                    await machine.blockcopy("vda", destination, **options)
            assert "\n" not in str(error.value)
            assert not named or str(destination) in str(error.value)
            run = self.cli("blockcopy", vm.qmp, "vda", destination, "--pivot", *words)
            assert (run.returncode, run.stdout) == (4, ""), run.stderr
            assert len(run.stderr.splitlines()) == 1
            assert run.stderr.startswith("error: ")
        assert vm.execute("qom-list", path="/objects") == objects


@pytest.fixture
def refusals(layers: Layers, connect: Connect, cli: Cli, unchanged: Unchanged) -> Refusals:
    return Refusals(layers, connect, cli, unchanged)


@pytest.fixture
def vm(layers: Layers, boot: Boot) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


@pytest.fixture
def tiny(layers: Layers) -> Iterator[Path]:
    """A file system that has no room for even the metadata of an image."""
    folder = layers.folder / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    run = subprocess.run(mount, capture_output=True, check=False, text=True)
    if run.returncode:
        pytest.skip(f"NOT TESTED: nothing can be mounted here: {run.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_no_space_for_metadata(vm: Qemu, refusals: Refusals, tiny: Path) -> None:
    (tiny / "filler").write_bytes(bytes(128 << 10))
    await refusals.expect("No space left on device", vm, tiny / "copy")


async def test_no_space_for_preallocation(vm: Qemu, refusals: Refusals, tiny: Path) -> None:
    words = ("--format", "raw", "-o", "preallocation=full")
    how: dict[str, Any] = {"format": "raw", "creation": {"preallocation": "full"}}
    await refusals.expect("No space left on device", vm, tiny / "copy", *words, **how)


@pytest.fixture
def unprivileged(layers: Layers, boot: Boot, qemu_binary: str) -> Qemu:
    """A QEMU that has become nobody, once its disk was open."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root can start a QEMU as another user")
    user = ["-run-with", "user=nobody"] if version_of(qemu_binary) >= (9, 1, 0) else []
    disk = ("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")
    return boot(*(user or ["-runas", "nobody"]), *disk)


@pytest.mark.parametrize("options", [{}, {"shallow": True}], ids=["full", "shallow"])
async def test_qemus_user_may_not_create_there(
    unprivileged: Qemu, refusals: Refusals, options: dict[str, Any]
) -> None:
    folder = refusals.layers.folder / "ours"
    folder.mkdir(mode=0o700)
    words = [f"--{name}" for name in options]
    await refusals.expect("Permission denied", unprivileged, folder / "copy", *words, **options)


async def test_qemus_user_may_not_write_to_it(unprivileged: Qemu, refusals: Refusals) -> None:
    path = refusals.layers.images.create(refusals.layers.folder / "ours", SIZE)
    path.chmod(0o600)
    how: dict[str, Any] = {"reuse_external": True}
    await refusals.expect("Permission denied", unprivileged, path, "--reuse-external", **how)


async def test_held_by_another_qemu(vm: Qemu, refusals: Refusals, boot: Boot) -> None:
    path = refusals.layers.images.create(refusals.layers.folder / "held", SIZE)
    boot("-drive", f"if=virtio,format=qcow2,file={path}")
    how: dict[str, Any] = {"reuse_external": True}
    await refusals.expect('Failed to get "?write"? lock', vm, path, "--reuse-external", **how)
    await refusals.expect('Failed to get "?\\w+"? lock', vm, path, "--overwrite", overwrite=True)


async def test_held_by_qemu_io(vm: Qemu, refusals: Refusals, qemu_binary: str) -> None:
    path = refusals.layers.images.create(refusals.layers.folder / "held", SIZE, fmt="raw")
    with subprocess.Popen(  # noqa: ASYNC220 - it only has to be there
        [sibling(qemu_binary, "qemu-io"), "-f", "raw", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("length\n")
            holder.stdin.flush()
            assert holder.stdout.readline()  # it is open now
            words = ("--reuse-external", "--format", "raw")
            how: dict[str, Any] = {"reuse_external": True, "format": "raw"}
            # A raw image is not locked before the mirror writes to it.
            await refusals.expect("Failed to get .* lock", vm, path, *words, named=False, **how)
        finally:
            holder.kill()


@pytest.mark.parametrize("fmt", ["qcow2", "luks"])
async def test_wrong_passphrase(
    vm: Qemu, refusals: Refusals, connect: Connect, tmp_path: Path, fmt: str
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("a long passphrase")
    wrong.write_text("another passphrase")
    path = refusals.layers.folder / "copy"
    async with connect(vm) as machine:
        copy = await machine.blockcopy(
            "vda", path, format=fmt, secret=str(right), creation=FAST[fmt]
        )
        await copy.ready()
        await copy.finish()
    words = ("--reuse-external", "--format", fmt, "--secret")
    how: dict[str, Any] = {"reuse_external": True, "format": fmt}
    reason = "Invalid password, cannot unlock any keyslot"
    await refusals.expect(reason, vm, path, *words, str(wrong), secret=str(wrong), **how)
    async with connect(vm) as machine:  # with the right one it is opened
        again = await machine.blockcopy("vda", path, secret=str(right), **how)
        await again.ready()
        await again.finish()


async def test_no_passphrase_for_an_encrypted_image(
    vm: Qemu, refusals: Refusals, connect: Connect, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a long passphrase")
    path = refusals.layers.folder / "copy"
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", path, secret=str(secret), creation=FAST["qcow2"])
        await copy.ready()
        await copy.finish()
    how: dict[str, Any] = {"reuse_external": True}
    await refusals.expect("encrypt.key-secret", vm, path, "--reuse-external", **how)


@needs_openssl
async def test_tls_where_the_server_has_none(vm: Qemu, refusals: Refusals, tmp_path: Path) -> None:
    certificates(tmp_path / "creds")
    layers = refusals.layers
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    creds = str(tmp_path / "creds")
    with TcpServer(directory=tmp_path, qemu=layers.images.qemu, image=image) as server:
        reason = "TLS|(Denied|denied|not configured|support)"
        await refusals.expect(reason, vm, server.uri, "--tls-creds", creds, tls_creds=creds)


@needs_openssl
async def test_no_tls_where_the_server_wants_it(
    vm: Qemu, refusals: Refusals, tmp_path: Path
) -> None:
    creds = tmp_path / "creds"
    certificates(creds)
    layers = refusals.layers
    image = layers.images.create(tmp_path / "served", SIZE, fmt="raw")
    with TcpServer(directory=tmp_path, qemu=layers.images.qemu, image=image, creds=creds) as server:
        await refusals.expect("TLS", vm, server.uri)


@needs_openssl
async def test_credentials_that_are_none(vm: Qemu, refusals: Refusals, tmp_path: Path) -> None:
    certificates(tmp_path / "creds")
    (tmp_path / "creds" / "client-cert.pem").write_text("nonsense")
    for creds, reason in ((tmp_path / "creds", "client-cert.pem"), (tmp_path / "no", "No such")):
        with refusals.unchanged(vm, refusals.layers.folder):
            async with refusals.connect(vm) as machine:
                with pytest.raises(errors.Refused, match=reason) as error:
                    await machine.blockcopy("vda", "nbd://127.0.0.1:1/x", tls_creds=str(creds))
        assert "\n" not in str(error.value)


async def test_nobody_serves_there(vm: Qemu, refusals: Refusals, tmp_path: Path) -> None:
    uri = f"nbd://127.0.0.1:{free_port()}/disk"
    await refusals.expect("Connection refused", vm, uri)
    await refusals.expect("No such file", vm, f"nbd+unix:///?socket={tmp_path}/none")


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(200), b""], ids=["ssh", "-"])
async def test_a_server_that_speaks_something_else(
    vm: Qemu, refusals: Refusals, tmp_path: Path, said: bytes
) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        threading.Thread(target=answer, args=(server, said), daemon=True).start()
        reason = "magic|Failed to read|end-of-file"
        await refusals.expect(reason, vm, f"nbd+unix:///?socket={path}")


def answer(server: socket.socket, said: bytes) -> None:
    """Say the same to everybody, and hang up."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            with client:
                client.sendall(said)


async def test_a_smaller_export(vm: Qemu, refusals: Refusals, tmp_path: Path) -> None:
    layers = refusals.layers
    image = layers.images.create(tmp_path / "served", SIZE // 2, fmt="raw")
    with NbdServer(directory=tmp_path, image=image, qemu=layers.images.qemu) as server:
        await refusals.expect(f"{SIZE // 2} bytes: too small for a disk of {SIZE}", vm, server.uri)


@pytest.mark.parametrize(("fmt", "size"), [("raw", SIZE // 2), ("qcow2", SIZE // 2)])
async def test_a_smaller_file(vm: Qemu, refusals: Refusals, fmt: str, size: int) -> None:
    path = refusals.layers.images.create(refusals.layers.folder / "small", size, fmt=fmt)
    words = ("--reuse-external", "--format", fmt)
    how: dict[str, Any] = {"reuse_external": True, "format": fmt}
    await refusals.expect(f"{size} bytes.*{SIZE} bytes", vm, path, *words, **how)


@pytest.mark.parametrize("fmt", ["raw", "luks", "vdi", "vpc", "parallels"])
async def test_shallow_into_a_format_without_backing(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged, fmt: str
) -> None:
    if not layers.has_format(fmt):
        pytest.skip(f"this QEMU was built without {fmt}")
    secret = layers.folder.parent / "secret"
    secret.write_text("a long passphrase")
    given = str(secret) if fmt == "luks" else ""
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused, match=f"{fmt} cannot have a backing file"):
                await machine.blockcopy(
                    "vda", layers.folder / "copy", format=fmt, shallow=True, secret=given
                )


async def test_reuse_of_an_image_of_the_chain(vm: Qemu, refusals: Refusals) -> None:
    reason = "is the source disk itself, or in its backing chain"
    for path in (refusals.layers.snap2, refusals.layers.base):
        await refusals.expect(reason, vm, path, "--reuse-external", reuse_external=True)


async def test_json_of_an_image_of_the_chain(vm: Qemu, refusals: Refusals) -> None:
    """Only QEMU knows what it names: its locks are what guards it."""
    base = {"driver": "qcow2", "file": {"driver": "file", "filename": str(refusals.layers.base)}}
    text = f"json:{json.dumps(base)}"
    await refusals.expect("lock", vm, text)
