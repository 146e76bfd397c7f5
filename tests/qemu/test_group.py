# SPDX-License-Identifier: MIT
"""Several disks that are ended at one instant: all of them, or none."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import Phase, errors
from qmpmirror.operations.options import Options
from qmpmirror.testing.fake import FakeError
from qmpmirror.testing.graph import files_in
from qmpmirror.testing.launcher import NbdServer
from tests.qemu.disks import SIZE, UNIT, Disks, make_disks, mirroring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qmpmirror.testing import ImageTools
    from qmpmirror.testing.fake import FakeMonitor
    from tests.qemu.conftest import Boot, Unchanged

    Factory = Callable[..., FakeMonitor]
    Make = Callable[[int], Disks]


@pytest.fixture
def make(boot: Boot, images: ImageTools, tmp_path: Path) -> Make:
    return lambda count: make_disks(boot, images, tmp_path, count)


@pytest.fixture
def disks(make: Make) -> Disks:
    return make(2)


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with little room: 640 KiB, or as a parameter says."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = getattr(request, "param", "640k")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, stdin=subprocess.DEVNULL).returncode:
        pytest.skip("not permitted to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def server(images: ImageTools, tmp_path: Path) -> Iterator[NbdServer]:
    image = images.create(tmp_path / "served", SIZE, fmt="raw")
    with NbdServer(image=image, qemu=images.qemu, directory=tmp_path) as started:
        yield started


@pytest.fixture
def fake(disks: Disks, fake_monitor: Factory) -> FakeMonitor:
    return fake_monitor(upstream=disks.vm.qmp)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_all_end_together(make: Make, count: int, ending: str) -> None:
    disks = make(count)
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        group = await machine.blockcopy_group(disks.members(), max_freeze=30)
        disks.write(0x21)
        assert await group.ready()
        disks.write(0x22)
        result = await getattr(group, ending)()
        assert await machine.jobs() == []
    wanted = {"pivot": Phase.PIVOTED, "finish": Phase.FINISHED}[ending]
    assert (result.outcome, group.result) == (wanted, result)
    assert [Path(each.destination) for each in result.results] == [disks.copy(n) for n in disks]
    assert [cut.disk for cut in result.cuts] == [each.disk for each in result.results]
    # The last to stand still did so before the first went on.
    assert max(cut.pending for cut in result.cuts) <= min(cut.finalized for cut in result.cuts)
    assert result.longest_freeze >= max(cut.freeze for cut in result.cuts)
    assert disks.active == [disks.copy(n) if ending == "pivot" else disks.top(n) for n in disks]
    disks.write(0x23)
    disks.vm.stop()
    for number in disks:
        disks.check_copy(number, 0x21, 0x22, *([0x23] if ending == "pivot" else [None]))


@pytest.mark.parametrize("phase", ["copying", "mirroring"])
async def test_abort_leaves_nothing(make: Make, unchanged: Unchanged, phase: str) -> None:
    disks = make(4)
    pinned = {"bandwidth": 1, "buf_size": 65536} if phase == "copying" else {}
    with unchanged(disks.vm, disks.folder):
        async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
            group = await machine.blockcopy_group(disks.members(**pinned))
            if phase == "mirroring":
                await group.ready()
            result = await group.abort()
        assert (result.outcome, result.cuts) == (Phase.ABORTED, ())
        assert [each.removed for each in result.results] == [True] * 4


async def test_progress_is_that_of_all(disks: Disks) -> None:
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        group = await machine.blockcopy_group(disks.members())
        reports = [each async for each in group.progress(0.01)]
        assert all(len(each) == 2 for each in reports)
        assert {progress.phase for progress in reports[-1]} == {Phase.MIRRORING}
        await group.abort()


async def test_one_that_cannot_start_takes_the_others_back(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor
) -> None:
    def refuse(arguments: dict[str, Any]) -> Any:
        if "vd1" in arguments["device"] or arguments["device"] == "fmt1":
            raise FakeError("not this one")
        return disks.vm.execute("blockdev-mirror", arguments)

    with unchanged(disks.vm, disks.folder):
        fake.on("blockdev-mirror", refuse)
        async with fake, qmpmirror.connect(str(fake.path)) as machine:
            with pytest.raises(errors.CommandFailed, match="not this one"):
                await machine.blockcopy_group(disks.members())
        assert fake.commands.count("blockdev-mirror") == 2


async def test_what_cannot_work_is_refused_before_anything_starts(
    disks: Disks, unchanged: Unchanged
) -> None:
    first, second = disks.members()
    detour = str(disks.folder / "." / ".." / disks.folder.name / "copy0")
    bad: list[tuple[list[qmpmirror.Member], dict[str, Any], str]] = [
        ([], {}, "no disk was given"),
        ([first, qmpmirror.Member("vd0", second.destination)], {}, "disk '.*' was given twice"),
        ([first, qmpmirror.Member("vd1", first.destination)], {}, "copy0 was given twice"),
        ([first, qmpmirror.Member("vd1", detour)], {}, "copy0 was given twice"),
        ([first, second], {"max_freeze": 0}, "max-freeze 0 s is no time at all"),
        ([first, qmpmirror.Member("vd7", "/x")], {}, "vd7"),
        ([first, qmpmirror.Member("vd1", "/nowhere/x")], {}, "/nowhere"),
        ([first, qmpmirror.Member("vd1", str(disks.top(1)))], {}, "top1"),
    ]
    with unchanged(disks.vm, disks.folder):
        async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
            for members, options, words in bad:
                with pytest.raises((errors.UsageError, errors.Refused), match=words):
                    await machine.blockcopy_group(members, **options)
            assert await machine.jobs() == []


async def test_a_disk_that_runs_out_of_space_while_copying(
    disks: Disks, unchanged: Unchanged, small: Path
) -> None:
    with unchanged(disks.vm, disks.folder):
        async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
            first, second = disks.members()
            full = qmpmirror.Member(second.disk, str(small / "copy"), Options(format="qcow2"))
            group = await machine.blockcopy_group([first, full])
            with pytest.raises(
                errors.JobFailed, match=r"the copy of .* failed: No space"
            ) as raised:
                await group.ready()
            assert raised.value.reason == "No space left on device"
            assert "all copies were rolled back" in str(raised.value)
            assert group.result is not None
            assert [r.outcome for r in group.result.results] == [Phase.ABORTED, Phase.FAILED]
        disks.write(0)
    assert files_in(small) == frozenset()


async def test_a_destination_that_goes_while_copying(
    disks: Disks, unchanged: Unchanged, server: NbdServer
) -> None:
    with unchanged(disks.vm, disks.folder):
        async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
            first, second = disks.members()
            slow = Options(format="raw", bandwidth=1, buf_size=UNIT)
            group = await machine.blockcopy_group(
                [first, qmpmirror.Member(second.disk, server.uri, slow)]
            )
            server.kill()
            with contextlib.suppress(errors.CommandFailed):  # it may have failed by now
                await group.copies[1].set_bandwidth(0)
            with pytest.raises(errors.JobFailed, match="all copies were rolled back") as raised:
                await group.ready()
            assert raised.value.job_id == group.copies[1].id
            assert await machine.jobs() == []
        disks.write(0)


@pytest.mark.parametrize("small", ["2m"], indirect=True)
async def test_a_disk_that_runs_out_of_space_while_mirroring(disks: Disks, small: Path) -> None:
    async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
        first, second = disks.members()
        full = qmpmirror.Member(first.disk, str(small / "copy"), Options(shallow=True))
        group = await machine.blockcopy_group([full, second])
        await group.ready()
        disks.vm.io("vd0", f"write -P 0x61 0 {SIZE}")
        with pytest.raises(errors.JobFailed, match="all copies were rolled back") as raised:
            await group.pivot()
        assert raised.value.reason == "No space left on device"
        assert await machine.jobs() == []
    assert disks.active == [disks.top(n) for n in disks]
    assert files_in(small) == frozenset()
    assert not disks.copy(1).exists()
    disks.vm.io("vd0", f"read -P 0x61 0 {SIZE}")
    disks.write(0x62)


@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_a_destination_that_goes_while_mirroring(
    disks: Disks, unchanged: Unchanged, server: NbdServer, ending: str
) -> None:
    disks.write(0)
    with unchanged(disks.vm, disks.folder):
        async with qmpmirror.connect(str(disks.vm.qmp)) as machine:
            first, second = disks.members()
            far = qmpmirror.Member(second.disk, server.uri, Options(format="raw"))
            group = await machine.blockcopy_group([first, far])
            await group.ready()
            server.kill()
            disks.vm.io("vd1", "write -P 0 6M 64k")
            with pytest.raises(errors.JobFailed, match="all copies were rolled back") as raised:
                await getattr(group, ending)()
            assert raised.value.reason
            assert raised.value.job_id == group.copies[1].id
            assert await machine.jobs() == []


@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_a_destination_that_goes_at_the_cut(
    disks: Disks, unchanged: Unchanged, server: NbdServer, fake: FakeMonitor, ending: str
) -> None:
    command = {"pivot": "job-complete", "finish": "block-job-cancel"}[ending]
    pending: list[bool] = []

    def end(arguments: dict[str, Any]) -> Any:
        if len(fake.arguments_of(command)) == 2:
            disks.until_pending(1)
            server.kill()
            pending.append(True)
        return disks.vm.execute(command, arguments)

    with unchanged(disks.vm, disks.folder):
        async with fake, qmpmirror.connect(str(fake.path)) as machine:
            first, second = disks.members()
            far = qmpmirror.Member(second.disk, server.uri, Options(format="raw"))
            group = await machine.blockcopy_group([first, far], max_freeze=30)
            await group.ready()
            fake.on(command, end)
            with pytest.raises(errors.JobFailed, match="all copies were rolled back"):
                await getattr(group, ending)()
        assert pending
        disks.write(0)


@pytest.mark.parametrize("ending", ["pivot", "finish"])
async def test_writes_do_not_wait_longer_than_allowed(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor, ending: str
) -> None:
    command = {"pivot": "job-complete", "finish": "block-job-cancel"}[ending]

    def end(arguments: dict[str, Any]) -> Any:
        # As if the guest wrote too fast for the second one to end.
        return disks.vm.execute(command, arguments) if fake.commands.count(command) == 1 else {}

    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake, max_freeze=0.05) as group:
            fake.on(command, end)
            with pytest.raises(errors.DeadlineExceeded, match="waited more than 50 ms; all copies"):
                await getattr(group, ending)()
            assert "job-finalize" not in fake.commands
            assert group.result is not None
            assert group.result.outcome is Phase.ABORTED
        disks.write(0)
