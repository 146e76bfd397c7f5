# SPDX-License-Identifier: MIT
"""The backing files of a disk that is moved with its chain.

Nobody writes to them, so they are copied as files while the guest runs. Until all are there each
has a name of the run's own: ``NAME.RUN.part``, and when it is whole ``NAME.RUN.copied``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror import disks, errors
from qmpmirror.operations import programs
from qmpmirror.steps import remove_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qmpmirror.disks import Disk
    from qmpmirror.graph import Graph, Node

_BLOCK: Final = 512
_DIFFERENT: Final = 1
_PART: Final = "part"
_COPIED: Final = "copied"
_PAUSE: Final = 0.2
"""Seconds between two looks whether another process has copied a file."""


@attrs.frozen
class BackingFile:
    """One of them.

    Attributes:
        node: the node that has it open.
        source: where it is.
        path: where it is going to be.
        format: its format.
        below: where its own backing file is going to be; empty when it has none.
        below_format: that one's format.
    """

    node: str
    source: str
    path: str
    format: str
    below: str = ""
    below_format: str = ""

    def part(self, run: str) -> str:
        """Where it is while it is being copied."""
        return f"{self.path}.{run}.{_PART}"

    def copied(self, run: str) -> str:
        """Where it is when it is whole, until the move has ended."""
        return f"{self.path}.{run}.{_COPIED}"


def plan(picture: Graph, image: Node, folder: str, working_folder: str | None) -> list[BackingFile]:
    """The backing files of an image, top down, and where in ``folder`` they go."""
    planned: list[BackingFile] = []
    for below in picture.chain(image.name)[1:]:
        source = disks.path_of(picture, below.name, working_folder)
        path = os.path.join(folder, os.path.basename(source))
        if planned:
            planned[-1] = attrs.evolve(planned[-1], below=path, below_format=below.driver)
        planned.append(BackingFile(below.name, source, path, below.driver))
    return planned


def check(picture: Graph, disk: Disk, files: Sequence[BackingFile]) -> None:
    """Look whether all of them can be moved.

    Raises:
        Refused: one of them is no plain file, or two have the same name.
    """
    known = {os.path.basename(disk.path)}
    for file in files:
        _check_movable(picture, picture.nodes[file.node], file.source)
        name = os.path.basename(file.path)
        if name in known:
            raise errors.Refused(
                f"two images of the chain are called {name}: they cannot be in one folder"
            )
        known.add(name)


def _check_movable(picture: Graph, image: Node, source: str) -> None:
    storage = picture.storage(image.name)
    if storage.driver == "file" and not os.path.lexists(source):
        raise errors.Refused(
            f"image {source} of the chain is not there any more",
            hint="QEMU has it open: copy the disk alone, with blockcopy, as long as QEMU runs",
        )
    if storage.driver != "file" or not os.path.isfile(source) or image.child("data-file"):
        raise errors.Refused(
            f"image {source} of the chain is no plain file: it cannot be moved",
            hint="copy the disk alone, with blockcopy",
        )
    if image.encrypted:
        raise errors.Refused(
            f"image {source} of the chain is encrypted: QEMU could not open it at the new place",
            hint="copy the disk without its chain, with blockcopy",
        )


def check_folder(folder: str) -> None:
    """Look whether files can be created in a folder and have two names there.

    Raises:
        DestinationError: they cannot.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qmpmirror-") as probe:
            second = f"{probe.name}.link"
            os.link(probe.name, second)
            os.unlink(second)
    except OSError as error:
        raise errors.DestinationError(
            f"no files can be created and linked in {folder}: {error.strerror}", destination=folder
        ) from None


async def first_present(files: Sequence[BackingFile]) -> str:
    """The node of the topmost image that is at its new place already, with all below it.

    Both are read to their ends to see whether they hold the same; cancelling this ends it.

    Raises:
        DestinationError: something else is at an image's new place.
    """
    present = ""
    for file in reversed(files):
        if not _is_taken(file.path):
            break
        await _check_same(file)
        present = file.node
    for file in created(files, present):
        if _is_taken(file.path):
            raise errors.DestinationExists(
                f"{file.path} exists already, and the image below it does not",
                destination=file.path,
                hint="move it away, or give another folder",
            )
    return present


def created(files: Sequence[BackingFile], present: str) -> list[BackingFile]:
    """Those that a move has to copy: the ones above what was there before."""
    nodes = [file.node for file in files]
    return [*files[: nodes.index(present)]] if present in nodes else [*files]


async def _check_same(file: BackingFile) -> None:
    tool = programs.qemu_img("the chain cannot be moved")
    if not same(file.path, file.source):
        formats = ["-f", file.format, "-F", file.format]
        code, said = await programs.run(tool, "compare", "-U", *formats, file.source, file.path)
        if code == _DIFFERENT:
            raise _refused(file, f"does not hold what {file.source} holds: {said}")
        if code:
            raise _refused(file, f"could not be compared with {file.source}: {said}")
    words = ["info", "-U", "--output", "json", "-f", file.format, file.path]
    code, said = await programs.run(tool, *words)
    if code:
        raise _refused(file, f"cannot be read: {said}")
    below = json.loads(said).get("full-backing-filename", "")
    if not same(below, file.below):
        raise _refused(file, f"stands on {below or 'nothing'}, not on {file.below or 'nothing'}")


def _is_taken(path: str) -> bool:
    return os.path.lexists(path)


def same(one: str, other: str) -> bool:
    """Whether two paths, or two empty strings, mean the same file."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other) if one and other else one == other


def _refused(file: BackingFile, why: str) -> errors.DestinationExists:
    return errors.DestinationExists(
        f"{file.path} exists already and {why}",
        destination=file.path,
        hint="move it away, or give another folder",
    )


async def bring(files: Sequence[BackingFile], run: str) -> None:
    """Copy those that are not there yet; cancelling this ends it, and it can be repeated.

    While another process is at one of them, this waits for it.

    Raises:
        DestinationError: one cannot be copied.
    """
    for file in files:
        while not is_there(file, run):
            with _opened(file.part(run)) as descriptor:
                if _is_ours(descriptor, file.part(run)):
                    await _copy(file, file.part(run), descriptor)
                    os.rename(file.part(run), file.copied(run))
                    break
            await asyncio.sleep(_PAUSE)


def is_there(file: BackingFile, run: str) -> bool:
    """Whether it has been copied to its end."""
    return os.path.lexists(file.copied(run))


@contextlib.contextmanager
def _opened(part: str) -> Iterator[int]:
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.DestinationError(
            f"{part} cannot be created: {error.strerror}", destination=part
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_ours(descriptor: int, part: str) -> bool:
    """Whether nobody else writes to it: no process like this, nor the ``cp`` of a dead one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(part))
    except (BlockingIOError, FileNotFoundError):
        return False


async def _copy(file: BackingFile, part: str, descriptor: int) -> None:
    words = ["--sparse=always", "--reflink=auto", "--preserve=timestamps"]
    # It holds the lock as long as it lives, even longer than we do.
    code, said = await programs.run("cp", *words, "--", file.source, part, keeps=(descriptor,))
    if not code and file.below:
        tool = programs.qemu_img("the chain cannot be moved")
        below = ["-b", file.below, "-F", file.below_format]
        code, said = await programs.run(tool, "rebase", "-u", "-f", file.format, *below, part)
    if code:
        raise errors.DestinationError(f"{part}: {' '.join(said.split())}", destination=part)
    make_alike(file.source, part)
    await asyncio.to_thread(os.fsync, descriptor)


def make_alike(source: str, path: str) -> None:
    """Give a file the mode and, where that is allowed, the owner of another: QEMU's, perhaps."""
    status = os.stat(source)
    with contextlib.suppress(PermissionError):
        os.chmod(path, stat.S_IMODE(status.st_mode))
        os.chown(path, status.st_uid, status.st_gid)


def publish(files: Sequence[BackingFile], run: str) -> None:
    """Give the whole ones their names, lowest first; it can be repeated.

    They keep the run's own names besides: these tell them from what was not brought by it.

    Raises:
        DestinationExists: something has got one of the names meanwhile.
        DestinationError: it cannot be done.
    """
    for file in reversed(files):
        try:
            os.link(file.copied(run), file.path)
        except FileExistsError:
            if not same(file.copied(run), file.path):
                raise _refused(file, "was not there before") from None
        except OSError as error:
            raise errors.DestinationError(
                f"{file.path} cannot be created: {error.strerror}", destination=file.path
            ) from None


def tidy(folder: str, run: str, *, keep: bool) -> None:
    """Remove the names of the run's own from a folder, and unless they are kept the files.

    Raises:
        OSError: one cannot be removed.
    """
    for entry in [*os.scandir(folder)]:
        path, dot, state = entry.path.rpartition(f".{run}.")
        if not dot or state not in {_PART, _COPIED}:
            continue
        if state == _COPIED and not keep and same(entry.path, path):
            remove_file(path)
        os.unlink(entry.path)


def size(files: Sequence[BackingFile]) -> int:
    """What has to be copied, in bytes: as much as they take up."""
    return sum(map(_allocated, (file.source for file in files)))


def done(files: Sequence[BackingFile], run: str) -> int:
    """How much of it is there."""
    return sum(_allocated(file.part(run)) + _allocated(file.copied(run)) for file in files)


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * _BLOCK
    except FileNotFoundError:
        return 0
