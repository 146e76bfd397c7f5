# SPDX-License-Identifier: MIT
"""The pytest plugin: tests against every QEMU that ``--qemu`` names, and against a scripted one.

=====================  ==========================================================================
fixture                what it is
=====================  ==========================================================================
``qemu_binary``        the QEMU under test; a test that uses it runs once for each
``qemu``               makes `Qemu` objects of it, and stops them all afterwards
``images``             the `ImageTools` of the same version
``qemu_chain``         three qcow2 images on top of each other, in ``tmp_path``
``clean_graph``        at the end of the test, its QEMUs' block graphs must be what they were
``qmp_connect``        connects the library to one; with ``--qmp-transcript`` it is recorded
``pinned_copy``        holds a copy in the copying or in the mirroring phase
``fake_monitor``       makes `FakeMonitor` objects, each on a socket of its own
``strict_loop``        an exception that nobody but the event loop sees fails the test
=====================  ==========================================================================

``qemu`` and ``fake_monitor`` bring ``strict_loop`` along.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs
import pytest

from qmpmirror.testing.connections import pinned_copy, qmp_connect, qmp_transcript
from qmpmirror.testing.fake import FakeMonitor
from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph
from qmpmirror.testing.images import ImageTools
from qmpmirror.testing.launcher import Qemu, Version, version_of
from qmpmirror.testing.process import fits_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any

__all__ = ["pinned_copy", "qmp_connect", "qmp_transcript"]  # pytest finds them here

BINARIES = pytest.StashKey[list[str]]()
LAUNCHED = pytest.StashKey[list[Qemu]]()
CLEAN = pytest.StashKey["CleanGraph"]()
LOOP_ERRORS = pytest.StashKey["LoopErrors"]()

_NO_QEMU = (
    "no QEMU to test against: install qemu-system-x86_64, "
    "or name a binary with --qemu=PATH or the environment variable QMPMIRROR_QEMU"
)
_CONDITION = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+){0,2})")


class QemuFactory(Protocol):
    """The ``qemu`` fixture: makes an unstarted `Qemu` of the version under test.

    It takes QEMU's arguments one by one, and the keywords of `Qemu`. ``start()`` starts it, and so
    does ``with``; it is stopped after the test in any case.
    """

    def __call__(self, *arguments: str | Path, **options: Any) -> Qemu:
        """Make a QEMU; it is not started yet."""
        ...


@attrs.define
class CleanGraph:
    """The ``clean_graph`` fixture: the graphs that the test's QEMUs must have when it ends.

    A QEMU that has ended by then is not looked at.
    """

    _before: dict[Qemu, GraphSnapshot] = attrs.field(init=False, factory=dict)

    def expect(self, vm: Qemu) -> None:
        """From now on, what counts as clean is the graph as it is. So it is at each start."""
        self._before[vm] = GraphSnapshot.take(vm.execute)

    def check(self) -> None:
        """Raise AssertionError unless the graphs are as expected."""
        for vm, before in self._before.items():
            if vm.running:
                assert_clean_graph(vm.execute, before)


class LoopErrors(logging.Handler):
    """Collects what asyncio only logs: exceptions that reached the event loop, and no caller."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's text with its traceback."""
        self.errors.append(self.format(record))

    def check(self, item: pytest.Item) -> None:
        """Fail if anything was collected, and the test has asked for it."""
        errors, self.errors = self.errors, []
        if errors and "strict_loop" in getattr(item, "fixturenames", ()):
            pytest.fail("the event loop reports:\n" + "\n".join(errors), pytrace=False)


def satisfies(version: Version, conditions: str) -> bool:
    """Whether a version fulfils all of some comma-separated conditions.

    As many numbers are compared as the condition has: 7.2.22 is ``== 7.2`` and ``<= 7.2``.

    Args:
        version: The version.
        conditions: For example ``">= 8.2, < 10.0.10"``.

    Raises:
        ValueError: A condition that cannot be read.
    """
    for condition in conditions.split(","):
        match = _CONDITION.fullmatch(condition.strip())
        if match is None:
            raise ValueError(f"not a condition on a version: {condition.strip()!r}")
        wanted = tuple(map(int, match[2].split(".")))
        have = version[: len(wanted)]
        fulfilled = {
            ">=": have >= wanted,
            "<=": have <= wanted,
            "==": have == wanted,
            "!=": have != wanted,
            ">": have > wanted,
            "<": have < wanted,
        }
        if not fulfilled[match[1]]:
            return False
    return True


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--qemu`` and ``--qmp-transcript``."""
    group = parser.getgroup("qmpmirror")
    group.addoption(
        "--qmp-transcript",
        metavar="DIR",
        help="write all that passes over QMP to DIR, a file for each connection that the fixtures "
        "qmp_connect and pinned_copy make",
    )
    group.addoption(
        "--qemu",
        action="append",
        metavar="PATH",
        help="a qemu-system binary to test against; repeatable. Write --qemu=PATH, or pytest takes "
        "PATH for a place of tests. Default: those in the environment variable QMPMIRROR_QEMU (a "
        "list like PATH), or else qemu-system-x86_64 on PATH",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and find the QEMUs."""
    config.addinivalue_line(
        "markers",
        'qemu(conditions): run only with such a QEMU version, for example ">= 8.2, < 10.0.10"',
    )
    named = config.getoption("--qemu") or [
        path for path in os.environ.get("QMPMIRROR_QEMU", "").split(os.pathsep) if path
    ]
    found = [shutil.which(path) or path for path in named or ["qemu-system-x86_64"]]
    if not named and shutil.which(found[0]) is None:
        found = []
    # A test may change the working directory.
    binaries = [str(Path(path).absolute()) for path in found]
    try:
        for binary in binaries:
            version_of(binary)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--qemu: {error}") from error
    config.stash[BINARIES] = binaries
    config.stash[LOOP_ERRORS] = LoopErrors()
    logging.getLogger("asyncio").addHandler(config.stash[LOOP_ERRORS])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop listening to asyncio."""
    if LOOP_ERRORS in config.stash:
        logging.getLogger("asyncio").removeHandler(config.stash[LOOP_ERRORS])


def pytest_report_header(config: pytest.Config) -> str:
    """Say which QEMUs are tested against."""
    return "qemu: " + (
        ", ".join(f"{_dotted(binary)} ({binary})" for binary in config.stash[BINARIES]) or "none"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that needs a QEMU once for each of them."""
    if "qemu_binary" in metafunc.fixturenames:
        # Without any the test must still run, to fail: a skip would look like a success.
        binaries: list[str | None] = [*metafunc.config.stash[BINARIES]] or [None]
        metafunc.parametrize(
            "qemu_binary",
            binaries,
            ids=["none" if binary is None else _dotted(binary) for binary in binaries],
            indirect=True,
            scope="session",
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that are marked for other versions."""
    for item in items:
        for marker in item.iter_markers("qemu"):
            callspec = getattr(item, "callspec", None)
            if callspec is None or "qemu_binary" not in callspec.params:
                raise pytest.UsageError(
                    f"{item.nodeid} is marked with qemu(...), but uses no fixture that has a QEMU"
                )
            binary = callspec.params["qemu_binary"]
            try:
                if binary is not None and not satisfies(version_of(binary), *marker.args):
                    reason = f"needs QEMU {marker.args[0]}, this is {_dotted(binary)}"
                    item.add_marker(pytest.mark.skip(reason=reason))
            except (TypeError, ValueError) as error:
                raise pytest.UsageError(f"mark of {item.nodeid}: {error}") from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test whose event loop has seen an exception."""
    yield
    item.config.stash[LOOP_ERRORS].check(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """As above, for tasks whose exception nobody has asked for before the loop was closed."""
    yield
    if inspect.iscoroutinefunction(getattr(item, "obj", None)):
        gc.collect()  # asyncio reports such a task when it is destroyed
    item.config.stash[LOOP_ERRORS].check(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the test's QEMUs said when it failed."""
    report = yield
    if report.failed and call.when in {"setup", "call"}:
        for vm in item.stash.get(LAUNCHED, []):
            if vm.tail():
                title = f"stderr of {vm.label} ({_dotted(vm.binary)})"
                report.sections.append((title, vm.tail()))
    return report


@pytest.fixture
def strict_loop() -> None:
    """An exception that only an event loop has seen (and logged) fails the test."""


@pytest.fixture(scope="session")
def qemu_binary(request: pytest.FixtureRequest) -> str:
    """Path of the QEMU under test; a test that uses it runs once for each ``--qemu``."""
    binary: str | None = request.param
    if binary is None:
        pytest.fail(_NO_QEMU, pytrace=False)
    return binary


@pytest.fixture
def images(qemu_binary: str) -> ImageTools:
    """qemu-img and qemu-io of the version under test."""
    return ImageTools(qemu=qemu_binary)


@pytest.fixture
def qemu_chain(images: ImageTools, tmp_path: Path) -> list[Path]:
    """Three qcow2 images on top of each other, the lowest first; all of them hold data."""
    return images.make_chain(tmp_path)


@pytest.fixture
def qemu(
    request: pytest.FixtureRequest,
    qemu_binary: str,
    tmp_path: Path,
    strict_loop: None,  # noqa: ARG001 - brought along
) -> Iterator[QemuFactory]:
    """A factory of QEMUs of the version under test (see `QemuFactory`)."""
    launched: list[Qemu] = request.node.stash.setdefault(LAUNCHED, [])

    def started(vm: Qemu) -> None:
        if CLEAN in request.node.stash:
            request.node.stash[CLEAN].expect(vm)

    def make(*arguments: str | Path, **options: Any) -> Qemu:
        options = {
            "binary": qemu_binary,
            "directory": tmp_path,
            "after_start": started,
            **options,
        }
        vm = Qemu(arguments=arguments, **options)
        launched.append(vm)
        return vm

    yield make
    for vm in launched:
        vm.stop()


@pytest.fixture
def clean_graph(
    request: pytest.FixtureRequest,
    qemu: QemuFactory,  # noqa: ARG001 - still has them running when this one ends
) -> Iterator[CleanGraph]:
    """When the test ends, the graphs of its QEMUs must be what they were at their start."""
    clean = request.node.stash[CLEAN] = CleanGraph()
    for vm in request.node.stash[LAUNCHED]:
        if vm.running:
            clean.expect(vm)
    yield clean
    clean.check()


@pytest.fixture
def fake_monitor(
    tmp_path: Path,
    strict_loop: None,  # noqa: ARG001 - brought along
) -> Iterator[Callable[..., FakeMonitor]]:
    """A factory of `FakeMonitor` objects, each on a socket of its own; it takes their keywords."""
    numbers = itertools.count(1)
    with contextlib.ExitStack() as stack:
        directory = tmp_path
        if not fits_socket(directory / "fake-999"):
            short = tempfile.TemporaryDirectory(prefix="qmpmirror-", dir="/tmp")
            directory = Path(stack.enter_context(short))

        def make(**options: Any) -> FakeMonitor:
            return FakeMonitor(**{"path": directory / f"fake-{next(numbers)}", **options})

        yield make


def _dotted(binary: str) -> str:
    return ".".join(map(str, version_of(binary)))
