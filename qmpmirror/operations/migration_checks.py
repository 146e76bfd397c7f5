# SPDX-License-Identifier: MIT
"""Reading and checking both QEMUs of a migration before anything is changed."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import attrs

from qmpmirror import errors, names
from qmpmirror.operations import counterparts
from qmpmirror.operations.migration_plan import (
    CAPABILITIES,
    MOVING,
    DiskMove,
    MigrationPlan,
    Side,
    switch_capabilities,
)
from qmpmirror.operations.safe_start import misses_writes_at_start

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import Flag
    from qmpmirror.operations.migration import MigrateOptions
    from qmpmirror.schema import Schema


async def plan(
    source: tuple[Monitor, Schema], destination: tuple[Monitor, Schema], options: MigrateOptions
) -> MigrationPlan:
    """Read both and check everything. Changes nothing.

    Raises:
        Refused: and its subclasses: it cannot be done so, or one of both lacks something.
    """
    here, there = await asyncio.gather(Side.read(*source), Side.read(*destination))
    _check_states(here, there)
    group = names.new_group()
    pairs, notes = counterparts.match(here, there, options)
    moves = []
    for number, pair in enumerate(pairs):
        run = names.member_run(group, number)
        move, said = counterparts.move(here, there, pair, options, run)
        moves.append(move)
        notes += said
    stops = options.safe_start and await misses_writes_at_start(*source)
    made = MigrationPlan(
        group=group,
        options=options,
        source=here,
        destination=there,
        moves=tuple(moves),
        running=bool(here.status["running"]),
        stops_vcpus=stops,
        notes=tuple(notes),
    )
    off = frozenset(CAPABILITIES[name] for name in made.capabilities(here))
    made = attrs.evolve(made, moves=tuple(_remembering(move, off) for move in moves))
    _check_credentials(options.tls_creds)
    check_schemas(made)
    return made


def _remembering(move: DiskMove, off: frozenset[Flag]) -> DiskMove:
    return attrs.evolve(move, job=attrs.evolve(move.job, flags=move.job.flags | off))


def _check_states(here: Side, there: Side) -> None:
    status = there.status["status"]
    if status != "inmigrate":
        raise errors.Refused(
            f"the destination does not wait for a migration: its state is {status}",
            hint="start it with -incoming defer, and the same guest hardware",
        )
    if there.migration.get("status") or there.migration.get("socket-address"):
        raise errors.Refused(
            "the destination waits for somebody else already",
            hint="start it with -incoming defer",
        )
    state = here.status["status"]
    gone = state == "postmigrate" and here.migration.get("status") == "completed"
    if state == "inmigrate" or gone:
        raise errors.Refused(f"the source has no guest of its own: its state is {state}")
    if here.migration.get("status") in MOVING:
        raise errors.Refused("a migration of the source is under way already")
    if here.memory != there.memory:
        raise errors.Refused(
            f"the guest has {here.memory} bytes of memory, the destination {there.memory}",
            hint="start the destination with the same guest hardware",
        )


def _check_credentials(folder: str) -> None:
    if folder and not os.path.isdir(folder):
        raise errors.UsageError(f"there is no folder {folder} with TLS credentials")


def check_schemas(made: MigrationPlan) -> None:
    """Both sides must know all that is going to be sent."""
    for side in (made.source, made.destination):
        command = switch_capabilities(made.capabilities(side), state=True)
        side.schema.check(command.name, command.arguments)
    source, destination = made.source.schema, made.destination.schema
    for move in made.moves:
        mirror = move.mirror(made.options, blocking=made.blocking_from_start)
        source.check(mirror.name, mirror.arguments)
    for name in ("migrate", "migrate-continue", "migrate_cancel"):
        if not source.has_command(name):
            source.check(name, {})
    for name in ("nbd-server-start", "block-export-add", "migrate-incoming"):
        if not destination.has_command(name):
            destination.check(name, {})
