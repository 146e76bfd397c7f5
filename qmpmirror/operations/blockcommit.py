# SPDX-License-Identifier: MIT
"""blockcommit: write images of a backing chain into one below them, which makes it shorter.

The commit of inner images has one phase. That of the active image has two, as a copy has: it writes
to the base what the guest writes, until it is told to switch the guest to the base (pivot), or to
keep the overlay, which holds from then on what the guest writes later (finish).

Rests on ``block-commit``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, TypedDict

import attrs

from qmpmirror import discover, disks, errors, graph, names
from qmpmirror.job import Job
from qmpmirror.names import Flag, JobName
from qmpmirror.operations import bitmaps, cautions, layers
from qmpmirror.operations.onephase import OnePhaseJob
from qmpmirror.operations.options import valid_bandwidth
from qmpmirror.operations.safe_start import misses_writes_at_start
from qmpmirror.operations.starting import start_job, taken_back_on_error
from qmpmirror.operations.twophase import TwoPhaseJob
from qmpmirror.steps import Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node
    from qmpmirror.monitor import Monitor
    from qmpmirror.schema import Schema

_FILTER: Final = "commit_top"


class CommitKeywords(TypedDict, total=False):
    """The fields of `CommitOptions`, as keyword arguments."""

    top: str
    base: str
    shallow: bool
    active: bool
    delete: bool
    keep_relative: bool
    bandwidth: int
    then: str
    safe_start: bool


@attrs.frozen(kw_only=True)
class CommitOptions:
    """What to commit.

    Attributes:
        top: node name or path of the uppermost image to commit; empty for the active one.
        base: that of the image to commit into; empty for the lowest.
        shallow: the base is the image right below the top.
        active: the top may be the active image.
        delete: remove the files of the committed images when all is done.
        keep_relative: the image above names its new backing file relative to itself.
        bandwidth: limit in bytes/s, 0 for none.
        then: how an active commit is going to be ended: ``pivot``, ``finish`` or empty, for
            `recover`, should this process die.
        safe_start: stop the vCPUs while an active commit starts, on QEMUs that would miss writes.
    """

    top: str = ""
    base: str = ""
    shallow: bool = False
    active: bool = False
    delete: bool = False
    keep_relative: bool = False
    bandwidth: int = attrs.field(default=0, validator=valid_bandwidth)
    then: str = ""
    safe_start: bool = True


@attrs.define(eq=False, kw_only=True)
class ActiveCommit(TwoPhaseJob):
    """The commit of the active image under way.

    Attributes:
        files: the files of the committed images, if they are to be removed after a pivot.
    """

    what: ClassVar[str] = "commit"

    files: Sequence[str] = ()

    def image_files(self) -> Sequence[str]:
        """The files that are to be removed after a pivot."""
        return self.files

    async def _carry_bitmaps(self) -> None:
        picture = await graph.read(self.monitor)
        committed = committed_images(picture, self.name)
        if committed:
            target = picture.nodes[self.target_node]
            await bitmaps.merge(self.monitor, target, committed)
            self.notes += bitmaps.losses(committed[0], target.driver)


@attrs.define(eq=False, kw_only=True)
class InnerCommit(OnePhaseJob):
    """The commit of images below the active one under way."""

    what: ClassVar[str] = "commit"

    def images(self, picture: Graph) -> list[Node]:
        """The committed images."""
        return committed_images(picture, self.name)


async def start(
    monitor: Monitor, schema: Schema, disk_name: str, options: CommitOptions
) -> ActiveCommit | InnerCommit:
    """Check everything, then start the job; see `Machine.blockcommit`."""
    folder = discover.working_folder(monitor.pid)
    picture = await graph.read(monitor)
    disk = disks.find(await disks.read(monitor, picture, folder), disk_name)
    layers.active_image(picture, disk, disk_name)
    chain = picture.chain(disk.node)
    top, base = _span(picture, chain, disk, options, folder)
    layers.check_not_shared(picture, chain, top, base)
    name = _name(picture, chain, top, base, options)
    arguments: dict[str, Any] = {
        "job-id": str(name),
        "device": disk.node,
        "top-node": chain[top].name,
        "base-node": chain[base].name,
        "auto-finalize": Flag.BITMAPS not in name.flags,
        "auto-dismiss": False,
    }
    if top:
        arguments["backing-file"] = layers.header_name(
            picture, chain[base], chain[top - 1], folder, relative=options.keep_relative
        )
    if options.bandwidth:
        arguments["speed"] = options.bandwidth
    schema.check("block-commit", arguments)
    if options.then == "pivot":
        await cautions.check_pivot(monitor, picture, disk)
    stops = not top and options.safe_start and await misses_writes_at_start(monitor, schema)
    job = Job(monitor, str(name))
    async with taken_back_on_error(job) as undo:
        command = Command("block-commit", arguments)
        await start_job(job, command, undo, stops=name if stops else None)
        await job.refresh()
    return handle(schema, job, name, disk, picture, chain[top:base])


def committed_images(picture: Graph, name: JobName) -> list[Node]:
    """The images that a commit under way writes into its base, top down; none after its end."""
    if name.source not in picture.nodes:
        return []
    chain = picture.chain(name.source)
    places = {image.name: place for place, image in enumerate(chain)}
    if name.base not in places:
        return []
    top = 0 if Flag.ACTIVE in name.flags else _below_filter(picture, chain)
    return chain[top : places[name.base]]


def _below_filter(picture: Graph, chain: Sequence[Node]) -> int:
    for place, image in enumerate(chain):
        below = image.child("backing")
        if below and picture.nodes[below].driver == _FILTER:
            return place + 1
    return len(chain)


def handle(  # noqa: PLR0917 - all that a handle needs to know
    schema: Schema,
    job: Job,
    name: JobName,
    disk: Disk,
    picture: Graph,
    committed: Sequence[Node],
) -> ActiveCommit | InnerCommit:
    """The handle of a commit that runs, or has ended.

    Args:
        schema: what its QEMU can do.
        job: the watched job.
        name: its id, taken apart.
        disk: the disk, with its active image as it was at the start.
        picture: the graph.
        committed: the images that are committed, as far as they are known.
    """
    base = picture.nodes.get(name.base)
    folder = discover.working_folder(job.monitor.pid)
    deletes = Flag.DELETE_FILES in name.flags
    common: dict[str, Any] = {
        "monitor": job.monitor,
        "schema": schema,
        "job": job,
        "disk": disk,
        "name": name,
        "destination": disks.path_of(picture, base.name, folder) if base else "",
        "files": layers.files_of(job.monitor, picture, committed) if deletes else (),
    }
    if Flag.ACTIVE in name.flags:
        return ActiveCommit(**common, format=base.driver if base else "")
    return InnerCommit(**common)


def _span(
    picture: Graph, chain: Sequence[Node], disk: Disk, options: CommitOptions, folder: str | None
) -> tuple[int, int]:
    """The places of the top and of the base in the chain."""
    paths = [disks.path_of(picture, image.name, folder) for image in chain]
    top = layers.find(picture, chain, options.top, disk, folder) if options.top else 0
    if top == len(chain) - 1:
        raise errors.Refused(f"top {paths[top]!r} in chain for {disk.name!r} has no backing file")
    lowest = top + 1 if options.shallow else len(chain) - 1
    base = layers.find(picture, chain, options.base, disk, folder) if options.base else lowest
    if base <= top:
        raise errors.Refused(
            f"could not find base image {paths[base]!r} beneath {paths[top]!r} in chain for"
            f" {disk.name!r}"
        )
    if options.shallow and base != top + 1:
        raise errors.Refused(
            f"base {paths[base]!r} is not immediately below {paths[top]!r} in chain for"
            f" {disk.name!r}"
        )
    if not top and not options.active:
        raise errors.Refused(
            f"commit of {disk.name!r} active layer requires active flag",
            hint="--active commits it, --pivot switches to the base then; or give --top",
        )
    if top and options.active:
        raise errors.Refused(
            f"active commit requested but {paths[top]!r} is not active: the guest uses {paths[0]!r}"
        )
    return top, base


def _name(
    picture: Graph, chain: Sequence[Node], top: int, base: int, options: CommitOptions
) -> JobName:
    committed = chain[top:base]
    flags = set()
    if not top:
        flags.add(Flag.ACTIVE)
    elif any(bitmaps.carried(image) for image in committed):
        flags.add(Flag.BITMAPS)
    if options.delete:
        flags.add(Flag.DELETE_FILES)
    if options.then:
        flags.add(Flag.THEN_PIVOT if options.then == "pivot" else Flag.THEN_FINISH)
    replaced = [name for name in graph.named_nodes(picture, committed) if name != chain[0].name]
    run = names.new_run()
    return JobName(
        "commit", run, frozenset(flags), chain[0].name, tuple(replaced), chain[base].name
    )
