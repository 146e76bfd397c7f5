# SPDX-License-Identifier: MIT
"""image-create: one image that holds a live disk as it was at one instant.

The top image is copied while the guest runs; then the copy is flattened into one image, off-line.
The copy is temporary: until it is removed, QEMU remembers it by the job that created it, so that
`recover` finds it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import destination as places
from qmpmirror import discover, errors, names
from qmpmirror.operations import blockcopy, programs
from qmpmirror.operations import plan as planning
from qmpmirror.operations.options import Options
from qmpmirror.operations.together import see_through
from qmpmirror.steps import cancel_job, remove_file

if TYPE_CHECKING:
    from qmpmirror.monitor import Monitor
    from qmpmirror.operations.copy import Copy
    from qmpmirror.schema import Schema


_BLOCK: Final = 512


@attrs.frozen
class Flattened:
    """An image that was made.

    Attributes:
        disk: the disk's name.
        source: the image that the guest uses, and has used all the while.
        image: where the new image is.
        format: its format.
        size: what it takes up, in bytes.
    """

    disk: str
    source: str
    image: str
    format: str
    size: int


async def create(
    monitor: Monitor,
    schema: Schema,
    disk: str,
    image: str,
    *,
    new_format: str = "qcow2",
    compress: bool = False,
    bandwidth: int = 0,
) -> Flattened:
    """Copy, finish, flatten; see `Machine.image_create`."""
    tool = programs.qemu_img("an image cannot be flattened")
    if not discover.sees_our_files(monitor.pid):
        raise errors.Refused(
            "the QEMU sees other files than this process: nothing can be flattened"
        )
    where = places.parse(image)
    if not where.is_local:
        raise errors.UsageError(f"image {image!r} is no path")
    where = places.look(where, [], blockdev=False)
    if where.exists:
        raise errors.DestinationExists(
            f"{where.text} exists already", destination=where.text, hint="give a new path"
        )
    temporary = f"{where.text}.{names.new_run()}.part"
    options = Options(shallow=True, format="qcow2", bandwidth=bandwidth, temporary=True)
    plan = await planning.plan(monitor, schema, disk, temporary, options)
    # The job that creates the file stays, as QEMU's record of it.
    kept = [step.command.arguments["id"] for step in plan.last]
    copy = await blockcopy.start(monitor, schema, attrs.evolve(plan, last=()))
    try:
        await copy.ready()
        await copy.finish()
        await _flatten(tool, temporary, where.text, new_format, compress=compress)
    except BaseException:
        await see_through(_give_up(copy))
        remove_file(where.text)
        raise
    finally:
        await see_through(_forget(monitor, temporary, kept))
    return Flattened(plan.disk.name, plan.disk.path, where.text, new_format, _allocated(where.text))


def _allocated(path: str) -> int:
    return os.stat(path).st_blocks * _BLOCK


async def _give_up(copy: Copy) -> None:
    if copy.result is None and not copy.job.life.concluded and copy.monitor.loss is None:
        await copy.abort(force=True)


async def _forget(monitor: Monitor, temporary: str, jobs: list[str]) -> None:
    """Remove the temporary copy; then nothing needs to remember it."""
    remove_file(temporary)
    for job in jobs:
        if monitor.loss is None:
            await cancel_job(monitor, job)


async def _flatten(tool: str, source: str, image: str, new_format: str, *, compress: bool) -> None:
    # -U: QEMU may have the backing files open for writing, and does not write to them.
    words = ["convert", "-U", "-f", "qcow2", "-O", new_format, *(["-c"] if compress else [])]
    code, said = await programs.run(tool, *words, source, image)
    if code:
        raise errors.DestinationError(f"{image}: {' '.join(said.split())}", destination=image)
