# SPDX-License-Identifier: MIT
"""The blocking face: the same names as `qmpmirror`, without ``await``.

::

    from qmpmirror import sync

    with sync.connect("/run/vm/qmp.sock") as vm:
        copy = vm.blockcopy("vda", "/backup/copy.qcow2", shallow=True)
        for progress in copy.progress():
            print(f"{progress.percent:.1f} %")
        copy.ready()
        result = copy.pivot()

Nothing is written twice: each class here is made from the asynchronous one when it is first used.
A coroutine method blocks, an asynchronous generator is an iterator, ``async with`` is ``with``, and
what is returned blocks as well. Errors and facts (`Disk`, `Result`, ...) are those of `qmpmirror`.

All connections share one event loop in a thread of its own, which lives as long as one of them is
open. So it does not matter which thread calls, nor whether a loop runs there (as in a notebook).
What a method's documentation says of cancelling is true of Ctrl-C: the call is cancelled, cleans
up, and then raises `KeyboardInterrupt`. A second Ctrl-C does not wait for the clean-up, which goes
on.
"""

from __future__ import annotations

import atexit
import functools
from typing import TYPE_CHECKING, Any, Final, TypeVar

import qmpmirror
from qmpmirror import machine
from qmpmirror.bridge import LOOP, MIXINS, Blocking, blocking_class, waits, wrap

if TYPE_CHECKING:
    from collections import abc
    from types import TracebackType
    from typing import Concatenate, Generic, overload

    from typing_extensions import ParamSpec, Self, Unpack

    from qmpmirror.operations import (
        blockcommit,
        blockpull,
        copy,
        group,
        handle,
        migration,
        move,
        onephase,
        twophase,
    )

    P = ParamSpec("P")

__all__ = qmpmirror.__all__

T = TypeVar("T")


_OPEN: Final[set[machine.Machine]] = set()


@atexit.register
def _close_all() -> None:
    for thing in [*_OPEN]:
        _close(thing)


def _close(thing: machine.Machine) -> None:
    if thing in _OPEN:
        _OPEN.discard(thing)
        try:
            LOOP.run(thing.close())
        finally:
            LOOP.release(thing)


class _Connected:
    """What a blocking `Machine` does beyond: it holds the loop from `connect` to `close`."""

    _thing: Any

    def close(self) -> None:
        """Let go of the connection; running jobs go on. Does nothing the second time."""
        _close(self._thing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


MIXINS[machine.Machine] = _Connected

if TYPE_CHECKING:
    # For type checkers alone: the names of the methods; their signatures are the asynchronous ones.
    class _Call(Generic[P, T]):
        def __get__(self, thing: object, owner: object = None) -> abc.Callable[P, T]:
            raise NotImplementedError

    _Method = abc.Callable[Concatenate[Any, P], abc.Coroutine[Any, Any, T]]

    # No overloads for those that take keywords from a TypedDict: mypy would give up on them.
    def _of_copy(method: _Method[P, copy.Copy]) -> _Call[P, Copy]: ...
    def _of_pull(method: _Method[P, blockpull.Pull]) -> _Call[P, Pull]: ...
    def _of_commit(
        method: _Method[P, blockcommit.ActiveCommit | blockcommit.InnerCommit],
    ) -> _Call[P, ActiveCommit | InnerCommit]: ...
    @overload
    def _of(method: _Method[P, move.Move]) -> _Call[P, Move]: ...
    @overload
    def _of(method: _Method[P, group.CopyGroup]) -> _Call[P, CopyGroup]: ...
    @overload
    def _of(method: _Method[P, handle.BlockJob | None]) -> _Call[P, BlockJob | None]: ...
    @overload
    def _of(method: _Method[P, T]) -> _Call[P, T]: ...
    @overload
    def _of(
        method: abc.Callable[Concatenate[Any, P], abc.AsyncIterator[T]],
    ) -> _Call[P, abc.Iterator[T]]: ...
    def _of(method: Any) -> Any: ...

    class BlockJob(Blocking):
        """A blocking `qmpmirror.BlockJob`."""

        info = _of(handle.BlockJob.info)
        progress = _of(handle.BlockJob.progress)
        error = _of(handle.BlockJob.error)
        set_bandwidth = _of(handle.BlockJob.set_bandwidth)
        pause = _of(handle.BlockJob.pause)
        resume = _of(handle.BlockJob.resume)
        cancel = _of(handle.BlockJob.cancel)

    class TwoPhaseJob(BlockJob):
        """What a `Copy` and an `ActiveCommit` have in common."""

        ready = _of(twophase.TwoPhaseJob.ready)
        pivot = _of(twophase.TwoPhaseJob.pivot)
        finish = _of(twophase.TwoPhaseJob.finish)
        abort = _of(twophase.TwoPhaseJob.abort)
        request = _of(twophase.TwoPhaseJob.request)

    class Copy(TwoPhaseJob):
        """A blocking `qmpmirror.Copy`."""

        make_synchronous = _of(copy.Copy.make_synchronous)

    class Move(Copy):
        """A blocking `qmpmirror.Move`."""

    class ActiveCommit(TwoPhaseJob):
        """A blocking `qmpmirror.ActiveCommit`."""

    class OnePhaseJob(BlockJob):
        """What an `InnerCommit` and a `Pull` have in common."""

        end = _of(onephase.OnePhaseJob.end)
        abort = _of(onephase.OnePhaseJob.abort)
        request_abort = _of(onephase.OnePhaseJob.request_abort)

    class InnerCommit(OnePhaseJob):
        """A blocking `qmpmirror.InnerCommit`."""

    class Pull(OnePhaseJob):
        """A blocking `qmpmirror.Pull`."""

    class CopyGroup(Blocking):
        """A blocking `qmpmirror.CopyGroup`."""

        copies: abc.Sequence[Copy]
        progress = _of(group.CopyGroup.progress)
        ready = _of(group.CopyGroup.ready)
        pivot = _of(group.CopyGroup.pivot)
        finish = _of(group.CopyGroup.finish)
        abort = _of(group.CopyGroup.abort)

    class Machine(_Connected, Blocking):
        """A blocking `qmpmirror.Machine`."""

        graph = _of(machine.Machine.graph)
        disks = _of(machine.Machine.disks)
        disk = _of(machine.Machine.disk)
        sizes = _of(machine.Machine.sizes)
        traffic = _of(machine.Machine.traffic)
        jobs = _of(machine.Machine.jobs)
        blockjob = _of(machine.Machine.blockjob)
        recover = _of(machine.Machine.recover)
        blockcopy = _of_copy(machine.Machine.blockcopy)
        blockcopy_group = _of(machine.Machine.blockcopy_group)
        plan_blockcopy = _of(machine.Machine.plan_blockcopy)
        start = _of_copy(machine.Machine.start)
        blockcommit = _of_commit(machine.Machine.blockcommit)
        blockpull = _of_pull(machine.Machine.blockpull)
        snapshot = _of(machine.Machine.snapshot)
        image_create = _of(machine.Machine.image_create)
        move_storage = _of(machine.Machine.move_storage)

        def migrate(
            self, destination: Machine, **options: Unpack[migration.MigrateKeywords]
        ) -> migration.MigrationResult: ...


def _opens(connect: abc.Callable[P, abc.Awaitable[machine.Machine]]) -> abc.Callable[P, Machine]:
    """A function that connects, blocking."""

    @functools.wraps(connect)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        async def opened() -> machine.Machine:
            return await connect(*args, **kwargs)

        connecting = object()
        try:
            LOOP.hold(connecting)
            thing = LOOP.run(opened())
            LOOP.hold(thing)
        finally:
            LOOP.release(connecting)
        _OPEN.add(thing)
        return wrap(thing)

    return call


connect = _opens(machine.connect)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(qmpmirror, name)
    return blocking_class(value) if isinstance(value, type) and waits(value) else value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
