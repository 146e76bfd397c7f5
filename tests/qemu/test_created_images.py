# SPDX-License-Identifier: MIT
"""What a new image can be made like: options, encryption, data files; and what is let go of."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, errors
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Guest, Layers, Unchanged

    MakeGuest = Callable[..., Guest]


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


async def finished(machine: qmpmirror.Machine, path: Path, **options: Any) -> qmpmirror.Result:
    copy = await machine.blockcopy("vda", path, **options)
    await copy.ready()
    return await copy.finish()


def test_options_as_of_qemu_img(vm: Qemu, cli: Cli, layers: Layers) -> None:
    path = layers.folder / "copy"
    given = "cluster_size=128k,lazy_refcounts=on,compat=1.1,refcount_bits=32,preallocation=metadata"
    run = cli("blockcopy", vm.qmp, "vda", path, "--finish", "-o", given)
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n")
    info = layers.images.info(path)
    data = info["format-specific"]["data"]
    assert info["cluster-size"] == 128 * 1024
    assert (data["compat"], data["lazy-refcounts"], data["refcount-bits"]) == ("1.1", True, 32)
    assert layers.content(path) == layers.content(layers.snap2)


@pytest.mark.parametrize(
    ("creation", "reason"),
    [
        ({"clustersize": "4k"}, "has no option 'clustersize': this QEMU offers cluster-size"),
        ({"cluster_size": "many"}, "give a number of bytes"),
        ({"lazy_refcounts": "maybe"}, "give on or off"),
        ({"preallocation": "some"}, "does not accept 'some'"),
        ({"cluster_size": "100"}, "[Cc]luster size"),
        ({"size": "1M"}, "has no option 'size'"),
    ],
)
async def test_wrong_options_change_nothing(
    vm: Qemu,
    connect: Connect,
    layers: Layers,
    unchanged: Unchanged,
    creation: dict[str, str],
    reason: str,
) -> None:
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Error, match=reason):
                await finished(machine, layers.folder / "copy", creation=creation)


@pytest.mark.parametrize(("given", "made"), [("qcow2", "qcow2"), ("raw", "luks")])
async def test_luks(
    vm: Qemu,
    connect: Connect,
    layers: Layers,
    guest: MakeGuest,
    tmp_path: Path,
    given: str,
    made: str,
) -> None:
    secret, path = tmp_path / "secret", tmp_path / "copy"
    secret.write_text("a long passphrase")
    user = guest(vm)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", path, format=given, secret=str(secret))
        await copy.ready()
        user.scribble()
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        user.scribble()
        user.check()
        second = await machine.blockcopy("vda", tmp_path / "open", format="qcow2")
        await second.ready()
        await second.pivot()
        objects = [entry["name"] for entry in vm.execute("qom-list", path="/objects")]
        assert not [name for name in objects if name.startswith("qmpmirror-")]
    assert decrypted(layers, path, made, secret) == bytes(user.expected)


def decrypted(layers: Layers, path: Path, made: str, secret: Path) -> bytes:
    plain = path.with_name("plain")
    prefix = "encrypt." if made == "qcow2" else ""
    source = f"driver={made},{prefix}key-secret=s,file.filename={path}"
    subprocess.run(
        [
            *(sibling(layers.images.qemu, "qemu-img"), "convert", "-O", "raw"),
            *("--object", f"secret,id=s,file={secret}", "--image-opts", source, str(plain)),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return plain.read_bytes()


async def test_a_secret_that_cannot_be_read_changes_nothing(
    vm: Qemu, connect: Connect, layers: Layers, unchanged: Unchanged
) -> None:
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Refused, match="No such file"):
                await finished(machine, layers.folder / "copy", secret=str(layers.folder / "no"))
            with pytest.raises(errors.Refused, match="needs a passphrase"):
                await finished(machine, layers.folder / "copy", format="luks")


async def test_data_file(
    vm: Qemu, connect: Connect, layers: Layers, guest: MakeGuest, pinned: dict[str, Any]
) -> None:
    path, data = layers.folder / "copy", layers.folder / "data"
    creation = {"data_file": str(data), "data_file_raw": "on"}
    user = guest(vm)
    async with connect(vm) as machine:
        aborted = await machine.blockcopy("vda", path, creation=creation, **pinned)
        assert (await aborted.abort()).removed
        assert not path.exists()
        assert not data.exists()
        copy = await machine.blockcopy("vda", path, creation=creation)
        await copy.ready()
        assert (await copy.pivot()).outcome is Phase.PIVOTED
        user.scribble()
        user.check()
        with pytest.raises(qmpmirror.DestinationExists, match=r"data file .* exists already"):
            await finished(machine, layers.folder / "other", creation=creation)
    vm.stop()
    assert data.read_bytes() == bytes(user.expected)


SOURCES = {
    "drive": ["-drive", "if=virtio,format=qcow2,file={}"],
    "named": [
        *("-blockdev", "file,node-name=prot0,filename={}"),
        *("-blockdev", "qcow2,node-name=fmt0,file=prot0", "-device", "virtio-blk,drive=fmt0"),
    ],
    "auto-named": [
        *("-blockdev", "qcow2,node-name=fmt0,file.driver=file,file.filename={}"),
        *("-device", "virtio-blk,drive=fmt0"),
    ],
}


@pytest.mark.parametrize("shallow", [True, False])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
async def test_old_images_are_let_go_of(
    boot: Boot, connect: Connect, layers: Layers, source: list[str], *, shallow: bool
) -> None:
    vm = boot(*(word.format(layers.snap2) for word in source))
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy", shallow=shallow)
        await copy.ready()
        assert (await copy.pivot()).left == ()
    freed = [layers.snap2] if shallow else [layers.snap2, layers.snap1, layers.base]
    for path in freed:
        layers.images.io(path, "write -P 1 7M 512")  # fails while somebody has it open


async def test_a_node_that_another_disk_needs_stays(
    boot: Boot, connect: Connect, layers: Layers
) -> None:
    other = layers.folder / "other"
    layers.images.create(other, "8M", backing=layers.base)
    vm = boot(
        *(
            "-blockdev",
            f"qcow2,node-name=base,read-only=on,file.driver=file,file.filename={layers.base}",
        ),
        *(
            "-blockdev",
            f"qcow2,node-name=a,backing=base,file.driver=file,file.filename={layers.snap1}",
        ),
        *("-blockdev", f"qcow2,node-name=b,backing=base,file.driver=file,file.filename={other}"),
        *("-device", "virtio-blk,drive=a,id=va", "-device", "virtio-blk,drive=b,id=vb"),
    )
    async with connect(vm) as machine:
        copy = await machine.blockcopy("va", layers.folder / "copy")
        await copy.ready()
        assert (await copy.pivot()).left == ()
        nodes = (await machine.graph()).nodes
    assert "base" in nodes
    assert "a" not in nodes


async def test_keep_source_keeps_it(boot: Boot, connect: Connect, layers: Layers) -> None:
    vm = boot(*(word.format(layers.snap2) for word in SOURCES["named"]))
    async with connect(vm) as machine:
        copy = await machine.blockcopy("vda", layers.folder / "copy", keep_source=True)
        await copy.ready()
        await copy.pivot()
        assert {"fmt0", "prot0"} <= set((await machine.graph()).nodes)
