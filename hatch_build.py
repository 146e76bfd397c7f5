# SPDX-License-Identifier: MIT
"""Puts completion scripts and the man page, made from the parsers, into the wheel."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACES = {
    "bash": "share/bash-completion/completions/qmpmirror",
    "zsh": "share/zsh/site-functions/_qmpmirror",
    "fish": "share/fish/vendor_completions.d/qmpmirror.fish",
    "man": "share/man/man1/qmpmirror.1",
}


class GeneratedFiles(BuildHookInterface[Any]):
    """The build hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling calls it so
        """Write the files where the builder will find them."""
        # The parsers need nothing but the standard library.
        sys.path.insert(0, self.root)
        try:
            from qmpmirror.cli.completion import SCRIPTS  # noqa: PLC0415 - it is there only now
        finally:
            sys.path.remove(self.root)
        self._folder = TemporaryDirectory()
        for name, place in PLACES.items():
            path = Path(self._folder.name) / name
            path.write_text(SCRIPTS[name](), encoding="utf-8")
            build_data["shared_data"][str(path)] = place

    def finalize(
        self,
        version: str,  # noqa: ARG002 - hatchling calls it so
        build_data: dict[str, Any],  # noqa: ARG002 - hatchling calls it so
        artifact_path: str,  # noqa: ARG002 - hatchling calls it so
    ) -> None:
        """Remove them again."""
        self._folder.cleanup()
