# SPDX-License-Identifier: MIT
"""What people do with blockcopy, each as one command: backup, image-create."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Way
from tests.qemu.chained import WAYS, Chain, make
from tests.qemu.program import until

if TYPE_CHECKING:
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged


@pytest.fixture(params=WAYS)
def chain(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Chain:
    return make(boot, layers, request.param)


named = pytest.mark.parametrize("chain", ["blockdev"], indirect=True)


def check_untouched(chain: Chain) -> None:
    assert chain.active == chain.paths(3, 2, 1, 0)
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


@pytest.mark.parametrize("words", ["", "--compress", "--format raw"])
def test_image_holds_the_whole_chain(chain: Chain, cli: Cli, layers: Layers, words: str) -> None:
    chain.guest.scribble()
    image = layers.folder / "image"
    run = cli("image-create", chain.vm.qmp, "vda", image, *words.split())
    assert (run.returncode, run.stdout) == (0, "Image created\n"), run.stderr
    fmt = "raw" if "raw" in words else "qcow2"
    assert layers.content(image, fmt) == bytes(chain.guest.expected)
    if fmt == "qcow2":
        assert layers.chain(image) == [str(image)]
    assert not list(layers.folder.glob("*.part"))
    check_untouched(chain)


@named
def test_image_that_cannot_be_written_leaves_nothing(
    chain: Chain, cli: Cli, layers: Layers, unchanged: Unchanged
) -> None:
    with unchanged(chain.vm, layers.folder):
        for words, code, why in (
            ([layers.folder / "x", "--format", "nonsense"], 4, "nonsense"),
            ([layers.base], 4, "exists already"),
            (["nbd://localhost/x"], 2, "is no path"),
            ([layers.folder / "no" / "x"], 4, "there is no folder"),
        ):
            run = cli("image-create", chain.vm.qmp, "vda", *words)
            assert (run.returncode, run.stdout) == (code, ""), run.stderr
            assert why in run.stderr
    check_untouched(chain)


@named
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_image_that_is_interrupted(
    chain: Chain, cli: Cli, layers: Layers, signal_number: signal.Signals
) -> None:
    image = layers.folder / "image"
    words = ["image-create", str(chain.vm.qmp), "vda", str(image), "1", "--bytes"]
    program = subprocess.Popen(
        [sys.executable, "-m", "qmpmirror", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: any(job["type"] == "mirror" for job in chain.vm.execute("query-jobs")))
    program.send_signal(signal_number)
    program.wait(30)
    if signal_number is signal.SIGKILL:
        assert list(layers.folder.glob("*.part"))
        run = cli("recover", chain.vm.qmp, "--finish")
        assert "put away: the copy was to be temporary" in run.stdout
    assert not list(layers.folder.glob("*.part"))
    assert not image.exists()
    check_untouched(chain)


@named
async def test_client_that_dies_while_it_flattens(
    chain: Chain, connect: Connect, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        """As after SIGKILL: nothing is cleaned up."""

    async def die(*_: Any, **__: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("qmpmirror.operations.image_create._flatten", die)
        patch.setattr("qmpmirror.operations.image_create._forget", die)
        with pytest.raises(Died):
            async with connect(chain.vm) as machine:
                await machine.image_create("vd0", layers.folder / "image")
    assert list(layers.folder.glob("*.part"))
    async with connect(chain.vm) as machine:
        (found,) = await machine.recover(Way.LEAVE)
        assert found.action == "undone, and the file was removed"
        assert await machine.recover() == []
    assert not list(layers.folder.glob("*.part"))
    check_untouched(chain)


@named
@pytest.mark.parametrize("depth", ["", "--shallow"])
def test_backup(chain: Chain, cli: Cli, layers: Layers, depth: str) -> None:
    chain.guest.scribble()
    copy = layers.folder / "copy.qcow2"
    run = cli("backup", chain.vm.qmp, "vda", copy, *depth.split())
    assert (run.returncode, run.stdout) == (0, "Successfully copied\n"), run.stderr
    assert layers.content(copy) == bytes(chain.guest.expected)
    below = [str(layers.snap2), str(layers.snap1), str(layers.base)] if depth else []
    assert layers.chain(copy) == [str(copy), *below]
    folder = layers.folder / "all"
    folder.mkdir()
    run = cli("backup", chain.vm.qmp, "--all-disks", "--dest-dir", folder, "--json")
    *_, result = map(json.loads, run.stdout.splitlines())
    assert (result["outcome"], result["exit"]) == ("finished", 0)
    assert layers.content(folder / "vda.qcow2") == bytes(chain.guest.expected)
    refused = cli("backup", chain.vm.qmp, "vda", layers.folder / "other", "--pivot")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "neither pivots" in refused.stderr
    check_untouched(chain)
