# SPDX-License-Identifier: MIT
"""The plugin's fixtures that start a QEMU, run by pytest within pytest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from qmpmirror.testing.plugin import CleanGraph, QemuFactory


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, qemu_binary: str
) -> pytest.RunResult:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        """
        from pathlib import Path
        import pytest

        @pytest.fixture
        def vm(qemu):
            return qemu().start()

        def add(vm):
            vm.execute("blockdev-add", driver="null-co", node_name="tgt")

        def test_left_over(vm, clean_graph): add(vm)

        def test_not_asked(vm): add(vm)

        def test_expected(vm, clean_graph):
            add(vm)
            clean_graph.expect(vm)

        def test_started_later(clean_graph, qemu): add(qemu().start())

        def test_ended(vm, clean_graph):
            add(vm)
            vm.kill()

        def test_pid(vm, request):
            (request.config.rootpath / "pid").write_text(str(vm.pid))
        """
    )
    plugins = ("-p", "qmpmirror.testing.plugin", "-p", "no:cacheprovider")
    return pytester.runpytest_subprocess(*plugins, "-rA", f"--qemu={qemu_binary}")


def test_fixtures(run: pytest.RunResult, pytester: pytest.Pytester) -> None:
    run.assert_outcomes(passed=6, errors=2)
    run.stdout.fnmatch_lines(
        [
            "*left over: node 'tgt' (null-co*",
            "ERROR *test_left_over*",
            "ERROR *test_started_later*",
        ]
    )
    pid = int((pytester.path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_chain_shows_what_its_layers_hold(
    qemu: QemuFactory, qemu_chain: list[Path], clean_graph: CleanGraph
) -> None:
    vm: Qemu = qemu().start()
    top = {"driver": "file", "filename": str(qemu_chain[-1])}
    vm.execute("blockdev-add", driver="qcow2", node_name="top", file=top)
    clean_graph.expect(vm)
    for pattern in ("0x11 0 128k", "0x12 256k 128k", "0x13 512k 128k", "0x11 4M 64k"):
        vm.io("top", f"read -P {pattern}")
    vm.io("top", f"read -P 0x12 {4 * 1024 + 64}k 64k")
    vm.io("top", f"read -P 0x13 {4 * 1024 + 128}k 64k")
