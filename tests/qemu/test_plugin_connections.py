# SPDX-License-Identifier: MIT
"""The plugin's fixtures that connect to a QEMU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase
from tests.qemu.program import BLOCKDEV

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from qmpmirror.testing.connections import PinnedCopy
    from qmpmirror.testing.plugin import CleanGraph
    from tests.qemu.conftest import Boot, Layers


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    return boot(*(word.format(layers.snap2) for word in BLOCKDEV))


@pytest.mark.parametrize("phase", ["copying", "mirroring"])
def test_a_copy_is_held(
    vm: Qemu, layers: Layers, pinned_copy: PinnedCopy, clean_graph: CleanGraph, phase: str
) -> None:
    clean_graph.expect(vm)
    destination = layers.folder / "copy.qcow2"
    with pinned_copy(vm, "vda", destination, phase=phase, shallow=True) as copy:
        (job,) = vm.execute("query-block-jobs")
        assert job["device"] == copy.id
        assert job["ready"] is (phase == "mirroring")
        assert copy.phase is Phase(phase)
    assert vm.execute("query-jobs") == []
    assert not destination.exists()


def test_a_copy_that_the_test_ends(vm: Qemu, layers: Layers, pinned_copy: PinnedCopy) -> None:
    with pinned_copy(vm, "vda", layers.folder / "copy.qcow2", phase="mirroring") as copy:
        assert copy.finish().consistent


def test_a_qemu_that_dies(vm: Qemu, layers: Layers, pinned_copy: PinnedCopy) -> None:
    with pinned_copy(vm, "vda", layers.folder / "copy.qcow2"):
        vm.kill()


def test_another_phase(vm: Qemu, pinned_copy: PinnedCopy) -> None:
    with (
        pytest.raises(ValueError, match="not in 'pivoting'"),
        pinned_copy(vm, "", "", phase="pivoting"),
    ):
        pass


TEST = """
async def test_it(qemu, qmp_connect):
    vm = qemu().start()
    for _ in range(2):
        async with qmp_connect(vm) as machine:
            assert await machine.disks() == []
"""


def test_connections_are_recorded(
    pytester: pytest.Pytester, qemu_binary: str, tmp_path: Path
) -> None:
    pytester.makepyfile(test_page=TEST)
    folder = tmp_path / "transcripts"
    options: list[Any] = [f"--qemu={qemu_binary}", "-o", "asyncio_mode=auto"]
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)
    assert not folder.exists()
    pytester.runpytest_subprocess(*options, f"--qmp-transcript={folder}").assert_outcomes(passed=1)
    first, second = sorted(folder.iterdir())
    assert first.name.startswith("test_page.py-test_it-")
    assert first.name.endswith("-1.jsonl")
    assert second.name.endswith("-2.jsonl")
    sent = [json.loads(line) for line in first.read_text().splitlines()]
    assert "query-block" in {line["message"].get("execute") for line in sent}
