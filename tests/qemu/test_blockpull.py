# SPDX-License-Identifier: MIT
"""blockpull: the active image takes in what lies below it, and the guest notices nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase, Pull, Way, errors
from tests.qemu.chained import WAYS, Chain, make

if TYPE_CHECKING:
    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged


@pytest.fixture(params=WAYS)
def chain(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Chain:
    return make(boot, layers, request.param)


named = pytest.mark.parametrize("chain", ["blockdev"], indirect=True)


@pytest.mark.parametrize(("base", "left"), [(None, (3,)), (0, (3, 0)), (1, (3, 1, 0))])
async def test_what_lies_below_is_pulled(
    chain: Chain, connect: Connect, base: int | None, left: tuple[int, ...]
) -> None:
    async with connect(chain.vm) as machine:
        text = "" if base is None else str(chain.images[base])
        pull = await machine.blockpull("vd0", base=text)
        chain.guest.scribble()
        result = await pull.end()
    assert result is not None
    assert (result.outcome, result.left) == (Phase.FINISHED, ())
    assert result.active == str(chain.images[3])
    assert chain.active == chain.paths(*left)
    assert chain.headers() == chain.paths(*left)
    for number in {0, 1, 2} - set(left):
        assert not chain.is_open(number)
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


async def test_disk_without_a_backing_file_is_done_at_once(chain: Chain, connect: Connect) -> None:
    async with connect(chain.vm) as machine:
        for _ in range(2):
            result = await (await machine.blockpull("vd0")).end()
            assert result is not None
            assert result.outcome is Phase.FINISHED
    assert chain.active == chain.paths(3)
    chain.guest.check()
    chain.check_clean()


async def test_pull_that_is_given_up_can_be_repeated(chain: Chain, connect: Connect) -> None:
    async with connect(chain.vm) as machine:
        pull = await machine.blockpull("vd0", bandwidth=1)
        chain.guest.scribble()
        assert await pull.end(seconds=0.2) is None
        result = await pull.abort()
        assert result.outcome is Phase.ABORTED
        assert chain.active == chain.paths(3, 2, 1, 0)
        chain.guest.check()
        chain.check_clean()
        again = await (await machine.blockpull("vd0")).end()
        assert again is not None
        assert again.outcome is Phase.FINISHED
    chain.guest.check()


async def test_bitmaps_of_pulled_images_are_merged(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    layers.images.add_bitmap(layers.snap2, "since")
    layers.images.io(layers.snap2, "write -P 0x77 2M 64k")
    snap3 = layers.images.create(layers.folder / "snap3.qcow2", backing=layers.snap2)
    layers.images.add_bitmap(snap3, "since")
    vm = boot(
        *("-drive", f"if=none,id=d0,format=qcow2,file={snap3}"),
        *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
    )
    async with connect(vm) as machine:
        result = await (await machine.blockpull("vd0", base=str(layers.snap1))).end()
    assert result is not None
    assert result.outcome is Phase.FINISHED
    (drive,) = [d for d in vm.execute("query-block") if "virtio" in d.get("qdev", "")]
    found = {b["name"]: b for b in drive["inserted"]["dirty-bitmaps"] if b.get("name")}
    assert set(found) == {"since"}
    assert found["since"]["count"] >= 65536
    assert vm.execute("query-jobs") == []


@named
@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
@pytest.mark.parametrize("ended", [True, False])
async def test_what_a_dead_client_leaves_is_recovered(
    chain: Chain, connect: Connect, monkeypatch: pytest.MonkeyPatch, way: Way, *, ended: bool
) -> None:
    end = Pull.end

    async def end_unlimited(pull: Pull, **options: Any) -> Any:
        # Not before: 7.2 crashes when a pull ends while somebody looks at the nodes.
        await pull.set_bandwidth(0)
        return await end(pull, **options)

    monkeypatch.setattr(Pull, "end", end_unlimited)
    async with connect(chain.vm) as machine:
        pull = await machine.blockpull("vd0", base="img0", bandwidth=0 if ended else 1)
        if ended:
            await pull.job.wait(lambda life: life.concluded)
    async with connect(chain.vm) as machine:
        (would,) = await machine.recover(way, dry_run=True)
        assert would.what == "pull"
        (found,) = await machine.recover(way)
        if not ended and way is Way.LEAVE:
            assert found.action == "left running"
            await machine.recover(Way.UNDO)
        assert await machine.recover() == []
    done = ended or way is Way.FINISH
    assert chain.active == (chain.paths(3, 0) if done else chain.paths(3, 2, 1, 0))
    chain.guest.check()
    chain.check_clean()
    assert chain.is_open(2) is not done


@named
@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("img3", "base 'img3' is the active image of 'vda'"),
        ("nothing", "could not find image 'nothing' in chain for 'vda': there is .*snap3"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    chain: Chain, connect: Connect, unchanged: Unchanged, layers: Layers, base: str, why: str
) -> None:
    async with connect(chain.vm) as machine:
        with unchanged(chain.vm, layers.folder), pytest.raises(errors.Refused, match=why):
            await machine.blockpull("vd0", base=base)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wait", "Pull complete"),
        ("--wait --verbose --base {0}", "Pull complete"),
        ("--wait --base {1} --keep-relative", "Pull complete"),
        ("", "Block Pull started"),
    ],
)
def test_messages_of_virsh(chain: Chain, cli: Cli, words: str, message: str) -> None:
    run = cli("blockpull", chain.vm.qmp, "vda", *words.format(*chain.images).split())
    assert (run.returncode, run.stdout) == (0, f"{message}\n"), run.stderr
    if "--keep-relative" in words:
        info = chain.tools.info(chain.images[3])
        assert info["backing-filename"] == chain.images[1].name
    cli("recover", chain.vm.qmp, "--finish")
    chain.guest.scribble()
    chain.guest.check()
    chain.check_clean()


@named
def test_timeout_aborts(chain: Chain, cli: Cli) -> None:
    run = cli("blockpull", chain.vm.qmp, "vda", "1", "--bytes", "--timeout", "0.5")
    assert (run.returncode, run.stdout) == (5, "Pull aborted\n")
    assert chain.active == chain.paths(3, 2, 1, 0)
    chain.guest.check()
    chain.check_clean()


@named
def test_blockjob_shows_a_pull_and_ends_it(chain: Chain, cli: Cli) -> None:
    assert cli("blockpull", chain.vm.qmp, "vda", "1", "--bytes").returncode == 0
    assert cli("blockjob", chain.vm.qmp, "vda").stdout.startswith("Block Pull: [")
    refused = cli("blockjob", chain.vm.qmp, "vda", "--pivot")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "ends by itself" in refused.stderr
    ended = cli("blockjob", chain.vm.qmp, "vda", "--abort")
    assert (ended.returncode, ended.stdout) == (0, "Job aborted\n")
    chain.guest.check()
    chain.check_clean()
