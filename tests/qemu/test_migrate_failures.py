# SPDX-License-Identifier: MIT
"""A migration that fails or is cancelled at each of its stages: the guest stays at the source."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import ConnectionLost, MigrationFailed, Refused
from qmpmirror.operations.incoming import Incoming
from qmpmirror.operations.outgoing import Outgoing
from tests.qemu.moving import make
from tests.qemu.program import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from qmpmirror import MigrationResult
    from tests.qemu.conftest import Boot, Connect, Layers
    from tests.qemu.moving import Pair

    Stage = Callable[[Pair], dict[str, Any]]

STAGES = ["copying", "mirroring", "memory", "standing still"]


@pytest.fixture(autouse=True)
def no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "sockets"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "sockets").mkdir()
    yield
    monkeypatch.setattr("tempfile.tempdir", None)
    assert not list((tmp_path / "sockets").iterdir())


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Holds a migration in a stage; gives the options that this needs."""

    async def for_ever(*_: object) -> None:
        await asyncio.Event().wait()

    async def never(*_: object) -> bool:
        return False

    def hold(pair: Pair) -> dict[str, Any]:
        if request.param == "copying":
            return {"bandwidth": 1}
        if request.param == "mirroring":
            monkeypatch.setattr("qmpmirror.operations.migrate._Migration._all_mirror", never)
        elif request.param == "memory":
            pair.slow_memory()
        else:
            monkeypatch.setattr(Outgoing, "end_mirrors", for_ever)
        return {}

    hold.__name__ = str(request.param)
    return hold


def in_stage(pair: Pair, stage: Stage) -> bool:
    """Whether a migration has come to the stage that it is held in."""
    jobs = set(jobs_of(pair))
    status = pair.source.execute("query-migrate").get("status", "")
    if stage.__name__ == "copying":
        return jobs == {"running"} and len(jobs_of(pair)) == len(pair.guests)
    if stage.__name__ == "mirroring":
        return jobs == {"ready"} and not status
    return bool(status == {"memory": "active"}.get(stage.__name__, "pre-switchover"))


def jobs_of(pair: Pair) -> list[str]:
    return [job["status"] for job in pair.source.execute("query-jobs")]


@contextlib.asynccontextmanager
async def begun(
    pair: Pair, connect: Connect, stage: Stage
) -> AsyncIterator[asyncio.Future[MigrationResult]]:
    """A migration that is held in a stage."""
    options = stage(pair)
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        moving = asyncio.ensure_future(source.migrate(destination, **options))
        await asyncio.to_thread(until, lambda: moving.done() or in_stage(pair, stage))
        assert not moving.done(), moving.result()
        yield moving


def failing(pair: Pair) -> Pair:
    """A pair with data that a copy does not get over at once."""
    pair.guests[0].scribble()
    return pair


@pytest.mark.parametrize("incremental", [False, True])
async def test_the_destination_dies(
    boot: Boot, layers: Layers, connect: Connect, stage: Stage, incremental: bool
) -> None:
    pair = failing(make(boot, layers, incremental=incremental, disks=2))
    async with begun(pair, connect, stage) as moving:
        pair.destination.kill()
        with pytest.raises(MigrationFailed) as caught:
            await moving
    assert (caught.value.runs_on, caught.value.left) == ("source", ())
    pair.check_stayed()


async def test_it_is_cancelled(boot: Boot, layers: Layers, connect: Connect, stage: Stage) -> None:
    pair = failing(make(boot, layers, disks=2))
    async with begun(pair, connect, stage) as moving:
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
    pair.check_stayed()
    if stage.__name__ in {"copying", "mirroring"}:  # nothing has been sent to it yet
        pair.source.execute("migrate-set-parameters", {"max-bandwidth": 2**27})
        await again(pair, connect)


async def again(pair: Pair, connect: Connect) -> MigrationResult:
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qmpmirror.operations.migrate._Migration._all_mirror", all_mirror)
            result: MigrationResult = await source.migrate(destination)
    pair.check_moved()
    return result


async def all_mirror(migration: Any) -> bool:
    return all(job.life.mirrored for job in migration.source.jobs)


async def test_a_paused_guest_stays_paused(
    boot: Boot, layers: Layers, connect: Connect, stage: Stage
) -> None:
    pair = failing(make(boot, layers))
    pair.source.execute("stop")
    async with begun(pair, connect, stage) as moving:
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
    pair.check_stayed(running=False)


async def test_somebody_else_ends_a_mirror(
    boot: Boot, layers: Layers, connect: Connect, stage: Stage
) -> None:
    if stage.__name__ == "standing still":
        pytest.skip("the mirrors are being ended by then")
    pair = failing(make(boot, layers, disks=2))
    async with begun(pair, connect, stage) as moving:
        job = pair.source.execute("query-jobs")[0]["id"]
        pair.source.execute("block-job-cancel", device=job, force=True)
        with pytest.raises(MigrationFailed, match="a disk did not get to the destination"):
            await moving
    pair.check_stayed()


async def test_somebody_else_cancels_the_memory(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    pair = make(boot, layers)
    pair.slow_memory()
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        moving = asyncio.ensure_future(source.migrate(destination))
        await asyncio.to_thread(
            until, lambda: pair.source.execute("query-migrate").get("status") == "active"
        )
        pair.source.execute("migrate_cancel")
        # The destination may be faster to end than QEMU to say that it was cancelled.
        with pytest.raises(MigrationFailed, match="the memory did not get to the destination"):
            await moving
    pair.check_stayed()


async def test_the_connection_to_the_source_is_lost(
    boot: Boot, layers: Layers, connect: Connect, stage: Stage
) -> None:
    pair = failing(make(boot, layers))
    async with begun(pair, connect, stage) as moving:
        pair.source.kill()
        with pytest.raises(ConnectionLost, match="qmpmirror recover on both sides"):
            await moving
    pair.check_clean()


async def test_the_destination_dies_when_it_has_the_guest(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has never run there: what the source has is all that there is."""
    pair = make(boot, layers)
    forget = Outgoing.forget

    async def kill(self: Outgoing) -> tuple[str, ...]:
        left = await forget(self)
        pair.destination.kill()
        return left

    monkeypatch.setattr(Outgoing, "forget", kill)
    with pytest.raises(MigrationFailed, match="lost when it had the guest") as caught:
        await move(pair, connect)
    assert caught.value.runs_on == "source"
    pair.check_stayed()


async def test_the_destination_dies_when_it_may_have_run(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(boot, layers)
    run = Incoming.run_guest

    async def kill(self: Incoming) -> bool:
        pair.destination.kill()
        return await run(self)

    monkeypatch.setattr(Incoming, "run_guest", kill)
    with pytest.raises(MigrationFailed, match="do not let it run on at the source") as caught:
        await move(pair, connect)
    assert caught.value.runs_on == "unknown"
    assert pair.source.execute("query-status")["status"] == "postmigrate"


async def test_a_cancellation_that_comes_too_late(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(boot, layers)
    forget = Outgoing.forget

    async def cancelled(self: Outgoing) -> tuple[str, ...]:
        task.cancel()
        await asyncio.sleep(0)
        return await forget(self)

    monkeypatch.setattr(Outgoing, "forget", cancelled)
    told: list[Any] = []
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        task = asyncio.ensure_future(source.migrate(destination, report=told.append))
        with pytest.raises(asyncio.CancelledError):
            await task
    assert told[-1].result.running
    pair.check_moved()


async def test_a_switch_that_fails(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination ends when all was sent and it has not acknowledged it."""
    pair = make(boot, layers)

    end = Outgoing.end_mirrors

    async def end_and_kill(self: Outgoing) -> None:
        await end(self)
        pair.destination.kill()

    monkeypatch.setattr(Outgoing, "end_mirrors", end_and_kill)
    with pytest.raises(MigrationFailed) as caught:
        await move(pair, connect)
    assert caught.value.runs_on == "source"
    pair.check_stayed()


async def move(pair: Pair, connect: Connect) -> MigrationResult:
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        return await source.migrate(destination)


async def test_a_destination_that_refuses_an_export(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(boot, layers)
    monkeypatch.setattr("qmpmirror.operations.migration_plan.DiskMove.exported", "nonsense")
    with pytest.raises(Refused, match="the destination refused block-export-add: Cannot find"):
        await move(pair, connect)
    pair.check_stayed()
    monkeypatch.undo()
    await again(pair, connect)
