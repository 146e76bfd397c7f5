# SPDX-License-Identifier: MIT
"""The plugin, run by pytest within pytest. Those tests run without a real QEMU where they can."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from qmpmirror.testing import plugin
from qmpmirror.testing.plugin import satisfies

if TYPE_CHECKING:
    from pathlib import Path

PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider")


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that uses the plugin, on a machine without QEMU."""
    monkeypatch.delenv("QMPMIRROR_QEMU", raising=False)
    monkeypatch.setenv("PATH", str(pytester.mkdir("bin")))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\n"
    )
    return pytester


def version_only(directory: Path, version: str) -> Path:
    """A program that answers ``--version`` like QEMU, and can do nothing else."""
    path = directory / f"qemu-{version}"
    path.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\necho no more >&2\nexit 3\n")
    path.chmod(0o755)
    return path


def run(pytester: pytest.Pytester, *arguments: str | Path) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*PLUGINS, "-rsE", *arguments, plugins=[plugin])


@pytest.mark.parametrize(
    ("version", "conditions", "expected"),
    [
        ((8, 2, 0), ">= 8.2", True),
        ((8, 1, 9), ">= 8.2", False),
        ((10, 0, 0), ">= 8.2", True),
        ((7, 2, 22), "<= 7.2", True),
        ((7, 2, 22), "== 7.2", True),
        ((7, 2, 22), "> 7.2", False),
        ((7, 2, 22), "!= 7.2", False),
        ((7, 2, 22), "< 7.2.23", True),
        ((10, 0, 9), ">= 8.2, < 10.0.10", True),
        ((10, 0, 10), ">= 8.2, < 10.0.10", False),
        ((11, 1, 3), ">=11", True),
    ],
)
def test_conditions(version: tuple[int, int, int], conditions: str, *, expected: bool) -> None:
    assert satisfies(version, conditions) is expected


@pytest.mark.parametrize("conditions", ["8.2", "=> 8.2", ">= 8.2 < 9", "", ">= 1.2.3.4"])
def test_condition_that_cannot_be_read(conditions: str) -> None:
    with pytest.raises(ValueError, match="not a condition"):
        satisfies((8, 2, 0), conditions)


def test_without_any_qemu_a_test_that_needs_one_is_an_error(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(qemu): pass")
    result = run(inner)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["qemu: none", "no QEMU to test against: install *--qemu=PATH*"])


def test_test_runs_once_for_each_qemu_with_the_version_as_id(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(qemu_binary): assert qemu_binary")
    old, new = (version_only(inner.path, version) for version in ("5.2.0", "11.1.3"))
    result = run(inner, "-v", f"--qemu={old}", f"--qemu={new}")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [f"qemu: 5.2.0 ({old}), 11.1.3 ({new})", "*test_it[[]5.2.0]*", "*test_it[[]11.1.3]*"]
    )


def test_environment_variable_names_a_list(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makepyfile("def test_it(qemu_binary): assert qemu_binary")
    paths = [str(version_only(inner.path, version)) for version in ("5.2.0", "11.1.3")]
    monkeypatch.setenv("QMPMIRROR_QEMU", ":".join(paths))
    run(inner).assert_outcomes(passed=2)


def test_qemu_that_is_named_and_missing_is_a_usage_error(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(): pass")
    result = run(inner, f"--qemu={inner.path / 'missing'}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--qemu: *missing*"])


def test_program_that_is_no_qemu_is_a_usage_error(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(): pass")
    result = run(inner, f"--qemu={sys.executable}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*does not answer like QEMU: Python*"])


def test_marker_skips_other_versions_and_says_why(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        import pytest

        @pytest.mark.qemu(">= 8.2")
        def test_it(qemu_binary): assert "11.1" in qemu_binary
        """
    )
    binaries = [version_only(inner.path, version) for version in ("5.2.0", "11.1.3")]
    result = run(inner, "--strict-markers", *(f"--qemu={binary}" for binary in binaries))
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs QEMU >= 8.2, this is 5.2.0*"])


@pytest.mark.parametrize(
    ("mark", "parameters", "message"),
    [
        ('">= 8.2"', "", "*test_it is marked with qemu(...), but uses no fixture that has a QEMU"),
        ('"8.2"', "qemu_binary", "*test_it*: not a condition on a version: '8.2'"),
        ("", "qemu_binary", "*test_it*: *missing 1 required positional argument*"),
    ],
)
def test_mark_that_makes_no_sense_is_a_usage_error(
    inner: pytest.Pytester, mark: str, parameters: str, message: str
) -> None:
    inner.makepyfile(
        f"""
        import pytest

        @pytest.mark.qemu({mark})
        def test_it({parameters}): pass
        """
    )
    result = run(inner, f"--qemu={version_only(inner.path, '8.2.0')}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_what_qemu_said_is_shown_when_a_test_failed(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(qemu): qemu(start_timeout=5).start()")
    result = run(inner, f"--qemu={version_only(inner.path, '7.2.0')}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*stderr of qemu-* (7.2.0)*", "no more"])


@pytest.mark.parametrize(
    "body",
    [
        "asyncio.get_running_loop().call_soon(lambda: 1 / 0); await asyncio.sleep(0)",
        "asyncio.create_task(fail()); await asyncio.sleep(0)",
        "tasks = [asyncio.create_task(fail())]; tasks += [tasks]; await asyncio.sleep(0)",
    ],
    ids=["callback", "task", "task-in-a-cycle"],
)
def test_exception_that_only_the_loop_sees_fails_the_test(
    inner: pytest.Pytester, body: str
) -> None:
    inner.makepyfile(
        f"""
        import asyncio

        async def fail(): return 1 / 0

        async def test_it(strict_loop): {body}

        async def test_it_not(strict_loop): pass
        """
    )
    # A process of its own, as the plugin of this one would take offence too.
    result = inner.runpytest_subprocess("-p", plugin.__name__, *PLUGINS)
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
    result.stdout.fnmatch_lines(["the event loop reports:", "*ZeroDivisionError*"])


def test_fake_monitor_in_a_long_directory(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        async def test_it(fake_monitor, tmp_path):
            assert len(str(tmp_path)) > 107
            async with fake_monitor() as fake:
                assert fake.path.is_socket()
        """
    )
    run(inner, f"--basetemp={inner.path / ('long' * 27)}").assert_outcomes(passed=1)


def test_fake_monitor_needs_no_qemu(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        from qemu.qmp import QMPClient

        async def test_it(fake_monitor):
            async with fake_monitor(version=(8, 2, 0)) as fake, fake_monitor() as other:
                assert fake.path != other.path
                client = QMPClient()
                await client.connect(str(fake.path))
                assert (await client.execute("query-version"))["qemu"]["minor"] == 2
                await client.disconnect()
        """
    )
    run(inner).assert_outcomes(passed=1)
