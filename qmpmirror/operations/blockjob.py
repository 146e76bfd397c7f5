# SPDX-License-Identifier: MIT
"""blockjob: the block job that runs on a disk, whoever has started it."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import attrs

from qmpmirror import discover, disks, errors, names, runs
from qmpmirror.job import Job, JobInfo, block_jobs
from qmpmirror.life import Life
from qmpmirror.names import Flag
from qmpmirror.operations import backing_files, blockcommit
from qmpmirror.operations.blockpull import Pull
from qmpmirror.operations.copy import Copy
from qmpmirror.operations.handle import BlockJob
from qmpmirror.operations.move import Move

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor
    from qmpmirror.names import JobName
    from qmpmirror.operations.onephase import OnePhaseJob
    from qmpmirror.operations.twophase import TwoPhaseJob
    from qmpmirror.runs import OurJob, Run
    from qmpmirror.schema import Schema


async def attach(monitor: Monitor, schema: Schema, disk_name: str) -> BlockJob | None:
    """The job on a disk: a `BlockJob`, and more than that when it is one of ours.

    Raises:
        DiskNotFound: and AmbiguousDisk: see `disks.find`.
    """
    (picture, found), infos = await asyncio.gather(runs.read(monitor), block_jobs(monitor))
    folder = discover.working_folder(monitor.pid)
    disk = disks.find(await disks.read(monitor, picture, folder), disk_name)
    for run in found:
        if run.job is not None and _is_on(run, run.job, disk):
            if run.job.name.verb == "migrate":
                break  # only the migration ends it well: what can be done is what others' jobs let
            return await attach_ours(monitor, schema, picture, run, disk)
    foreign = _foreign(picture, disk, infos)
    if foreign is None:
        return None
    job = Job(monitor, foreign.id, Life.resume(foreign.status))
    job.__enter__()
    return BlockJob(monitor=monitor, schema=schema, job=job, disk=disk)


async def attach_ours(
    monitor: Monitor, schema: Schema, picture: Graph, run: Run, disk: Disk
) -> TwoPhaseJob | OnePhaseJob:
    """Take up a job of ours that another process has started."""
    ours = run.job
    if ours is None:
        raise errors.JobNotFound(f"run {run.id} has no job", job_id="")
    folder = discover.working_folder(monitor.pid)
    source = picture.nodes.get(ours.name.source)
    as_it_was = disk
    if source is not None:
        path = disks.path_of(picture, source.name, folder)
        as_it_was = attrs.evolve(disk, image=source, path=path)
    job = Job(monitor, ours.status.id, Life.resume(ours.status.status, run.asked))
    job.__enter__()
    # A look after the subscription: what happened in between is not missed.
    await job.refresh()
    if ours.name.verb == "commit":
        committed = blockcommit.committed_images(picture, ours.name)
        return blockcommit.handle(schema, job, ours.name, as_it_was, picture, committed)
    if ours.name.verb == "pull":
        return Pull(
            monitor=monitor,
            schema=schema,
            job=job,
            disk=as_it_was,
            name=ours.name,
            destination=as_it_was.path,
        )
    return _copy(schema, job, ours.name, as_it_was, picture)


def _copy(schema: Schema, job: Job, name: JobName, disk: Disk, picture: Graph) -> Copy:
    folder = discover.working_folder(job.monitor.pid)
    source, target = picture.nodes.get(name.source), picture.nodes.get(name.target_node)
    shares = Flag.SHALLOW in name.flags and not name.flags & {Flag.LATE_CHAIN, Flag.OWN_CHAIN}
    # Without its target it was being put away: then the node of its file tells.
    node = target or picture.nodes.get(names.node_name(name.run, "storage"))
    destination = disks.path_of(picture, node.name, folder) if node else ""
    make: Callable[..., Copy] = Copy
    if Flag.MOVE in name.flags:
        new_folder = os.path.dirname(destination)
        chain = backing_files.plan(picture, source, new_folder, folder) if source else []
        make = partial(Move, chain=tuple(chain))
    return make(
        monitor=job.monitor,
        schema=schema,
        job=job,
        disk=disk,
        name=name,
        destination=destination,
        format=target.driver if target else "",
        backing=source.child("backing") if source and shares else "",
    )


def disk_of(run: Run, ours: OurJob, candidates: Iterable[Disk]) -> Disk | None:
    """The disk that a job of ours belongs to, before or after its end."""
    return next((disk for disk in candidates if _is_on(run, ours, disk)), None)


def _is_on(run: Run, ours: OurJob, disk: Disk) -> bool:
    return disk.image is not None and disk.image.name in {ours.name.source, run.target_node}


def _foreign(picture: Graph, disk: Disk, infos: Iterable[JobInfo]) -> JobInfo | None:
    if not disk.node:
        return None
    on_disk = picture.jobs_on(picture.stack(disk.node))
    return next((info for info in infos if info.id in on_disk), None)
