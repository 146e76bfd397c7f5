# SPDX-License-Identifier: MIT
"""Waiting for several things at once, and for what must not stop half-way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qmpmirror import discover

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

T = TypeVar("T")

_ENDING_CHECKS: Final = 40
_ENDING_PAUSE: Final = 0.05


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all; the first error, or a cancellation, ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ends_now(pid: int) -> bool:
    """Whether a QEMU has ended that has just hung up: it does that a moment before."""
    for _ in range(_ENDING_CHECKS):
        if discover.has_ended(pid):
            return True
        await asyncio.sleep(_ENDING_PAUSE)
    return discover.has_ended(pid)


async def see_through(work: Coroutine[Any, Any, T]) -> T:
    """Wait for what would do harm half-done; a cancellation takes effect after it."""
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        task.exception()  # it counts as seen
        raise cancellation
    return task.result()
