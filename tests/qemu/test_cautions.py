# SPDX-License-Identifier: MIT
"""What certain QEMUs would hang in is refused, and QEMU goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import qmpmirror
from qmpmirror import Phase, errors
from qmpmirror.operations.options import Options

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing.launcher import Qemu
    from qmpmirror.testing.plugin import QemuFactory

DEVICES = {
    "virtio-blk": ["-device", "virtio-blk-pci,drive=thr0,id=vd0,iothread=io0"],
    "virtio-scsi": [
        *("-device", "virtio-scsi-pci,iothread=io0,id=scsi0"),
        *("-device", "scsi-hd,drive=thr0,id=vd0"),
    ],
}


def throttled(qemu: QemuFactory, top: Path, *device: str) -> Qemu:
    return qemu(
        *("-object", "iothread,id=io0", "-object", "throttle-group,id=g0"),
        *("-blockdev", f"driver=file,node-name=prot0,filename={top}"),
        *("-blockdev", "driver=qcow2,node-name=fmt0,file=prot0"),
        *("-blockdev", "driver=throttle,node-name=thr0,throttle-group=g0,file=fmt0"),
        *device,
        machine="pc",
        name=None,
    ).start()


@pytest.mark.qemu(">= 7, < 9")  # 5.2 does not start with the second of these
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
async def test_a_pivot_that_would_hang_is_refused(
    qemu: QemuFactory, qemu_chain: list[Path], tmp_path: Path, device: list[str]
) -> None:
    vm = throttled(qemu, qemu_chain[-1], *device)
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        with pytest.raises(errors.Refused, match="would hang this QEMU for ever"):
            await machine.plan_blockcopy("vd0", tmp_path / "copy", Options(then="pivot"))
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        with pytest.raises(errors.Refused, match="would hang this QEMU for ever"):
            await copy.pivot()
        assert (await copy.finish()).outcome is Phase.FINISHED


async def test_a_throttle_filter_alone_is_no_reason(
    qemu: QemuFactory, qemu_chain: list[Path], tmp_path: Path
) -> None:
    vm = throttled(qemu, qemu_chain[-1], "-device", "virtio-blk-pci,drive=thr0,id=vd0")
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        copy = await machine.blockcopy("vd0", tmp_path / "copy", shallow=True)
        await copy.ready()
        assert (await copy.pivot()).outcome is Phase.PIVOTED


@pytest.mark.qemu("< 6")
async def test_vdi_is_refused_where_it_can_hang(
    qemu: QemuFactory, qemu_chain: list[Path], tmp_path: Path
) -> None:
    vm = throttled(qemu, qemu_chain[-1], "-device", "virtio-blk-pci,drive=thr0,id=vd0")
    async with qmpmirror.connect(str(vm.qmp)) as machine:
        with pytest.raises(errors.Refused, match="vdi can hang this QEMU"):
            await machine.blockcopy("vd0", tmp_path / "copy", format="vdi")
    assert not (tmp_path / "copy").exists()
