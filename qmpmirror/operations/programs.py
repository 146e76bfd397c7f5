# SPDX-License-Identifier: MIT
"""Programs that do the little that QEMU itself is not asked to do, such as ``qemu-img``."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

from qmpmirror import errors

if TYPE_CHECKING:
    from collections.abc import Collection


def qemu_img(what_for: str) -> str:
    """Where ``qemu-img`` is.

    Args:
        what_for: what cannot be done without it, as the sentence begins.

    Raises:
        Refused: it is not there.
    """
    tool = shutil.which("qemu-img")
    if tool is None:
        raise errors.Refused(f"{what_for}: there is no qemu-img here")
    return tool


async def run(program: str, *words: str, keeps: Collection[int] = ()) -> tuple[int, str]:
    """Run a program to its end; cancelling this ends it.

    Args:
        program: its name or path.
        words: its arguments.
        keeps: file descriptors that it has open too.

    Returns:
        Its exit code, and all that it said.
    """
    process = await asyncio.create_subprocess_exec(
        *(program, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=keeps,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace").strip()
