# SPDX-License-Identifier: MIT
"""The bridge alone, over a scripted QEMU and over small coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror import bridge, sync
from qmpmirror.operations.copy import Copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qmpmirror.testing import FakeMonitor


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "qmpmirror-sync"]


@pytest.fixture
def loop() -> Iterator[bridge.Loop]:
    made = bridge.Loop()
    yield made
    assert threads() == []


def test_all_public_names_are_there() -> None:
    assert sync.__all__ == qmpmirror.__all__
    for name in sync.__all__:
        assert getattr(sync, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sync.nonsense  # noqa: B018
    assert {*sync.__all__} <= {*dir(sync)}


def test_errors_and_facts_are_the_very_same() -> None:
    assert sync.Error is qmpmirror.Error
    assert sync.Result is qmpmirror.Result


@pytest.mark.parametrize("name", ["Machine", "Copy", "CopyGroup", "BlockJob"])
def test_each_method_blocks_under_its_name_and_documentation(name: str) -> None:
    original, blocking = getattr(qmpmirror, name), getattr(sync, name)
    assert blocking.__doc__ == original.__doc__
    found = 0
    for attribute, member in inspect.getmembers(original, inspect.isroutine):
        if attribute.startswith("_") or not (
            inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        ):
            continue
        method = getattr(blocking, attribute)
        assert not inspect.iscoroutinefunction(method)
        assert not inspect.isasyncgenfunction(method)
        assert method.__doc__ == member.__doc__
        assert [*inspect.signature(method).parameters] == [*inspect.signature(member).parameters]
        found += 1
    assert found >= 5


def test_a_blocking_copy_is_a_blocking_job() -> None:
    assert issubclass(sync.Copy, sync.BlockJob)
    assert sync.Copy is bridge.blocking_class(Copy)
    assert vars(sync.BlockJob)["phase"].__doc__ == qmpmirror.BlockJob.phase.__doc__


def test_results_and_errors_come_through(loop: bridge.Loop) -> None:
    async def work(fails: bool) -> str:
        await asyncio.sleep(0)
        if fails:
            raise qmpmirror.NotReady("not yet", job_id="")
        return "done"

    assert loop.run(work(fails=False)) == "done"
    with pytest.raises(qmpmirror.NotReady, match="not yet"):
        loop.run(work(fails=True))


def test_a_cancelled_coroutine_raises_and_does_not_hang(loop: bridge.Loop) -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        loop.run(work())


async def test_a_running_loop_in_the_callers_thread_does_not_matter(loop: bridge.Loop) -> None:
    mine = asyncio.get_running_loop()

    async def work() -> bool:
        return asyncio.get_running_loop() is not mine

    assert loop.run(work())


def test_a_call_in_the_loops_own_thread_is_refused(loop: bridge.Loop) -> None:
    async def inner() -> None: ...

    async def outer() -> None:
        loop.run(inner())

    with pytest.raises(RuntimeError, match="would never end"):
        loop.run(outer())


def test_calls_of_several_threads_run_side_by_side(loop: bridge.Loop) -> None:
    arrived: list[int] = []
    all_here = asyncio.Event()

    async def meet(number: int) -> None:
        arrived.append(number)
        if len(arrived) == 5:
            all_here.set()
        await all_here.wait()

    callers = [threading.Thread(target=lambda n=n: loop.run(meet(n))) for n in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert sorted(arrived) == [0, 1, 2, 3, 4]


def test_the_thread_lives_as_long_as_somebody_holds_it(loop: bridge.Loop) -> None:
    async def which() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop.hold("a")
    loop.hold("b")
    first = loop.run(which())
    loop.release("a")
    assert threads() == ["qmpmirror-sync"]
    assert loop.run(which()) is first
    loop.release("b")
    assert threads() == []
    assert first.is_closed()
    assert loop.run(which()) is not first


def test_its_end_cancels_what_still_runs(loop: bridge.Loop) -> None:
    ended = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def leave_running() -> None:
        loop.task = asyncio.create_task(forever())  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    loop.hold("test")
    loop.run(leave_running())
    assert not ended.is_set()
    loop.release("test")
    assert ended.is_set()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C counts, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_cancels_the_call_and_waits_for_its_clean_up(
    loop: bridge.Loop, presses: int
) -> None:
    steps: list[str] = []
    go_on = threading.Event()

    async def work() -> None:
        main = threading.main_thread().ident
        assert main is not None
        try:
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            steps.append("cleans up")
            if presses == 2:
                signal.pthread_kill(main, signal.SIGINT)
                await asyncio.to_thread(go_on.wait)
            await asyncio.sleep(0)
            steps.append("clean")

    loop.hold("test")
    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert steps == (["cleans up", "clean"] if presses == 1 else ["cleans up"])
    go_on.set()
    while "clean" not in steps:
        loop.run(asyncio.sleep(0.001))
    loop.release("test")


@contextlib.contextmanager
def served(fake: FakeMonitor) -> Iterator[str]:
    """A fake monitor in a loop, and a thread, of its own."""
    loop = bridge.Loop()
    loop.hold("test")
    loop.run(fake.__aenter__())
    try:
        yield str(fake.path)
    finally:
        loop.run(fake.__aexit__(None, None, None))
        loop.release("test")


def test_a_scripted_qemu_is_talked_to(fake_monitor: Callable[..., Any]) -> None:
    with served(fake_monitor()) as path, sync.connect(path) as vm:
        assert isinstance(vm, sync.Machine)
        assert vm.jobs() == []
        assert isinstance(vm.monitor, bridge.Blocking)
        assert vm.monitor.execute("query-block-jobs") == []
        assert len(threads()) == 2  # one is the fake's
    assert threads() == []
    vm.close()
    with pytest.raises(qmpmirror.ConnectionLost):
        vm.jobs()
    assert threads() == []


def test_a_refused_connection_leaves_no_thread() -> None:
    with pytest.raises(qmpmirror.NoSuchMonitor):
        sync.connect("/nonexistent/socket", timeout=1)
    assert threads() == []


SCRIPT = """
import sys
from qmpmirror import bridge, sync
vm = sync.connect(sys.argv[1])
print(vm.jobs())
"""


def test_a_script_that_closes_nothing_ends_silently(fake_monitor: Callable[..., Any]) -> None:
    with served(fake_monitor()) as path:
        run = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT, path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


def test_an_interrupt_at_any_instant_leaves_nothing_behind(loop: bridge.Loop) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def press(number: int, pressed: threading.Event) -> None:
        pressed.wait(number * 2e-5)
        signal.pthread_kill(main, signal.SIGINT)
        pressed.set()

    interrupted = 0
    for number in range(100):
        pressed = threading.Event()
        caller = threading.Thread(target=press, args=(number, pressed))
        try:
            caller.start()
            loop.run(asyncio.sleep(0.001))
            pressed.wait()
            caller.join()
        except KeyboardInterrupt:
            interrupted += 1
            caller.join()
    assert interrupted == 100
    assert loop._holders == set()
    # A thread that was interrupted when it was starting ends by itself.
    while threads():
        threading.Event().wait(0.05)
