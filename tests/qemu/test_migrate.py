# SPDX-License-Identifier: MIT
"""migrate: a guest and its storage move to a second QEMU."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from qmpmirror import DiskBusy, MigrationFailed, Refused, UsageError
from qmpmirror.operations.outgoing import Outgoing
from tests.qemu.moving import make
from tests.qemu.servers import certificates, free_port, loop_device, needs_openssl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmpmirror import MigrationProgress, MigrationResult
    from tests.qemu.conftest import Boot, Connect, Layers
    from tests.qemu.moving import Pair


@pytest.fixture(autouse=True)
def no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets go to a folder of their own, which goes when the migration has ended."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "sockets"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "sockets").mkdir()
    yield
    monkeypatch.setattr("tempfile.tempdir", None)
    assert not list((tmp_path / "sockets").iterdir())


async def move(pair: Pair, connect: Connect, **options: Any) -> MigrationResult:
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        return await source.migrate(destination, **options)


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("incremental", [False, True])
async def test_a_guest_moves_with_its_storage(
    boot: Boot, layers: Layers, connect: Connect, incremental: bool, disks: int, synchronous: bool
) -> None:
    pair = make(boot, layers, incremental=incremental, disks=disks)
    told: list[MigrationProgress] = []
    result = await move(
        pair,
        connect,
        incremental=incremental,
        synchronous_writes=synchronous,
        report=told.append,
    )
    assert result.disks == ("vda", "vdb")[:disks]
    assert result.images == tuple(map(str, pair.images))
    assert (result.running, result.left, result.notes) == (True, (), ())
    assert result.memory > 0
    assert result.total_time >= result.downtime
    assert told[-1].percent == 100
    assert {progress.phase for progress in told} == {"disks", "memory", "done"}
    pair.check_moved()
    # What is copied is the guest's data, not its holes; and not what the bases hold.
    if incremental:
        assert len(layers.chain(pair.images[0])) == 2


async def test_a_paused_guest_stays_paused(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers)
    pair.source.execute("stop")
    assert not (await move(pair, connect)).running
    pair.check_moved(running=False)


@needs_openssl
@pytest.mark.parametrize("kind", ["tcp", "unix", "tls", "tls-and-ports"])
async def test_addresses(
    boot: Boot, layers: Layers, connect: Connect, tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {}
    if kind == "unix":
        where = {name: tmp_path / "s" / name for name in ("disks_uri", "migrate_uri")}
        (tmp_path / "s").mkdir()
        options = {name: f"unix://{path}" for name, path in where.items()}
    elif kind != "tls":
        ports = free_port(), free_port()
        options = {
            "disks_uri": f"tcp://127.0.0.1:{ports[0]}",
            "migrate_uri": f"tcp:127.0.0.1:{ports[1]}",
        }
    if "tls" in kind:
        certificates(tmp_path / "pki")
        options["tls_creds"] = str(tmp_path / "pki")
    pair = make(boot, layers, disks=2)
    assert (await move(pair, connect, **options)).left == ()
    pair.check_moved()


async def test_chosen_disks(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers, disks=2)
    result = await move(pair, connect, disks=["vd1"])
    assert result.disks == ("vdb",)
    del pair.guests[0]
    vdb = pair.guests[0]
    drives = [d for d in pair.destination.execute("query-block") if "inserted" in d]
    moved = type(vdb)(pair.destination, drives[1], vdb.expected)
    moved.check()


async def test_a_shared_disk_is_not_copied(boot: Boot, layers: Layers, connect: Connect) -> None:
    second = layers.images.create(layers.folder / "top1-moved", "8M")
    pair = make(boot, layers, disks=2, images=[layers.snap2, second])
    with pytest.raises(Refused, match=r"is .*snap2.* on both sides"):
        await move(pair, connect, disks=["vda"])
    result = await move(pair, connect)
    assert result.disks == ("vdb",)
    (note,) = result.notes
    assert "on both sides: it is not copied" in note
    pair.check_moved()


async def test_a_larger_raw_device_gets_a_window(
    boot: Boot, layers: Layers, connect: Connect, tmp_path: Path
) -> None:
    with loop_device(tmp_path / "device", 9 * 2**20) as device:
        pair = make(boot, layers, images=[device])
        assert (await move(pair, connect)).left == ()
        pair.check_moved()
        pair.destination.stop()


async def test_bitmaps_go_along(boot: Boot, layers: Layers, connect: Connect) -> None:
    layers.images.add_bitmap(layers.snap2, "backup")
    pair = make(boot, layers)
    pair.source.execute(
        "block-dirty-bitmap-add", {"node": "src0", "name": "transient", "persistent": False}
    )
    (before,) = bitmaps(pair, "source", "src0", "backup")
    assert before["count"] > 0
    assert (await move(pair, connect)).notes == ()
    (after,) = bitmaps(pair, "destination", "dst0", "backup")
    assert (after["persistent"], after["recording"]) == (True, True)
    assert after["count"] == before["count"]
    assert bitmaps(pair, "destination", "dst0", "transient") == []
    pair.destination.stop()
    info = layers.images.info(pair.images[0])
    assert [each["name"] for each in info["format-specific"]["data"]["bitmaps"]] == ["backup"]


async def test_bitmaps_that_raw_cannot_store_are_told(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    layers.images.add_bitmap(layers.snap2, "backup")
    raw = layers.images.create(layers.folder / "moved.raw", "8M", fmt="raw")
    pair = make(boot, layers, images=[raw])
    (note,) = (await move(pair, connect)).notes
    assert note == (
        "bitmap backup of vda cannot be stored by the destination's raw: it does not go along"
    )
    pair.check_moved()


def bitmaps(pair: Pair, side: str, node: str, name: str) -> list[dict[str, Any]]:
    nodes = getattr(pair, side).execute("query-named-block-nodes", flat=True)
    (found,) = [each for each in nodes if each["node-name"] == node]
    return [each for each in found.get("dirty-bitmaps", ()) if each.get("name") == name]


async def test_a_busy_guest_is_suspended(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(boot, layers)
    seen: list[str] = []
    send = Outgoing.send_memory

    async def send_later(self: Outgoing) -> None:
        seen.append(pair.source.execute("query-status")["status"])
        await send(self)

    monkeypatch.setattr(Outgoing, "send_memory", send_later)
    assert (await move(pair, connect, suspend_after=1e-6)).running
    assert seen == ["paused"]
    pair.check_moved()
    with pytest.raises(UsageError, match="no time at all"):
        await move(pair, connect, suspend_after=0)


async def test_a_suspended_guest_runs_on_after_a_failure(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(boot, layers)

    async def kill(_: Outgoing) -> None:
        assert pair.source.execute("query-status")["status"] == "finish-migrate"
        pair.destination.kill()
        await asyncio.Event().wait()

    monkeypatch.setattr(Outgoing, "end_mirrors", kill)
    with pytest.raises(MigrationFailed):
        await move(pair, connect, suspend_after=1e-6)
    pair.check_stayed()


async def test_the_vcpus_stand_still_while_a_mirror_starts_where_that_is_needed(
    boot: Boot, layers: Layers, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on QEMU 8.2 to 10.0.9, which miss the writes of that instant."""

    async def does(*_: object) -> bool:
        return True

    monkeypatch.setattr("qmpmirror.operations.migration_checks.misses_writes_at_start", does)
    pair = make(boot, layers, disks=2)
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        events: list[str] = []
        source.monitor.subscribe(lambda event: events.append(event.name if event else ""))
        await source.migrate(destination)
    assert [name for name in events if name in {"STOP", "RESUME"}] == [
        *("STOP", "RESUME") * 2,
        "STOP",
    ]
    pair.check_moved()


def second_of(layers: Layers, size: str = "8M", **options: Any) -> Path:
    return layers.images.create(layers.folder / "other", size, **options)


async def refused(pair: Pair, connect: Connect, why: str, **options: Any) -> None:
    with pytest.raises(Refused, match=why):
        await move(pair, connect, **options)
    pair.check_stayed()


async def test_a_destination_that_does_not_wait(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    pair = make(boot, layers, incoming=())
    await refused(pair, connect, "does not wait for a migration: its state is running")


async def test_a_destination_that_waits_for_another(
    boot: Boot, layers: Layers, connect: Connect, tmp_path: Path
) -> None:
    pair = make(boot, layers, incoming=("-incoming", f"unix:{tmp_path}/taken"))
    await refused(pair, connect, "waits for somebody else already")


async def test_a_source_that_waits_itself(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers)
    async with connect(pair.destination) as one:
        with pytest.raises(Refused, match="the source has no guest of its own"):
            await one.migrate(one)
    pair.check_stayed()


async def test_sizes_that_differ(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers, images=[second_of(layers, "9M")])
    await refused(pair, connect, "other has 9437184 bytes, disk 'vda' 8388608: they must be equal")


async def test_a_smaller_raw_destination(boot: Boot, layers: Layers, connect: Connect) -> None:
    raw = layers.images.create(layers.folder / "small.raw", "7M", fmt="raw")
    pair = make(boot, layers, images=[raw])
    await refused(pair, connect, "they must be equal")


async def test_a_disk_without_counterpart(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers, disks=2, images=[second_of(layers)])
    await refused(pair, connect, "no counterpart of disk vdb = vd1")


async def test_a_base_that_is_missing(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers, images=[second_of(layers)])
    await refused(pair, connect, "other has no backing file", incremental=True)


async def test_other_memory(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers, destination={"machine": "pc,memory-backend=m"}, incoming=INCOMING)
    await refused(pair, connect, "67108864 bytes of memory, the destination 33554432")


INCOMING = ("-incoming", "defer", "-object", "memory-backend-ram,id=m,size=32M", "-m", "32")


async def test_a_disk_that_has_a_job(boot: Boot, layers: Layers, connect: Connect) -> None:
    pair = make(boot, layers)
    async with connect(pair.source) as source, connect(pair.destination) as destination:
        copy = await source.blockcopy("vda", layers.folder / "copy")
        with pytest.raises(DiskBusy, match="disk 'vda' has block job"):
            await source.migrate(destination)
        await copy.abort(force=True)
    pair.check_stayed()


async def test_an_nbd_server_of_somebody_else(
    boot: Boot, layers: Layers, connect: Connect, tmp_path: Path
) -> None:
    pair = make(boot, layers)
    address = {"type": "unix", "data": {"path": str(tmp_path / "theirs")}}
    pair.destination.execute("nbd-server-start", {"addr": address})
    with pytest.raises(Refused, match="an NBD server already"):
        await move(pair, connect)
    assert pair.has_server
    pair.check_stayed()
    await move(pair, connect)
    pair.check_moved()


async def test_a_bitmap_that_is_there_already(boot: Boot, layers: Layers, connect: Connect) -> None:
    other = second_of(layers)
    layers.images.add_bitmap(layers.snap2, "backup")
    layers.images.add_bitmap(other, "backup")
    pair = make(boot, layers, images=[other])
    await refused(pair, connect, "other has a bitmap backup already")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"disks_uri": "nonsense"}, "disks-uri 'nonsense' is no tcp://"),
        ({"migrate_uri": "tcp://host"}, "migrateuri 'tcp://host' is no tcp://"),
        ({"migrate_uri": "tcp://host:70000"}, "is no tcp://"),
        ({"disks_uri": "unix:///x", "tls_creds": "/"}, "TLS goes over TCP"),
        ({"tls_creds": "/no/such/folder"}, "there is no folder"),
        ({"bandwidth": -1}, "out of range"),
        ({"disks": ["vda", "vd0"]}, "given twice"),
    ],
)
async def test_nonsense(
    boot: Boot, layers: Layers, connect: Connect, options: dict[str, Any], why: str
) -> None:
    pair = make(boot, layers)
    with pytest.raises(UsageError, match=why):
        await move(pair, connect, **options)
    pair.check_stayed()


async def test_unlike_machines_fail_and_the_guest_stays(
    boot: Boot, layers: Layers, connect: Connect
) -> None:
    """QEMU itself finds out, when the memory has come over."""
    pair = make(boot, layers, destination={"machine": "q35"})
    with pytest.raises(MigrationFailed) as caught:
        await move(pair, connect)
    assert caught.value.runs_on == "source"
    pair.check_stayed()
