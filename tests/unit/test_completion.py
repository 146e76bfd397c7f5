# SPDX-License-Identifier: MIT
"""Completion and the man page, in the shells themselves where there are any."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from qmpmirror.cli import COMMANDS, main
from qmpmirror.cli.completion import SCRIPTS
from qmpmirror.cli.manual import commands

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Offered = Callable[..., list[str]]

SHELLS = ("bash", "zsh", "fish")

FAKE = """#!/bin/sh
[ "$*" = "completion --domains" ] && printf 'testvm\\nothervm\\n'
"""


def ask(shell: str, script: str, *words: str, folder: Path) -> list[str]:
    """Run a shell's own script; its lines."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    fake = folder / "qmpmirror"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    ran = subprocess.run(
        [program, *(["-f"] if shell == "zsh" else []), "-c", script, shell, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "TERM": "dumb"},
    )
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def bash(folder: Path, *line: str) -> list[str]:
    """What bash offers for the last word."""
    script = f"""
    compopt() {{ :; }}
    {SCRIPTS["bash"]()}
    COMP_WORDS=(qmpmirror "$@")
    COMP_CWORD=$#
    _qmpmirror
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return ask("bash", script, *line, folder=folder)


def fish(folder: Path, *line: str) -> list[str]:
    """What fish offers for the last word, without its descriptions."""
    script = SCRIPTS["fish"]() + f"\ncomplete -C 'qmpmirror {' '.join(line)}'"
    return [text.partition("\t")[0] for text in ask("fish", script, folder=folder)]


@pytest.mark.parametrize("offered", [bash, fish])
def test_commands(tmp_path: Path, offered: Offered) -> None:
    found = set(offered(tmp_path, ""))
    assert set(COMMANDS) <= found
    assert set(offered(tmp_path, "dombl")) == {"domblklist", "domblkinfo", "domblkstat"}


@pytest.mark.parametrize("offered", [bash, fish])
def test_options(tmp_path: Path, offered: Offered) -> None:
    for command in commands():
        long = {f for option in command.options for f in option.flags if f.startswith("--")}
        assert long <= set(offered(tmp_path, command.name, "--")), command.name


@pytest.mark.parametrize("offered", [bash, fish])
def test_running_qemus(tmp_path: Path, offered: Offered) -> None:
    assert {"testvm", "othervm"} <= set(offered(tmp_path, "blockcopy", ""))
    assert "testvm" in offered(tmp_path, "blockcopy", "--shallow", "te")
    assert "testvm" in offered(tmp_path, "domblklist", "--domain", "te")


def test_bash_offers_no_qemu_for_what_is_no_domain(tmp_path: Path) -> None:
    assert "testvm" not in bash(tmp_path, "blockcopy", "--format", "raw", "testvm", "te")
    assert "testvm" in bash(tmp_path, "blockcopy", "--format", "raw", "te")
    assert "testvm" not in bash(tmp_path, "list", "te")


@pytest.mark.parametrize("offered", [bash, fish])
def test_choices(tmp_path: Path, offered: Offered) -> None:
    choices = set(offered(tmp_path, "blockcopy", "--on-error", ""))
    assert choices == {"report", "stop", "ignore", "enospc"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_the_script(tmp_path: Path, shell: str) -> None:
    (tmp_path / "script").write_text(SCRIPTS[shell]())
    assert ask(shell, f"{shell} -n script && echo good", folder=tmp_path) == ["good"]


def test_zsh_loads_it_as_a_completion(tmp_path: Path) -> None:
    (tmp_path / "_qmpmirror").write_text(SCRIPTS["zsh"]())
    script = """
    fpath=($PWD $fpath)
    autoload -Uz compinit && compinit -u -d $PWD/dump
    autoload +X _qmpmirror
    print $_comps[qmpmirror]
    """
    assert ask("zsh", script, folder=tmp_path) == ["_qmpmirror"]


def test_the_man_page_has_all_options() -> None:
    page = SCRIPTS["man"]().replace("\\-", "-")
    for command in commands():
        assert f".SS {command.name}" in page
        for option in command.options:
            assert f"\\fB{option.flags[-1]}\\fR" in page
        assert f"\n{command.example}\n" in page


def test_the_man_page_is_good_troff(tmp_path: Path) -> None:
    (tmp_path / "qmpmirror.1").write_text(SCRIPTS["man"]())
    command = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=100n", "qmpmirror.1"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    shown = " ".join(told.stdout.split())
    assert "--shallow copy the active layer only and share its backing chain" in shown
    assert "\\" not in re.sub(r"\\x", "", shown)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_prints_them(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["completion", name]) == 0
    assert capsys.readouterr().out == SCRIPTS[name]()


def test_the_command_without_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["csh"]):
        with pytest.raises(SystemExit) as ended:
            main(["completion", *words])
        assert ended.value.code == 2
        assert "say for which shell: bash, zsh or fish" in capsys.readouterr().err


def test_facts_are_plain() -> None:
    """So that the build of a wheel needs no dependency."""
    assert json.loads(json.dumps(commands()))
