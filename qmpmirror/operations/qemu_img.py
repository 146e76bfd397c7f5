# SPDX-License-Identifier: MIT
"""``qemu-img``, for the little that QEMU itself is not asked to do."""

from __future__ import annotations

import asyncio
import shutil

from qmpmirror import errors


def find(what_for: str) -> str:
    """Where it is.

    Args:
        what_for: what cannot be done without it, as the sentence begins.

    Raises:
        Refused: it is not there.
    """
    tool = shutil.which("qemu-img")
    if tool is None:
        raise errors.Refused(f"{what_for}: there is no qemu-img here")
    return tool


async def run(tool: str, *words: str) -> tuple[int, str]:
    """Run it to its end; cancelling this ends it.

    Returns:
        Its exit code, and all that it said.
    """
    process = await asyncio.create_subprocess_exec(
        *(tool, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace").strip()
