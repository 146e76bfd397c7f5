# SPDX-License-Identifier: MIT
"""blockcommit: the chain gets shorter, and nothing that the guest wrote is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qmpmirror import ActiveCommit, InnerCommit, Phase, Way, errors
from tests.qemu.chained import WAYS, Chain, make

if TYPE_CHECKING:
    from qmpmirror.operations.blockcommit import CommitKeywords
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged


@pytest.fixture(params=WAYS)
def chain(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Chain:
    return make(boot, layers, request.param)


named = pytest.mark.parametrize("chain", ["blockdev"], indirect=True)


@pytest.mark.parametrize(
    ("top", "base", "left"),
    [(2, 1, (3, 1, 0)), (2, 0, (3, 0)), (1, 0, (3, 2, 0))],
    ids=["one", "two", "lowest"],
)
async def test_inner_images_are_committed(
    chain: Chain, connect: Connect, top: int, base: int, left: tuple[int, ...]
) -> None:
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit(
            "vd0", top=str(chain.images[top]), base=str(chain.images[base])
        )
        assert isinstance(commit, InnerCommit)
        chain.guest.scribble()
        result = await commit.end()
    assert result is not None
    assert (result.outcome, result.left, result.deleted) == (Phase.FINISHED, (), ())
    assert result.active == str(chain.images[3])
    assert chain.active == chain.paths(*left)
    assert chain.headers() == chain.paths(*left)
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()
    for number in range(base + 1, top + 1):
        assert not chain.is_open(number)
        assert chain.images[number].exists()


@pytest.mark.parametrize(("base", "left"), [(2, (2, 1, 0)), (0, (0,))], ids=["shallow", "deep"])
async def test_active_image_is_committed_and_left(
    chain: Chain, connect: Connect, base: int, left: tuple[int, ...]
) -> None:
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit(
            "vd0", base=str(chain.images[base]), active=True, delete=True
        )
        assert isinstance(commit, ActiveCommit)
        assert await commit.ready()
        chain.guest.scribble()
        result = await commit.pivot()
    assert (result.outcome, result.left) == (Phase.PIVOTED, ())
    assert result.active == str(chain.images[base])
    assert chain.active == chain.paths(*left)
    assert sorted(result.deleted) == [str(image) for image in chain.images[base + 1 :]]
    assert not any(image.exists() for image in chain.images[base + 1 :])
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


async def test_overlay_is_kept(chain: Chain, connect: Connect) -> None:
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit("vd0", shallow=True, active=True)
        assert isinstance(commit, ActiveCommit)
        await commit.ready()
        chain.guest.scribble()
        result = await commit.finish()
    assert (result.outcome, result.consistent) == (Phase.FINISHED, True)
    assert chain.active == chain.paths(3, 2, 1, 0)
    chain.guest.check()
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()
    # The base holds that instant: nothing of the overlay is needed for it.
    assert chain.tools.chain(chain.images[2])[0] == str(chain.images[2])


@pytest.mark.parametrize("mirroring", [False, True])
async def test_aborted_commit_loses_nothing(
    chain: Chain, connect: Connect, *, mirroring: bool
) -> None:
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit("vd0", active=True, bandwidth=0 if mirroring else 1)
        assert isinstance(commit, ActiveCommit)
        if mirroring:
            await commit.ready()
        chain.guest.scribble()
        result = await commit.abort(force=True)
        assert result.outcome is Phase.ABORTED
        assert chain.active == chain.paths(3, 2, 1, 0)
        chain.guest.check()
        chain.check_clean()
        again = await machine.blockcommit("vd0", active=True)
        assert isinstance(again, ActiveCommit)
        await again.ready()
        await again.pivot()
    chain.guest.check()
    chain.check_clean()


@pytest.mark.parametrize("active", [True, False])
async def test_bitmaps_go_with_the_data(chain: Chain, connect: Connect, *, active: bool) -> None:
    chain.vm.execute("block-dirty-bitmap-add", node=chain.node(3), name="since", persistent=True)
    chain.guest.scribble()
    top: CommitKeywords = {"active": True, "shallow": True}
    if not active:
        top = {"top": str(chain.images[2]), "base": str(chain.images[1])}
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit("vd0", **top)
        if isinstance(commit, ActiveCommit):
            await commit.ready()
            chain.guest.scribble()
            await commit.pivot()
        else:
            await commit.end()
    (bitmap,) = chain.bitmaps(2 if active else 3)
    assert (bitmap["name"], bitmap["persistent"]) == ("since", True)
    assert bitmap["count"] >= 5 * 4096
    chain.guest.check()
    chain.check_clean()


async def test_bitmaps_of_inner_images_are_merged(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    for image in (layers.snap1, layers.snap2):
        layers.images.add_bitmap(image, "since")
    layers.images.io(layers.snap2, "write -P 0x77 2M 64k")
    chain = make(boot, layers, "drive")
    async with connect(chain.vm) as machine:
        commit = await machine.blockcommit("vd0", top=str(layers.snap2), base=str(layers.snap1))
        assert isinstance(commit, InnerCommit)
        result = await commit.end()
    assert result is not None
    assert result.outcome is Phase.FINISHED
    (bitmap,) = chain.bitmaps(1)
    assert (bitmap["name"], bitmap["persistent"]) == ("since", True)
    assert bitmap["count"] >= 65536
    chain.check_clean()


@named
@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
@pytest.mark.parametrize("kind", ["inner", "active", "pivot"])
async def test_what_a_dead_client_leaves_is_recovered(
    chain: Chain, connect: Connect, kind: str, way: Way
) -> None:
    async with connect(chain.vm) as machine:
        if kind == "inner":
            await machine.blockcommit("vd0", top="img2", base="img1")
        else:
            then = "pivot" if kind == "pivot" else ""
            commit = await machine.blockcommit("vd0", active=True, base="img1", then=then)
            assert isinstance(commit, ActiveCommit)
            await commit.ready()
    chain.guest.scribble()
    async with connect(chain.vm) as machine:
        (would,) = await machine.recover(way, dry_run=True)
        assert would.action.startswith("would be ") or "would" in would.action
        (found,) = await machine.recover(way)
        assert (found.what, found.disk) == ("commit", "vda")
        if kind != "inner" and way is Way.LEAVE:
            assert found.action == "left running"
            await machine.recover(Way.UNDO)
        assert await machine.recover() == []
    if kind == "inner":
        assert chain.active == chain.paths(3, 1, 0)
    else:
        pivoted = kind == "pivot" and way is Way.FINISH
        assert chain.active == (chain.paths(1, 0) if pivoted else chain.paths(3, 2, 1, 0))
    chain.guest.check()
    chain.check_clean()


@named
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "commit of 'vda' active layer requires active flag"),
        ({"top": "img0"}, "top '.*base.*' in chain for 'vda' has no backing file"),
        ({"top": "img1", "base": "img2"}, "could not find base image '.*' beneath '.*' in chain"),
        ({"top": "img2", "active": True}, "active commit requested but '.*' is not active"),
        ({"top": "img2", "base": "img0", "shallow": True}, "is not immediately below"),
        ({"top": "nothing"}, "could not find image 'nothing' in chain for 'vda': there is .*snap3"),
        ({"active": True, "bandwidth": -1}, "bandwidth"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    chain: Chain,
    connect: Connect,
    unchanged: Unchanged,
    layers: Layers,
    options: CommitKeywords,
    why: str,
) -> None:
    async with connect(chain.vm) as machine:
        with (
            unchanged(chain.vm, layers.folder),
            pytest.raises((errors.Refused, errors.UsageError), match=why),
        ):
            await machine.blockcommit("vd0", **options)


async def test_base_that_another_disk_needs_is_not_written_to(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    chain = make(boot, layers, "blockdev")
    other = layers.images.create(layers.folder / "other.qcow2", backing=layers.base)
    file = {"driver": "file", "filename": str(other)}
    chain.vm.execute("blockdev-add", driver="qcow2", node_name="other", file=file, backing="img0")
    async with connect(chain.vm) as machine:
        with pytest.raises(errors.Refused, match=r"base\.qcow2 is below node other too"):
            await machine.blockcommit("vd0", active=True)
        assert await machine.jobs() == []
        commit = await machine.blockcommit("vd0", active=True, shallow=True)
        assert isinstance(commit, ActiveCommit)
        await commit.ready()
        await commit.pivot()
    chain.guest.check()


@pytest.mark.parametrize(
    ("words", "message", "left"),
    [
        ("--active --pivot --wait", "Successfully pivoted", (0,)),
        ("--pivot --shallow --verbose", "Successfully pivoted", (2, 1, 0)),
        ("--keep-overlay", "Commit complete, overlay image kept", (3, 2, 1, 0)),
        ("--active --wait", "Now in synchronized phase", (3, 2, 1, 0)),
        ("--active", "Active Block Commit started", (3, 2, 1, 0)),
        ("--top {2} --wait --verbose --delete", "Commit complete", (3, 0)),
        ("--top {2} --base {1} --wait --keep-relative", "Commit complete", (3, 1, 0)),
        ("--top {2} --base {1}", "Block Commit started", None),
    ],
)
def test_messages_of_virsh(
    chain: Chain, cli: Cli, words: str, message: str, left: tuple[int, ...] | None
) -> None:
    text = words.format(*chain.images)
    run = cli("blockcommit", chain.vm.qmp, "vda", *text.split())
    assert (run.returncode, run.stdout) == (0, f"{message}\n"), run.stderr
    if left is not None:
        assert chain.active == chain.paths(*left)
    if "--delete" in words:
        assert not chain.images[2].exists()
    cli("recover", chain.vm.qmp, "--undo")
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


@named
def test_blockjob_steers_a_commit(chain: Chain, cli: Cli) -> None:
    assert cli("blockcommit", chain.vm.qmp, "vda", "--active", "--wait").returncode == 0
    shown = cli("blockjob", chain.vm.qmp, "vda")
    assert shown.stdout == "Active Block Commit: [100.00 %] mirroring\n"
    refused = cli("blockjob", chain.vm.qmp, "vda", "--synchronous-writes")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "is no copy" in refused.stderr
    done = cli("blockjob", chain.vm.qmp, "vda", "--pivot")
    assert (done.returncode, done.stdout) == (0, "Successfully pivoted\n")
    assert chain.active == chain.paths(0)
    chain.check_clean()


@named
def test_timeout_aborts(chain: Chain, cli: Cli) -> None:
    words = ["--active", "--timeout", "0.5", "--bytes", "--bandwidth", "1"]
    run = cli("blockcommit", chain.vm.qmp, "vda", *words)
    assert (run.returncode, run.stdout) == (5, "Commit aborted\n")
    assert run.stderr == (
        "not there within 0.5 s: it is aborted\n"
        f"{chain.images[3]} is whole; the next time goes on with what was done by now\n"
    )
    assert chain.active == chain.paths(3, 2, 1, 0)
    chain.guest.check()
    chain.check_clean()
