# SPDX-License-Identifier: MIT
"""snapshot-create-as: overlays over one disk or several, all at one instant or none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import errors
from qmpmirror.monitor import Monitor
from tests.qemu.chained import WAYS, Chain, make
from tests.qemu.disks import Disks, make_disks

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import ImageTools
    from tests.qemu.conftest import Boot, Cli, Connect, GuestAgent, Layers, Unchanged


@pytest.fixture(params=WAYS)
def chain(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Chain:
    return make(boot, layers, request.param)


@pytest.fixture
def disks(boot: Boot, images: ImageTools, tmp_path: Path) -> Disks:
    return make_disks(boot, images, tmp_path, 4)


named = pytest.mark.parametrize("chain", ["blockdev"], indirect=True)


async def test_guest_goes_on_in_the_overlay(chain: Chain, connect: Connect, layers: Layers) -> None:
    overlay = layers.folder / "overlay.qcow2"
    chain.guest.scribble()
    async with connect(chain.vm) as machine:
        result = await machine.snapshot({"vd0": overlay})
        assert (await machine.disk("vd0")).path == str(overlay)
    (snapshot,) = result.snapshots
    assert (snapshot.source, snapshot.overlay) == (str(chain.images[3]), str(overlay))
    assert layers.chain(overlay) == [str(overlay), *map(str, reversed(chain.images))]
    before = layers.content(chain.images[3])
    chain.guest.scribble()
    chain.guest.check()
    assert layers.content(chain.images[3]) == before
    assert chain.vm.execute("query-jobs") == []


async def test_all_or_none(disks: Disks, tmp_path: Path, unchanged: Unchanged) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    overlays: dict[str, Any] = {f"vd{n}": folder / f"o{n}" for n in disks}
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        with unchanged(disks.vm, folder):
            bad = overlays | {"vd3": folder / "missing" / "o3"}
            with pytest.raises(errors.DestinationError, match="missing/o3"):
                await machine.snapshot(bad)
            with pytest.raises(errors.DiskNotFound):
                await machine.snapshot(overlays | {"vd9": folder / "o9"})
            with pytest.raises(errors.UsageError, match="was given twice"):
                await machine.snapshot(overlays | {"vd3": folder / "o0"})
        result = await machine.snapshot(overlays)
    assert [s.overlay for s in result.snapshots] == [str(path) for path in overlays.values()]
    assert disks.active == list(overlays.values())


async def test_transaction_that_fails_leaves_nothing(
    disks: Disks, tmp_path: Path, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Monitor.execute

    async def fail(self: Monitor, command: str, arguments: Any = None, **options: Any) -> Any:
        if command == "transaction":
            arguments["actions"][-1]["data"]["node"] = "nothing"
        return await execute(self, command, arguments, **options)

    monkeypatch.setattr(Monitor, "execute", fail)
    folder = tmp_path / "overlays"
    folder.mkdir()
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        with unchanged(disks.vm, folder), pytest.raises(errors.CommandFailed, match="nothing"):
            await machine.snapshot({f"vd{n}": folder / f"o{n}" for n in disks})


async def test_persistent_bitmaps_go_on_in_the_overlay(
    chain: Chain, connect: Connect, layers: Layers
) -> None:
    add: dict[str, dict[str, Any]] = {
        "stored": {"persistent": True, "granularity": 131072},
        "passing": {},
        "disabled": {"persistent": True, "disabled": True},
    }
    for name, options in add.items():
        chain.vm.execute("block-dirty-bitmap-add", node=chain.node(3), name=name, **options)
    overlay = layers.folder / "overlay.qcow2"
    async with connect(chain.vm) as machine:
        await machine.snapshot({"vd0": overlay})
        chain.guest.scribble()
        nodes = (await machine.graph()).nodes.values()
    (node,) = [n for n in nodes if n.driver == "qcow2" and n.filename.endswith("overlay.qcow2")]
    (bitmap,) = node.bitmaps
    assert (bitmap.name, bitmap.granularity, bitmap.persistent) == ("stored", 131072, True)
    assert bitmap.count > 0


async def test_overlay_of_the_user_is_used(chain: Chain, connect: Connect, layers: Layers) -> None:
    overlay = layers.images.create(layers.folder / "mine.qcow2", backing=chain.images[3])
    async with connect(chain.vm) as machine:
        await machine.snapshot({"vd0": overlay}, reuse_external=True)
        assert (await machine.disk("vd0")).path == str(overlay)
    chain.guest.scribble()
    chain.guest.check()


@named
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_what_a_dead_client_leaves_is_recovered(
    chain: Chain,
    connect: Connect,
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    execute = Monitor.execute

    async def hang_up(self: Monitor, command: str, *rest: Any, **options: Any) -> Any:
        if command == "transaction":
            if moment == "after":
                await execute(self, command, *rest, **options)
            await self.client.disconnect()
            raise errors.ConnectionLost("cut off", job_id="")
        return await execute(self, command, *rest, **options)

    overlay = layers.folder / "overlay.qcow2"
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "execute", hang_up)
        with pytest.raises(errors.ConnectionLost):
            async with connect(chain.vm) as machine:
                await machine.snapshot({"vd0": overlay})
    async with connect(chain.vm) as machine:
        (found,) = await machine.recover()
        assert await machine.recover() == []
        assert (await machine.disk("vd0")).path == str(
            overlay if moment == "after" else chain.images[3]
        )
    assert found.left == ()
    assert overlay.exists() is (moment == "after")
    assert chain.vm.execute("query-jobs") == []
    chain.guest.scribble()
    chain.guest.check()


@named
def test_command_line(chain: Chain, cli: Cli, layers: Layers) -> None:
    words = ["--disk-only", "--atomic", "--no-metadata"]
    run = cli("snapshot-create-as", chain.vm.qmp, "snap4", *words)
    assert (run.returncode, run.stdout) == (0, "Domain snapshot snap4 created\n"), run.stderr
    overlay = layers.folder / "snap3.snap4"
    assert run.stderr.startswith(f"vda is on {overlay}; open it next time with: -blockdev '")
    spec = f"vda,snapshot=external,file={layers.folder}/second.qcow2"
    run = cli("snapshot-create-as", chain.vm.qmp, "--disk-only", "--diskspec", spec, "--json")
    (result,) = map(json.loads, run.stdout.splitlines())
    assert (result["outcome"], result["exit"]) == ("created", 0)
    assert result["disks"][0]["source"] == str(overlay)
    chain.guest.scribble()
    chain.guest.check()
    # And back again: both overlays are committed.
    base = str(chain.images[3])
    run = cli("blockcommit", chain.vm.qmp, "vda", "--base", base, "--pivot", "--delete")
    assert (run.returncode, run.stdout) == (0, "Successfully pivoted\n"), run.stderr
    assert not overlay.exists()
    assert chain.active == chain.paths(3, 2, 1, 0)
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


@named
@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        ("s1", 2, "--disk-only is needed"),
        ("s1 --disk-only --quiesce", 2, "--quiesce and --agent need each other"),
        ("s1 --disk-only --diskspec vda,snapshot=internal", 2, "only external snapshots"),
        ("s1 --disk-only --diskspec vda,fil=x", 2, "fil is unknown"),
        ("s1 --disk-only --diskspec vdb", 4, "disk 'vdb' not found"),
        ("s1 --disk-only --diskspec vda,snapshot=no", 4, "no disk to take a snapshot of"),
        ("s1 --disk-only --diskspec vda,file={0}", 4, "base.qcow2"),
    ],
)
def test_what_makes_no_sense_is_refused(
    chain: Chain, cli: Cli, layers: Layers, unchanged: Unchanged, words: str, code: int, why: str
) -> None:
    with unchanged(chain.vm, layers.folder):
        text = words.format(*chain.images)
        run = cli("snapshot-create-as", chain.vm.qmp, *text.split())
    assert (run.returncode, run.stdout) == (code, "")
    assert why in run.stderr
    assert len(run.stderr.splitlines()) == 1


@named
@pytest.mark.parametrize("count", [3, 0])
def test_quiesced(chain: Chain, cli: Cli, agent: GuestAgent, count: int) -> None:
    path, asked = agent(freeze={"return": count})
    words = ["snapshot-create-as", chain.vm.qmp, "s1", "--disk-only", "--quiesce", "--agent", path]
    run = cli(*words)
    assert (run.returncode, run.stdout) == (0, "Domain snapshot s1 created\n")
    warned = "warning: the guest agent has frozen no file system" in run.stderr
    assert warned is (count == 0)
    assert asked == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
    assert chain.active[0] == "snap3.s1"


@named
@pytest.mark.parametrize("trouble", ["freeze", "thaw"])
def test_an_agent_that_fails(
    chain: Chain, cli: Cli, layers: Layers, agent: GuestAgent, unchanged: Unchanged, trouble: str
) -> None:
    error = {"error": {"class": "GenericError", "desc": "stuck"}}
    path, asked = agent(**{trouble: error})
    words = ["snapshot-create-as", chain.vm.qmp, "s1", "--disk-only", "--quiesce", "--agent", path]
    if trouble == "freeze":
        with unchanged(chain.vm, layers.folder):
            run = cli(*words)
        assert (run.returncode, run.stdout) == (4, "")
    else:
        run = cli(*words)
        assert (run.returncode, run.stdout) == (7, "Domain snapshot s1 created\n")
        assert "file systems may still be frozen" in run.stderr
    assert "stuck" in run.stderr
    # Also when the freeze was refused: some of them may be frozen.
    assert asked == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


@named
def test_a_snapshot_is_not_shown_as_a_job(chain: Chain, cli: Cli) -> None:
    for name in ("s1", "s2"):
        assert cli("snapshot-create-as", chain.vm.qmp, name, "--disk-only").returncode == 0
    shown = cli("domblklist", chain.vm.qmp, "--chain").stdout
    assert "snap3.s1" in shown
    assert "under way" not in shown
