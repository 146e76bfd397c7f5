# SPDX-License-Identifier: MIT
"""What looks wrong in a QEMU that `doctor` has examined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qmpmirror import names
from qmpmirror.job import PAUSED
from qmpmirror.names import Flag, Mark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.operations.doctor import Checkup
    from qmpmirror.runs import Run

Version = tuple[int, int, int]

_HAZARDS: Final[tuple[tuple[int, tuple[tuple[Version, Version], ...], str], ...]] = (
    (
        6,
        (((0, 0, 0), (10, 0, 10)), ((10, 1, 0), (10, 2, 3))),
        "a second job-complete ends QEMU, under a filter",
    ),
    (
        7,
        (((8, 2, 0), (10, 0, 10)), ((10, 1, 0), (10, 2, 2))),
        "guest writes are missed while a mirror starts",
    ),
    (
        8,
        (((0, 0, 0), (10, 0, 0)),),
        "some concluded jobs that nobody has dismissed end QEMU when its nodes are looked at",
    ),
    (
        9,
        (((0, 0, 0), (6, 0, 0)),),
        "an export that writes behind a mirror ends QEMU at the pivot",
    ),
    (
        13,
        (((0, 0, 0), (10, 0, 11)), ((10, 1, 0), (11, 0, 2))),
        "detect-zeroes=unmap on a qcow2 target loses data",
    ),
)
"""The hazards of docs/hazards.md that depend on the version: number, from and before, what."""

_RUNNING: Final = frozenset({"", "running"})


def hazards(version: Version) -> dict[int, str]:
    """The known bugs of a version that lose data or end QEMU, by their number."""
    return {
        number: what
        for number, ranges, what in _HAZARDS
        if any(first <= version < after for first, after in ranges)
    }


def problems(found: Checkup) -> list[str]:
    """What looks wrong, one sentence each; the worst is not necessarily the first."""
    sources = (_guest, _images, _jobs, _interrupted_runs, _targets, _nodes, _objects)
    told = [problem for source in sources for problem in source(found)]
    return [found.unread, *told] if found.unread else told


def _guest(found: Checkup) -> Iterator[str]:
    if found.status not in _RUNNING:
        yield f"the guest does not run: its state is {found.status}"
    for disk, status in found.io_status.items():
        if status != "ok":
            yield f"an I/O error has stopped disk {disk}: {status}"


def _images(found: Checkup) -> Iterator[str]:
    for path in found.missing:
        yield f"image {path} is not there any more: only QEMU, which has it open, can still read it"


def _jobs(found: Checkup) -> Iterator[str]:
    stopped = {job["device"]: job["io-status"] for job in found.block_jobs}
    for job in found.jobs:
        status = stopped.get(job.id, "ok")
        if status != "ok":
            yield f"job {job.id} has been stopped by an I/O error ({status}): make room, resume it"
        elif job.status in PAUSED:
            yield f"job {job.id} is paused"
        elif job.status == "pending":
            yield f"job {job.id} waits for job-finalize: the guest's writes to its disk wait too"
        elif job.status == "concluded":
            error = f"; it failed: {job.error}" if job.error else ""
            yield f"job {job.id} has ended and nobody has dismissed it{error}"


def _interrupted_runs(found: Checkup) -> Iterator[str]:
    if found.picture is None:
        return
    for run in found.runs:
        if run.job is None and run.is_unfinished(found.picture):
            yield f"run {run.id} was interrupted before its job began: see qmpmirror recover"
        elif run.job is not None and run.asked is not None:
            yield f"run {run.id} has been asked to {run.asked.value}, and is not put away yet"
        if Mark.STOPPED in run.marks and found.status not in _RUNNING:
            yield f"run {run.id} has stopped the vCPUs: qmpmirror recover lets them go on"


def _targets(found: Checkup) -> Iterator[str]:
    """Shallow copies without the backing node that the guest would need after a pivot."""
    for run in found.runs:
        node = found.picture.nodes.get(run.target_node) if found.picture else None
        if node is not None and _needs_backing(run) and not node.child("backing"):
            yield f"the copy of run {run.id} has no backing node: a pivot would lose data"


def _needs_backing(run: Run) -> bool:
    if run.job is None or run.job.name.verb == "migrate":  # an NBD node: its other end has it
        return False
    flags = run.job.name.flags
    return Flag.SHALLOW in flags and not flags & {Flag.LATE_CHAIN, Flag.DRIVE_MIRROR}


def _nodes(found: Checkup) -> Iterator[str]:
    for node in found.picture.nodes.values() if found.picture else ():
        for bitmap in node.bitmaps:
            if bitmap.inconsistent:
                yield f"bitmap {bitmap.name} of node {node.name} is inconsistent"
        unmaps = node.driver == "qcow2" and node.detect_zeroes == "unmap" and not node.read_only
        if unmaps and 13 in hazards(found.version):  # noqa: PLR2004 - the hazard's number
            yield f"node {node.name} has detect-zeroes=unmap, which loses data on this QEMU"


def _objects(found: Checkup) -> Iterator[str]:
    runs = {run.id for run in found.runs}
    for name in found.objects:
        ours = names.parse_node(name)
        if ours is not None and ours[0] not in runs:
            yield f"object {name} is left over from run {ours[0]}"
