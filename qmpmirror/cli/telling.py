# SPDX-License-Identifier: MIT
"""Telling how far a job is while something else is waited for."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpmirror.cli.render import Output
    from qmpmirror.operations.handle import Progress


@asynccontextmanager
async def progress_told(
    reports: AsyncIterator[Progress], output: Output, *, verbose: bool
) -> AsyncIterator[asyncio.Task[None] | None]:
    """Tell of each report while the block lasts, if there is anybody to be told.

    Args:
        reports: what to tell of.
        output: where.
        verbose: whether a person wants it; a program always does.

    Yields:
        The task that tells: waiting for it sees the last report. None when nobody is told.
    """
    if not (verbose or output.as_json):
        yield None
        return

    async def tell() -> None:
        async for progress in reports:
            if verbose:
                output.progress(progress)
            output.event("progress", **progress.fields())

    telling = asyncio.create_task(tell())
    try:
        yield telling
    finally:
        telling.cancel()
        # Its error, if any, is that of what is waited for too.
        await asyncio.gather(telling, return_exceptions=True)
