# SPDX-License-Identifier: MIT
"""What QEMU remembers of our runs: jobs, nodes and bitmaps that carry our names.

A run that creates a file has a job of ours until everything is put away: first the one that created
the file, then the copy's own. Nodes without a job are a left-over when nobody uses them; else they
are the active image of a disk that was switched to a copy.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs

from qmpmirror import graph, names
from qmpmirror.job import JobStatus
from qmpmirror.life import Ending
from qmpmirror.names import JobName, Mark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.graph import Graph
    from qmpmirror.monitor import Monitor

_ENDINGS = {Mark.PIVOT: Ending.PIVOT, Mark.FINISH: Ending.FINISH, Mark.ABORT: Ending.ABORT}


@attrs.frozen
class OurJob:
    """A job of ours: what QEMU says of it, and what its name says."""

    status: JobStatus
    name: JobName


@attrs.frozen
class Run:
    """Everything of one run.

    Attributes:
        id: the run's id.
        job: the job that does the work, if there is one: a copy, a commit or a pull.
        file: the job that created the file, until it is dismissed.
        data: the job that created an external data file, until it is dismissed.
        header: the job that writes the image's header, until it is dismissed.
        roles: the roles of its nodes.
        marks: what the bitmaps on its target node say.
        marked: that node.
        replaced: nodes that are out of their chain and about to be closed.
        copied: whether another run copies from its nodes, and puts them away after a pivot.
        kept: whether its nodes stay open because the user wants it so.
    """

    id: str
    job: OurJob | None = None
    file: OurJob | None = None
    data: OurJob | None = None
    header: OurJob | None = None
    roles: frozenset[str] = frozenset()
    marks: frozenset[Mark] = frozenset()
    marked: str = ""
    replaced: tuple[str, ...] = ()
    copied: bool = False
    kept: bool = False

    @property
    def asked(self) -> Ending | None:
        """The ending that was asked for, by whichever process."""
        return next((ending for mark, ending in _ENDINGS.items() if mark in self.marks), None)

    @property
    def is_creating(self) -> bool:
        """Whether QEMU is creating an image for it at this moment."""
        created = (self.file, self.data, self.header)
        return any(job is not None and job.status.status != "concluded" for job in created)

    def is_used(self, picture: Graph) -> bool:
        """Whether something else than the run uses its nodes: a guest's disk, say."""
        ours = {names.node_name(self.id, role) for role in self.roles}
        return any(
            picture.users.get(name)
            or any(parent.name not in ours for parent in picture.parents(name))
            for name in self._nodes(picture)
        )

    def _nodes(self, picture: Graph) -> list[str]:
        """Its nodes, without the one that only looks whether a file is there."""
        ours = (names.node_name(self.id, role) for role in self.roles if role != "probe")
        return [name for name in ours if name in picture.nodes]

    def is_unfinished(self, picture: Graph) -> bool:
        """Whether the run ended before its copy started, or without putting its nodes away."""
        if self.file or self.data or self.header:
            return True
        if self.copied or self.kept:
            return False
        return bool(self._nodes(picture)) and not self.is_used(picture)

    def with_job(self, job: OurJob) -> Run:
        """The same run, with one of its jobs in its place."""
        if job.name.verb == "create":
            return attrs.evolve(self, file=job)
        if job.name.verb == "data":
            return attrs.evolve(self, data=job)
        if job.name.verb == "format":
            return attrs.evolve(self, header=job)
        return attrs.evolve(self, job=job)

    @property
    def target_node(self) -> str:
        """The node that its job writes to, or would have written to."""
        return self.job.name.target_node if self.job else names.node_name(self.id, "format")


async def read(monitor: Monitor) -> tuple[Graph, list[Run]]:
    """The block graph, and our runs in it."""
    picture, replies = await asyncio.gather(graph.read(monitor), monitor.execute("query-jobs"))
    return picture, parse(picture, [JobStatus.parse(reply) for reply in replies])


def parse(picture: Graph, jobs: list[JobStatus]) -> list[Run]:
    """Our runs among the jobs and nodes of a QEMU."""
    found: dict[str, Run] = {}
    for status in jobs:
        name = names.parse_job(status.id)
        if name is not None:
            run = found.get(name.run, Run(name.run))
            found[name.run] = run.with_job(OurJob(status, name))
    for node in picture.nodes.values():
        parsed = names.parse_node(node.name)
        if parsed is not None:
            run = found.get(parsed[0], Run(parsed[0]))
            found[run.id] = attrs.evolve(run, roles=run.roles | {parsed[1]})
        for mark in filter(None, (names.parse_bitmap(bitmap.name) for bitmap in node.bitmaps)):
            _note_mark(found, node.name, *mark)
    copied = {run for each in found.values() if each.job for run in _copied_by(each.job)}
    return [attrs.evolve(run, copied=run.id in copied) for run in found.values()]


def _note_mark(found: dict[str, Run], node: str, run_id: str, mark: Mark) -> None:
    if mark is Mark.REPLACED:
        run = found.get(run_id, Run(run_id))
        found[run_id] = attrs.evolve(run, replaced=(*run.replaced, node))
    elif mark is Mark.KEPT and run_id in found:
        found[run_id] = attrs.evolve(found[run_id], kept=True)
    elif run_id in found and found[run_id].target_node == node:
        run = found[run_id]
        found[run_id] = attrs.evolve(run, marks=run.marks | {mark}, marked=node)


def _copied_by(ours: OurJob) -> Iterator[str]:
    """The runs whose nodes a copy reads from."""
    for node in (ours.name.source, *ours.name.replaced):
        parsed = names.parse_node(node)
        if parsed is not None:
            yield parsed[0]
