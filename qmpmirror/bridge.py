# SPDX-License-Identifier: MIT
"""From asynchronous classes to blocking ones, at run time and for any class of this package.

A coroutine method blocks, an asynchronous generator is an iterator, and what is returned blocks as
well if there is anything in it to wait for. All else is passed through.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections import abc

T = TypeVar("T")

_SEQUENCES: Final = (list, tuple)
_LOOK_SECONDS: Final = 1.0
_PACKAGE: Final = "qmpmirror."


class Loop:
    """The event loop of all blocking calls; its thread lives while somebody holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: set[object] = set()
        self._running: tuple[threading.Thread, asyncio.AbstractEventLoop, asyncio.Event] | None
        self._running = None

    def hold(self, holder: object) -> None:
        """Keep the loop until `release`."""
        with self._lock:
            self._holders.add(holder)
            if self._running is None:
                started = threading.Event()
                threading.Thread(
                    target=self._serve, args=(started,), name="qmpmirror-sync", daemon=True
                ).start()
                started.wait()

    def release(self, holder: object) -> None:
        """Let the loop end, if nobody else holds it. Does nothing the second time."""
        with self._lock:
            self._holders.discard(holder)
            if not self._holders:
                self._end()

    def run(self, work: abc.Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine; whatever interrupts the wait cancels it."""
        if self._running is not None and threading.current_thread() is self._running[0]:
            work.close()
            raise RuntimeError("a blocking call in the event loop's own thread would never end")
        # Ctrl-C can come between any two lines.
        holder = object()
        try:
            try:
                self.hold(holder)
            except BaseException:
                work.close()
                raise
            return self._wait(work)
        finally:
            self.release(holder)

    def _wait(self, work: abc.Coroutine[Any, Any, T]) -> T:
        done: Future[T] = Future()
        task: asyncio.Task[T] | None = None
        assert self._running is not None  # noqa: S101 - it is held
        _, loop, _ = self._running

        def start() -> None:
            nonlocal task
            task = asyncio.ensure_future(work)
            task.add_done_callback(lambda ended: _copy_outcome(ended, done))

        def cancel() -> None:
            if task is not None:
                task.cancel()
            else:
                work.close()
                done.set_exception(asyncio.CancelledError())

        try:
            loop.call_soon_threadsafe(start)
            wait([done])
        except BaseException:
            loop.call_soon_threadsafe(cancel)
            wait([done])
            raise
        return done.result()

    def _serve(self, started: threading.Event) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._main(started))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    async def _main(self, started: threading.Event) -> None:
        stop = asyncio.Event()
        if self._running is None:
            self._running = threading.current_thread(), asyncio.get_running_loop(), stop
        else:
            stop.set()
        started.set()
        while not stop.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK_SECONDS)
            self._end_unless_held(stop)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _end_unless_held(self, stop: asyncio.Event) -> None:
        """Ctrl-C may have come when the thread was starting: then nobody knows of it."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._holders and not stop.is_set():
                    self._running = None
                    stop.set()
            finally:
                self._lock.release()

    def _end(self) -> None:
        if self._running is not None:
            thread, loop, stop = self._running
            self._running = None
            loop.call_soon_threadsafe(stop.set)
            thread.join()


LOOP: Final = Loop()
"""That of all blocking calls."""

MIXINS: Final[dict[type, type]] = {}
"""For an asynchronous class what its blocking one does itself."""


class Blocking:
    """What all classes here have in common: each object stands for an asynchronous one."""

    _thing: Any

    def __init__(self, thing: object) -> None:
        object.__setattr__(self, "_thing", thing)

    def __getattr__(self, name: str) -> Any:
        if name == "_thing":
            raise AttributeError(name)  # a bare object, as the copy module makes it
        return wrap(getattr(self._thing, name))

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._thing, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._thing)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocking) and self._thing is other._thing

    def __hash__(self) -> int:
        return hash(self._thing)

    def __repr__(self) -> str:
        return f"<blocking {self._thing!r}>"


@functools.cache
def waits(cls: type) -> bool:
    """Whether objects of a class have anything that a caller would have to await."""
    return cls.__module__.startswith(_PACKAGE) and any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for base in cls.__mro__
        for member in vars(base).values()
    )


@functools.cache
def blocking_class(cls: type) -> type[Blocking]:
    """The blocking class that stands for an asynchronous one."""
    bases: tuple[type, ...] = tuple(filter(waits, cls.__bases__))
    bases = tuple(map(blocking_class, bases)) or (Blocking,)
    mixin = MIXINS.get(cls, object)
    if mixin is not object:
        bases = (mixin, *bases)
    members: dict[str, object] = {"__doc__": cls.__doc__, "__module__": "qmpmirror.sync"}
    for name, member in vars(cls).items():
        if name.startswith("_") or name in vars(mixin):
            continue
        if inspect.iscoroutinefunction(member):
            members[name] = _blocking(member)
        elif inspect.isasyncgenfunction(member):
            members[name] = _iterating(member)
        elif isinstance(member, property):
            members[name] = property(functools.partial(_read, name), doc=member.__doc__)
    return type(cls.__name__, bases, members)


def _blocking(method: abc.Callable[..., abc.Coroutine[Any, Any, Any]]) -> abc.Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Blocking, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = unwrap(args), {name: unwrap(value) for name, value in kwargs.items()}
        return wrap(LOOP.run(method(self._thing, *args, **kwargs)))

    return call


def _iterating(
    method: abc.Callable[..., abc.AsyncGenerator[Any, None]],
) -> abc.Callable[..., abc.Iterator[Any]]:
    @functools.wraps(method)
    def call(self: Blocking, *args: Any, **kwargs: Any) -> abc.Iterator[Any]:
        stream = method(self._thing, *args, **kwargs)
        end = object()

        async def step() -> Any:
            return await anext(stream, end)

        try:
            while (item := LOOP.run(step())) is not end:
                yield wrap(item)
        finally:
            LOOP.run(stream.aclose())

    return call


def _read(name: str, blocking: Blocking) -> Any:
    return blocking.__getattr__(name)


def wrap(value: Any) -> Any:
    """A value as a caller without ``await`` needs it."""
    kind: type = type(value)
    if kind in _SEQUENCES:
        return kind(map(wrap, value))
    return blocking_class(kind)(value) if waits(kind) else value


def unwrap(value: Any) -> Any:
    """The asynchronous object that a blocking one stands for."""
    if type(value) in _SEQUENCES:
        return type(value)(map(unwrap, value))
    return vars(value)["_thing"] if isinstance(value, Blocking) else value


def _copy_outcome(ended: asyncio.Task[T], done: Future[T]) -> None:
    if ended.cancelled():
        done.set_exception(asyncio.CancelledError())
    elif (error := ended.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(ended.result())
