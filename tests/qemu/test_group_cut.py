# SPDX-License-Identifier: MIT
"""What can come between a group and its cut, or go wrong in it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import Phase, errors
from qmpmirror.operations import group as grouping
from qmpmirror.testing.fake import FakeError
from qmpmirror.testing.oneshot import CommandError
from tests.qemu.disks import Disks, make_disks, mirroring
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from qmpmirror.testing import ImageTools
    from qmpmirror.testing.fake import FakeMonitor
    from tests.qemu.conftest import Boot, Unchanged


@pytest.fixture
def disks(boot: Boot, images: ImageTools, tmp_path: Path) -> Disks:
    return make_disks(boot, images, tmp_path, 2)


@pytest.fixture
def fake(disks: Disks, fake_monitor: Callable[..., FakeMonitor]) -> FakeMonitor:
    return fake_monitor(upstream=disks.vm.qmp)


async def test_a_refused_finalize_is_repeated(disks: Disks, fake: FakeMonitor) -> None:
    async with mirroring(disks, fake) as group:
        refusals = [FakeError("not now")]

        def finalize(arguments: dict[str, Any]) -> Any:
            if arguments["id"] == group.copies[0].id and refusals:
                raise refusals.pop()
            return disks.vm.execute("job-finalize", arguments)

        fake.on("job-finalize", finalize)
        assert (await group.pivot()).outcome is Phase.PIVOTED
    disks.write(0x41)


async def test_one_that_cannot_be_finalized_goes_on_without_a_copy(
    disks: Disks, fake: FakeMonitor
) -> None:
    async with mirroring(disks, fake) as group:

        def finalize(arguments: dict[str, Any]) -> Any:
            if arguments["id"] == group.copies[0].id:
                raise FakeError("never")
            return disks.vm.execute("job-finalize", arguments)

        fake.on("job-finalize", finalize)
        result = await group.pivot()
        assert result.outcome is Phase.FAILED
        assert [each.outcome for each in result.results] == [Phase.ABORTED, Phase.PIVOTED]
        assert result.results[0].notes == ("QEMU refused to finalize it: never",)
        assert [cut.disk for cut in result.cuts] == [result.results[1].disk]
    assert disks.active == [disks.top(0), disks.copy(1)]
    assert not disks.copy(0).exists()
    disks.write(0x42)
    assert disks.vm.execute("query-jobs") == []


async def test_one_that_refuses_to_end_rolls_back(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor
) -> None:
    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:

            def complete(arguments: dict[str, Any]) -> Any:
                if arguments["id"] == group.copies[1].id:
                    raise FakeError("not me")
                return disks.vm.execute("job-complete", arguments)

            fake.on("job-complete", complete)
            with pytest.raises(errors.JobFailed, match="not me; all copies were rolled back"):
                await group.pivot()
        disks.write(0)


async def test_somebody_cancels_one_while_all_wait(disks: Disks, fake: FakeMonitor) -> None:
    async with mirroring(disks, fake) as group:

        def finalize(arguments: dict[str, Any]) -> Any:
            if len(fake.arguments_of("job-finalize")) == 1:
                disks.vm.execute("job-cancel", id=group.copies[1].id)
            try:
                return disks.vm.execute("job-finalize", arguments)
            except CommandError as error:
                raise FakeError(str(error)) from None

        fake.on("job-finalize", finalize)
        result = await group.pivot()
        assert result.outcome is Phase.FAILED
        assert [each.outcome for each in result.results] == [Phase.PIVOTED, Phase.ABORTED]
    assert disks.active == [disks.copy(0), disks.top(1)]
    disks.write(0x43)


async def test_somebody_cancels_one_before_all_wait(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor
) -> None:
    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:

            def complete(arguments: dict[str, Any]) -> Any:
                reply = disks.vm.execute("job-complete", arguments)
                if len(fake.arguments_of("job-complete")) == 1:
                    disks.until_pending(1)
                    disks.vm.execute("job-cancel", id=arguments["id"])
                return reply

            fake.on("job-complete", complete)
            with pytest.raises(errors.JobFailed, match="all copies were rolled back"):
                await group.pivot()
            assert "job-finalize" not in fake.commands
        disks.write(0)


async def test_cancelled_while_some_wait_rolls_back(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor
) -> None:
    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:

            def complete(arguments: dict[str, Any]) -> Any:
                if len(fake.arguments_of("job-complete")) == 1:
                    return disks.vm.execute("job-complete", arguments)
                disks.until_pending(1)
                task.cancel()
                return {}

            fake.on("job-complete", complete)
            task = asyncio.create_task(group.pivot())
            await asyncio.wait({task})
            assert task.cancelled()
            assert group.result is not None
            assert group.result.outcome is Phase.ABORTED
        disks.write(0)


async def test_cancelled_while_being_finalized_is_seen_through(
    disks: Disks, fake: FakeMonitor
) -> None:
    async with mirroring(disks, fake) as group:

        def finalize(arguments: dict[str, Any]) -> Any:
            task.cancel()
            return disks.vm.execute("job-finalize", arguments)

        fake.on("job-finalize", finalize)
        task = asyncio.create_task(group.pivot())
        await asyncio.wait({task})
        assert task.cancelled()
        assert group.result is not None
        assert group.result.outcome is Phase.PIVOTED
    assert disks.active == [disks.copy(0), disks.copy(1)]
    assert disks.vm.execute("query-jobs") == []


async def test_what_cannot_be_ended_yet_changes_nothing(disks: Disks, fake: FakeMonitor) -> None:
    async with mirroring(disks, fake) as group:
        await group.copies[1].pause()
        await asyncio.to_thread(until, lambda: "standby" in disks.statuses())
        await group.copies[1].job.refresh()
        with pytest.raises(errors.JobError, match=r"the copy of .* is paused"):
            await group.pivot()
        nodes = disks.vm.execute("query-named-block-nodes")
        assert not [b for n in nodes for b in n.get("dirty-bitmaps", ()) if b.get("name")]
        await group.copies[1].resume()
        await group.ready()
        assert (await group.pivot()).outcome is Phase.PIVOTED


async def test_nothing_is_ended_when_the_guest_cannot_be_quiesced(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor
) -> None:
    @asynccontextmanager
    async def refuse() -> AsyncIterator[None]:
        raise errors.Refused("no agent")
        yield

    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:
            group.around_cut = refuse
            with pytest.raises(errors.Refused, match="no agent"):
                await group.pivot()
            assert "job-complete" not in fake.commands


async def test_a_guest_is_not_held_for_ever(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "QUIESCED_SECONDS", 0.1)
    held: list[str] = []

    @asynccontextmanager
    async def hold() -> AsyncIterator[None]:
        held.append("frozen")
        try:
            yield
        finally:
            held.append("thawed")

    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:
            group.around_cut = hold
            fake.on("job-complete", {})
            with pytest.raises(errors.DeadlineExceeded, match="of a quiesced guest"):
                await group.pivot()
    assert held == ["frozen", "thawed"]


async def test_a_cut_is_good_even_if_the_guest_cannot_be_thawed(
    disks: Disks, fake: FakeMonitor
) -> None:
    @asynccontextmanager
    async def hold() -> AsyncIterator[None]:
        yield
        raise errors.Refused("not thawed")

    async with mirroring(disks, fake) as group:
        group.around_cut = hold
        result = await group.pivot()
        assert (result.outcome, result.left) == (Phase.PIVOTED, ("not thawed",))
    assert disks.active == [disks.copy(0), disks.copy(1)]


async def test_no_cut_without_a_watchdog(
    disks: Disks, unchanged: Unchanged, fake: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with unchanged(disks.vm, disks.folder):
        async with mirroring(disks, fake) as group:
            with pytest.raises(errors.Refused, match=r"the watchdog cannot be started: .*No such"):
                await group.pivot()
            assert "job-complete" not in fake.commands
