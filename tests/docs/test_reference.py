# SPDX-License-Identifier: MIT
"""The reference pages against what the programs really say."""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

import qmpmirror
from qmpmirror.cli.exits import Exit
from qmpmirror.cli.manpage import EXITS
from tests.docs.blocks import Block
from tests.docs.test_docs import ROOT, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.docs.blocks import Sandbox

__all__ = ["sandbox"]

DOCS = ROOT / "docs"


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """For each event the fields that are always there, and those that may be."""
    page = (DOCS / "reference/json.md").read_text()
    found: dict[str, tuple[set[str], set[str]]] = {}
    for name, text in re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        fields = " ".join(re.findall(r"^(?:: |  ).*$", text, re.MULTILINE))
        optional = set(re.findall(r"\[`(\w+)`\]", fields))
        always = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", fields))) - optional
        found[name] = (always, optional)
    return found


COMMANDS = (
    "list",
    "domblklist testvm",
    "domblkinfo testvm --all",
    "domblkstat testvm",
    "doctor testvm",
    "blockcopy testvm vda /export/copy.qcow2 --print-qmp",
    "blockcopy testvm vda /export/copy.qcow2 --shallow --wait",
    "blockjob testvm vda",
    "recover testvm --dry-run",
    "blockjob testvm vda --pivot",
    "blockjob testvm nonsense",
    "blockcommit testvm vda --active --pivot",
    "snapshot-create-as testvm one --disk-only --diskspec vdb,file=/export/overlay.qcow2",
    "blockpull testvm vdb --wait",
    "blockcopy testvm --all-disks --dest-dir /b --finish",
)


def said(sandbox: Sandbox) -> Iterator[dict[str, Any]]:
    for command in COMMANDS:
        shell = sandbox._shell(f"qmpmirror {command} --json || true", 0)
        yield from map(json.loads, shell.splitlines())


def test_all_fields_of_all_events_are_documented(sandbox: Sandbox) -> None:
    sandbox.run(Block("scene", "", "two disks", 0))
    pages = documented()
    missing, seen = [], set()
    refused = []
    for event in said(sandbox):
        name = event.pop("event")
        always, optional = pages[name]
        seen.add(name)
        if event.get("outcome") == "error":
            refused.append(event["message"])
        missing += [f"{name}.{field}" for field in set(event) - always - optional]
        if name not in {"started", "mirroring", "disk"}:  # they have several forms
            missing += [f"no {name}.{field}" for field in always - set(event)]
    assert len(refused) == 1, refused
    (message,) = refused
    assert "nonsense" in message
    assert sorted(set(missing)) == []
    assert seen == set(pages) - {"quiesced"}  # which needs a guest


def test_every_public_name_is_documented() -> None:
    page = (DOCS / "reference/api.md").read_text()
    for name in qmpmirror.__all__:
        value = getattr(qmpmirror, name)
        if not (isinstance(value, type) and issubclass(value, qmpmirror.Error)):
            assert f":: qmpmirror.{name}\n" in page


def test_every_exit_code_is_documented() -> None:
    for page in (DOCS / "reference/exit-codes.md", ROOT / "README.md"):
        told = re.findall(r"^\| (\d) \|", page.read_text(), re.MULTILINE)
        assert [*map(int, told)] == [*Exit]
    assert [int(code) for code, _ in EXITS] == [*Exit]
    for code, meaning in EXITS:
        assert f"| {code} | {meaning} |" in (ROOT / "README.md").read_text()


def sentences() -> str:
    """All texts in the source; what is filled in is written as three dots."""
    found = []
    for path in (ROOT / "qmpmirror").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = node.values
                text = (p.value if isinstance(p, ast.Constant) else "..." for p in parts)
                found.append("".join(map(str, text)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def messages() -> list[str]:
    page = (DOCS / "howto/troubleshooting.md").read_text()
    terms = re.findall(r"^(`[^\n]*)\n: ", page, re.MULTILINE)
    return [message for term in terms for message in re.findall(r"`([^`]+)`", term)]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_program(message: str) -> None:
    source = sentences()
    for part in re.split(r"\.\.\.|'\w+'|No space left on device", message):
        words = part.strip(" ():,;'")
        assert words in source, words


def test_there_are_messages() -> None:
    assert len(messages()) > 15
