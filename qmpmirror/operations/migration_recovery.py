# SPDX-License-Identifier: MIT
"""What an interrupted migration has left, in the QEMU that the guest was to leave or to reach.

Only its client could have brought it to an end, so what has not come to the switch is undone. What
the source knows is in the names of its mirrors; what the destination knows, in that of a node which
is there for nothing else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs

from qmpmirror import names
from qmpmirror.operations.blockjob import disk_of
from qmpmirror.operations.endpoints import remove_folders
from qmpmirror.operations.findings import Finding, State, Way
from qmpmirror.operations.incoming import close_export
from qmpmirror.operations.leftovers import tidy
from qmpmirror.operations.migration_plan import CAPABILITIES, MOVING, switch_capabilities
from qmpmirror.operations.outgoing import cancel_migration, let_run
from qmpmirror.operations.starting import take_away
from qmpmirror.steps import Command, attempt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import Flag
    from qmpmirror.runs import Run

_PAUSE_SECONDS = 0.02
_MIRRORING = frozenset({"ready", "standby"})


@attrs.frozen
class Interrupted:
    """A migration that nobody sees through any more.

    Attributes:
        runs: its runs, one for each disk.
        flags: what the names remember.
        marker: the node by which a destination remembers it; empty at a source.
        runs_there: whether the guest is to run at the destination.
    """

    runs: tuple[Run, ...]
    flags: frozenset[Flag]
    marker: str = ""
    runs_there: bool = False

    def holds(self, name: str) -> bool:
        """Whether a node, an object or an export belongs to it."""
        parsed = names.parse_node(name)
        return parsed is not None and names.group_of(parsed[0]) == names.group_of(self.runs[0].id)


def interrupted(found: Iterable[Run]) -> list[Interrupted]:
    """The migrations among our runs."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(names.group_of(run.id), []).append(run)
    return [each for runs in groups.values() if (each := _of_group(runs)) is not None]


def _of_group(runs: list[Run]) -> Interrupted | None:
    for run in runs:
        for role in run.roles:
            if (arrival := names.parse_arrival(role)) is not None:
                marker = names.node_name(run.id, role)
                return Interrupted(tuple(runs), arrival[1], marker, arrival[0])
    jobs = [run.job for run in runs if run.job is not None and run.job.name.verb == "migrate"]
    return Interrupted(tuple(runs), jobs[0].name.flags) if jobs else None


async def recover_migrations(
    monitor: Monitor,
    picture: Graph,
    found: Iterable[Interrupted],
    known: Iterable[Disk],
    way: Way,
    *,
    dry_run: bool,
) -> list[Finding]:
    """End them, at whichever side this is."""
    findings = []
    for each in found:
        if each.marker:
            findings.append(await _at_destination(monitor, each, way, dry_run=dry_run))
        else:
            findings += await _at_source(monitor, picture, each, known, dry_run=dry_run)
    return findings


async def _at_source(
    monitor: Monitor, picture: Graph, each: Interrupted, known: Iterable[Disk], *, dry_run: bool
) -> list[Finding]:
    migration = await _after_the_switch(monitor)
    gone = migration.get("status") == "completed"
    moving = migration.get("status") in MOVING
    findings = [
        _finding(picture, run, known, moving=moving, gone=gone)
        for run in each.runs
        if run.job is not None
    ]
    if dry_run:
        return findings
    if moving:
        await cancel_migration(monitor)
        await let_run(monitor, running=False)
    if not gone:
        for run in each.runs:
            await tidy(monitor, run)
    left = await _clear_source(monitor, picture, each)
    action = "put away: the guest has gone to the destination" if gone else "undone"
    return [attrs.evolve(finding, action=action, left=left) for finding in findings]


async def _after_the_switch(monitor: Monitor) -> Mapping[str, Any]:
    """How the memory's migration is; one that is being switched ends by itself."""
    while True:
        migration: Mapping[str, Any] = await monitor.execute("query-migrate")
        if migration.get("status") not in {"device", "cancelling"}:
            return migration
        await asyncio.sleep(_PAUSE_SECONDS)


def _finding(
    picture: Graph, run: Run, known: Iterable[Disk], *, moving: bool, gone: bool
) -> Finding:
    assert run.job is not None  # noqa: S101 - the caller has looked
    status = run.job.status.status
    state = State.MIRRORING if status in _MIRRORING else State.COPYING
    if moving or gone or status == "concluded":
        state = State.ENDED if gone else State.ENDING
    disk = disk_of(run, run.job, known)
    node = picture.nodes.get(run.target_node)
    return Finding(
        run=run.id,
        what="migration",
        state=state,
        disk=disk.name if disk else run.job.name.source,
        destination=node.filename if node else "",
        active="" if gone or disk is None else disk.path,
        action="would be put away: the guest has gone to the destination"
        if gone
        else "would be undone",
    )


async def _clear_source(monitor: Monitor, picture: Graph, each: Interrupted) -> tuple[str, ...]:
    left = []
    for run in each.runs:
        if run.job is not None:
            await take_away(monitor, run.job.status.id)
    for run in each.runs:
        node = names.node_name(run.id, "format")
        if node in picture.nodes:
            reason = await attempt(monitor, Command("blockdev-del", {"node-name": node}))
            left += [f"node {node}: {reason}"] if reason else []
    await _reset(monitor, each)
    return tuple(left)


async def _at_destination(
    monitor: Monitor, each: Interrupted, way: Way, *, dry_run: bool
) -> Finding:
    status = (await monitor.execute("query-status"))["status"]
    arrived = status != "inmigrate"
    state = State.ENDING if arrived else State.COPYING
    finding = Finding(each.runs[0].id, "migration", state, "", "", "", "would be put away")
    if dry_run:
        return finding
    left = await _close_offers(monitor, each)
    await _reset(monitor, each)
    if arrived:
        waits = status == "paused" and each.runs_there
        if waits and way is Way.LEAVE:
            action = (
                "the guest has arrived and is paused: if recover at the source says that it has"
                " gone, recover --finish here lets it run"
            )
            return attrs.evolve(finding, action=action, left=left)
        action = "put away"
        if waits and way is Way.FINISH:
            await monitor.execute("cont")
            action = "put away: the guest runs here now"
    else:
        action = await _waits_again(monitor)
    await attempt(monitor, Command("blockdev-del", {"node-name": each.marker}))
    return attrs.evolve(finding, action=action, left=left)


async def _waits_again(monitor: Monitor) -> str:
    migration = await monitor.execute("query-migrate")
    if not migration.get("socket-address"):
        return "undone: it waits for a guest, as before"
    return "undone, but it had begun to wait for the memory: start it anew"


async def _close_offers(monitor: Monitor, each: Interrupted) -> tuple[str, ...]:
    """Close its exports, and the NBD server: that one is ours too, or the marker were not there."""
    for export in await monitor.execute("query-block-exports"):
        if each.holds(export["id"]):
            await close_export(monitor, export["id"])
    await attempt(monitor, Command("nbd-server-stop"))
    left = []
    for run in each.runs:
        if "slice" in run.roles:
            node = names.node_name(run.id, "slice")
            reason = await attempt(monitor, Command("blockdev-del", {"node-name": node}))
            left += [f"node {node}: {reason}"] if reason else []
    return tuple(left)


async def _reset(monitor: Monitor, each: Interrupted) -> None:
    """Put the settings of QEMU's migration back, and the credentials and sockets away."""
    remove_folders(names.group_of(each.runs[0].id))
    off = frozenset(name for name, flag in CAPABILITIES.items() if flag in each.flags)
    command = switch_capabilities(off, state=False)
    await attempt(monitor, command)
    parameters = await monitor.execute("query-migrate-parameters")
    if each.holds(parameters.get("tls-creds", "")):
        await attempt(monitor, Command("migrate-set-parameters", {"tls-creds": ""}))
    for run in each.runs:
        await attempt(monitor, Command("object-del", {"id": names.node_name(run.id, "tls")}))
