# SPDX-License-Identifier: MIT
"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qmpmirror import __version__
from qmpmirror.cli.manual import commands

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "qmpmirror"
author = "The qmpmirror developers"
copyright = author  # noqa: A001 - Sphinx's name for it
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "qmpmirror"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "separated"
suppress_warnings = ["myst.header"]
nitpicky = False


class CommandLine(SphinxDirective):
    """``{command-line}``: all commands, from their parsers."""

    option_spec: ClassVar[dict[str, object]] = {}

    def run(self) -> list[nodes.Node]:
        """Make a section of each."""
        made: list[nodes.Node] = []
        for command in commands():
            words = " ".join(word.upper() for word in command.named)
            section = nodes.section(ids=[command.name], names=[command.name])
            section += nodes.title(text=command.name)
            section += nodes.paragraph(text=command.description)
            usage = f"qmpmirror {command.name} {words} [OPTION ...]".replace("  ", " ")
            section += nodes.literal_block(usage, usage, language="text")
            for group in command.groups:
                if group.title != "options":
                    section += nodes.rubric(text=group.title)
                section += self._options(group.options)
            section += nodes.paragraph(text="Example:")
            section += nodes.literal_block(command.example, command.example, language="text")
            made.append(section)
        return made

    def _options(self, options: tuple[object, ...]) -> nodes.Node:
        listed = nodes.definition_list()
        for option in options:
            term = nodes.term()
            term += nodes.literal(text=f"{', '.join(option.flags)} {option.value}".strip())
            meaning = nodes.definition("", nodes.paragraph(text=option.help))
            listed += nodes.definition_list_item("", term, meaning)
        return listed


def setup(app: Sphinx) -> None:
    """Make the directive known."""
    app.add_directive("command-line", CommandLine)
