# SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qmpmirror.testing import StorageDaemon
from qmpmirror.testing.graph import (
    GraphSnapshot,
    assert_clean_graph,
    assert_no_new_files,
    files_in,
)
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from qmpmirror.testing.plugin import QemuFactory


@pytest.fixture
def vm(qemu: QemuFactory, qemu_chain: list[Path]) -> Qemu:
    return qemu(
        "-S",
        *("-blockdev", f"qcow2,node-name=fmt0,file.driver=file,file.filename={qemu_chain[-1]}"),
        *("-device", "virtio-blk-pci,drive=fmt0,id=vd0"),
        machine="pc",
    ).start()


def add_null(vm: Qemu, name: str) -> None:
    vm.execute("blockdev-add", driver="null-co", node_name=name, size=64 << 20)


def left_over(vm: Qemu, before: GraphSnapshot) -> list[str]:
    with pytest.raises(AssertionError) as caught:
        assert_clean_graph(vm.execute, before)
    return str(caught.value).splitlines()[1:]


def test_unchanged_graph_is_clean(vm: Qemu) -> None:
    before = GraphSnapshot.take(vm.execute)
    vm.io("vd0", "write 0 1M")
    assert_clean_graph(vm.execute, before)


def test_node_left_over(vm: Qemu) -> None:
    before = GraphSnapshot.take(vm.execute)
    vm.execute("blockdev-add", driver="null-co", node_name="tgt")
    assert left_over(vm, before) == [
        "  left over: node 'tgt' (null-co, writable, backing depth 0, null-co://)"
    ]
    vm.execute("blockdev-del", node_name="tgt")
    assert_clean_graph(vm.execute, before)


def test_running_job_with_its_filter_is_left_over(vm: Qemu) -> None:
    add_null(vm, "tgt")
    before = GraphSnapshot.take(vm.execute)
    vm.execute(
        "blockdev-mirror",
        job_id="j0",
        device="fmt0",
        target="tgt",
        sync="full",
        filter_node_name="flt",
        speed=1,
    )
    found = left_over(vm, before)
    assert any(line.startswith("  left over: job 'j0' (mirror, running") for line in found)
    assert any(line.startswith("  left over: node 'flt' (mirror_top") for line in found)
    assert any("is now device" in line and "on node 'flt'" in line for line in found)


def test_bitmap_and_export_are_left_over_by_name(vm: Qemu, tmp_path: Path) -> None:
    before = GraphSnapshot.take(vm.execute)
    vm.execute("block-dirty-bitmap-add", node="fmt0", name="b")
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    vm.execute("nbd-server-start", addr=address)
    vm.execute("block-export-add", type="nbd", id="e", node_name="fmt0")
    assert left_over(vm, before) == [
        "  left over: bitmap 'b' of node 'fmt0' (transient, recording)",
        "  left over: export 'e' (nbd of 'fmt0')",
    ]


def test_node_that_is_gone_and_one_that_changed(vm: Qemu) -> None:
    add_null(vm, "extra")
    before = GraphSnapshot.take(vm.execute)
    vm.execute("blockdev-del", node_name="extra")
    vm.execute("blockdev-add", driver="null-co", node_name="extra", read_only=True)
    vm.execute("device_del", id="vd0")
    assert "  changed: node 'extra' (null-co, writable" in "\n".join(left_over(vm, before))
    vm.execute("blockdev-del", node_name="extra")
    assert "  gone: node 'extra' (null-co, writable" in "\n".join(left_over(vm, before))


def test_generated_names_are_known_by_their_file(vm: Qemu, qemu_chain: list[Path]) -> None:
    def add_base() -> None:
        vm.execute(
            "blockdev-add",
            driver="qcow2",
            node_name="again",
            read_only=True,
            file={"driver": "file", "filename": str(qemu_chain[0])},
        )

    add_base()
    before = GraphSnapshot.take(vm.execute)
    vm.execute("blockdev-del", node_name="again")
    add_base()
    assert_clean_graph(vm.execute, before)


def test_storage_daemon_has_a_graph_too(qemu_binary: str, tmp_path: Path) -> None:
    with StorageDaemon(
        binary=sibling(qemu_binary, "qemu-storage-daemon"), directory=tmp_path
    ) as daemon:
        before = GraphSnapshot.take(daemon.execute)
        daemon.execute("blockdev-add", driver="null-co", node_name="n")
        with pytest.raises(AssertionError, match="left over: node 'n'"):
            assert_clean_graph(daemon.execute, before)


def test_new_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    before = files_in(tmp_path)
    assert_no_new_files(tmp_path, before)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "copy.qcow2").touch()
    with pytest.raises(AssertionError, match=r"sub, sub/copy\.qcow2"):
        assert_no_new_files(tmp_path, before)
