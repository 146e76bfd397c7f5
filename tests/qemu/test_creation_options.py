# SPDX-License-Identifier: MIT
"""Each creation option arrives in the image, as ``qemu-img info`` tells; a wrong one does nothing.

More of them are in `tests.qemu.test_created_images`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import errors

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged

SIZE = 8 << 20


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}")


def find(info: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        info = info[key]
    return info


QCOW2 = "format-specific.data."


@pytest.mark.parametrize("depth", [[], ["--shallow"]], ids=["full", "shallow"])
@pytest.mark.parametrize(
    ("given", "where", "value"),
    [
        ("cluster_size=4k", "cluster-size", 4096),
        ("cluster_size=2M", "cluster-size", 2 << 20),
        pytest.param(
            *("compression_type=zstd", QCOW2 + "compression-type", "zstd"),
            marks=pytest.mark.qemu(">= 6.0"),  # Debian's 5.2 was built without
        ),
        ("compression_type=zlib", QCOW2 + "compression-type", "zlib"),
        ("extended_l2=on,cluster_size=128k", QCOW2 + "extended-l2", True),
        ("extended_l2=off", QCOW2 + "extended-l2", False),
        ("lazy_refcounts=on", QCOW2 + "lazy-refcounts", True),
        ("lazy-refcounts=off", QCOW2 + "lazy-refcounts", False),
        ("refcount_bits=64", QCOW2 + "refcount-bits", 64),
        ("refcount_bits=1", QCOW2 + "refcount-bits", 1),
        ("compat=0.10", QCOW2 + "compat", "0.10"),
        ("compat=1.1", QCOW2 + "compat", "1.1"),
        ("version=v3", QCOW2 + "compat", "1.1"),
    ],
)
def test_qcow2(
    vm: Qemu, cli: Cli, layers: Layers, given: str, where: str, value: Any, depth: list[str]
) -> None:
    path = layers.folder / "copy"
    expected = layers.content(layers.snap2)
    run = cli("blockcopy", vm.qmp, "vda", path, "--finish", "-o", given, *depth)
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n"), run.stderr
    assert find(layers.images.info(path), where) == value
    assert layers.content(path) == expected


@pytest.mark.parametrize(
    ("given", "least"),
    [("off", 0), ("metadata", 0), ("falloc", SIZE), ("full", SIZE)],
)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_preallocation(
    vm: Qemu, cli: Cli, layers: Layers, fmt: str, given: str, least: int
) -> None:
    if (fmt, given) == ("raw", "metadata"):
        pytest.skip("raw has no metadata")
    path = layers.folder / "copy"
    words = ("--finish", "--format", fmt, "-o", f"preallocation={given}")
    run = cli("blockcopy", vm.qmp, "vda", path, *words)
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n"), run.stderr
    if given == "metadata":
        # Every cluster has a place, though nothing is there yet.
        assert layers.images.info(path)["format"] == "qcow2"
        assert path.stat().st_size >= SIZE
    assert layers.images.info(path, "raw")["actual-size"] >= least
    if given == "off":
        assert layers.images.info(path, "raw")["actual-size"] < SIZE
    assert layers.content(path, fmt) == layers.content(layers.snap2)


def test_preallocation_stays_while_the_mirror_writes_zeroes(
    vm: Qemu, cli: Cli, layers: Layers
) -> None:
    """Holes of the source must not be punched into what was asked to be there in full."""
    path = layers.folder / "copy"
    words = ("--finish", "--format", "raw", "-o", "preallocation=full")
    assert cli("blockcopy", vm.qmp, "vda", path, *words).returncode == 0
    assert layers.images.info(path, "raw")["actual-size"] >= SIZE


LUKS_OPTIONS = "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha512,iter-time=10"


def test_luks_options(vm: Qemu, cli: Cli, layers: Layers, tmp_path: Path) -> None:
    path, secret = layers.folder / "copy", tmp_path / "secret"
    secret.write_text("a long passphrase")
    words = ("--finish", "--format", "luks", "--secret", secret, "-o", LUKS_OPTIONS)
    run = cli("blockcopy", vm.qmp, "vda", path, *words)
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n"), run.stderr
    data = layers.images.info(path, "luks")["format-specific"]["data"]
    names = ("cipher-alg", "cipher-mode", "ivgen-alg", "hash-alg")
    assert [data[name] for name in names] == ["aes-128", "cbc", "plain64", "sha512"]


def test_luks_options_of_qcow2(vm: Qemu, cli: Cli, layers: Layers, tmp_path: Path) -> None:
    path, secret = layers.folder / "copy", tmp_path / "secret"
    secret.write_text("a long passphrase")
    options = ",".join(f"encrypt.{option}" for option in LUKS_OPTIONS.split(","))
    run = cli("blockcopy", vm.qmp, "vda", path, "--finish", "--secret", secret, "-o", options)
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n"), run.stderr
    data = layers.images.info(path)["format-specific"]["data"]["encrypt"]
    names = ("format", "cipher-alg", "cipher-mode", "ivgen-alg", "hash-alg")
    assert [data[name] for name in names] == ["luks", "aes-128", "cbc", "plain64", "sha512"]


@pytest.mark.parametrize(
    ("fmt", "creation", "reason"),
    [
        ("qcow2", {"clustersize": "4k"}, "no option 'clustersize': this QEMU offers cluster-size"),
        ("qcow2", {"cluster_size": "many"}, "give a number of bytes"),
        ("qcow2", {"cluster_size": "100"}, r"[Cc]luster size must be a power of two"),
        ("qcow2", {"cluster_size": "16M"}, r"[Cc]luster size must be a power of two"),
        ("qcow2", {"compression_type": "lzma"}, "does not accept 'lzma'"),
        ("qcow2", {"extended_l2": "perhaps"}, "give on or off"),
        ("qcow2", {"extended_l2": "on", "cluster_size": "4k"}, "[Ee]xtended L2"),
        ("qcow2", {"lazy_refcounts": "maybe"}, "give on or off"),
        ("qcow2", {"lazy_refcounts": "on", "compat": "0.10"}, "[Ll]azy refcounts"),
        ("qcow2", {"refcount_bits": "5"}, "[Rr]efcount (width|bits)"),
        ("qcow2", {"refcount_bits": "-16"}, "give a number of bytes"),
        ("qcow2", {"compat": "9.9"}, "does not accept '9.9'"),
        ("qcow2", {"preallocation": "some"}, "does not accept 'some'"),
        ("qcow2", {"backing_file": "/x"}, "has no option 'backing_file'"),
        ("qcow2", {"encrypt.cipher-alg": "aes-128"}, "--secret"),
        ("qcow2", {"data_file_raw": "on"}, "data.file"),
        ("qcow2", {"size": "1M"}, "has no option 'size'"),
        ("raw", {"cluster_size": "64k"}, "has no option 'cluster_size'"),
        ("raw", {"preallocation": "metadata"}, "metadata"),
        ("raw", {"preallocation": "some"}, "does not accept 'some'"),
        ("raw", {"data_file": "/nowhere/data"}, "raw cannot have a data file"),
    ],
)
async def test_wrong_options_change_nothing(
    vm: Qemu,
    connect: Connect,
    layers: Layers,
    unchanged: Unchanged,
    fmt: str,
    creation: dict[str, str],
    reason: str,
) -> None:
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Error, match=reason) as error:
                await machine.blockcopy(
                    "vda", layers.folder / "copy", format=fmt, creation=creation
                )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["cipher-alg=rot13", "hash-alg=crc32", "iter-time=soon", "x=1"])
@pytest.mark.parametrize("fmt", ["qcow2", "luks"])
async def test_wrong_luks_options_change_nothing(
    vm: Qemu,
    connect: Connect,
    layers: Layers,
    unchanged: Unchanged,
    tmp_path: Path,
    fmt: str,
    option: str,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a long passphrase")
    key, value = option.split("=")
    creation = {f"encrypt.{key}" if fmt == "qcow2" else key: value}
    how: dict[str, Any] = {"format": fmt, "secret": str(secret), "creation": creation}
    with unchanged(vm, layers.folder):
        async with connect(vm) as machine:
            with pytest.raises(errors.Error, match=f"{value}|no option") as error:
                await machine.blockcopy("vda", layers.folder / "copy", **how)
    assert "\n" not in str(error.value)
