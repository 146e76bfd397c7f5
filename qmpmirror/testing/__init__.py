# SPDX-License-Identifier: MIT
"""Real QEMUs, disk images and a scriptable QMP server for tests.

`qmpmirror.testing.plugin` offers them as pytest fixtures.
"""

from __future__ import annotations

from qmpmirror.testing.fake import FakeMonitor
from qmpmirror.testing.fake_mirror import FakeMirror
from qmpmirror.testing.graph import (
    GraphSnapshot,
    assert_clean_graph,
    assert_no_new_files,
    files_in,
)
from qmpmirror.testing.images import ImageError, ImageTools
from qmpmirror.testing.launcher import NbdServer, Qemu, StorageDaemon, version_of
from qmpmirror.testing.oneshot import CommandError
from qmpmirror.testing.process import LaunchError
from qmpmirror.testing.replay import replay
from qmpmirror.testing.script import FakeError, event, load_schema

__all__ = [
    "CommandError",
    "FakeError",
    "FakeMirror",
    "FakeMonitor",
    "GraphSnapshot",
    "ImageError",
    "ImageTools",
    "LaunchError",
    "NbdServer",
    "Qemu",
    "StorageDaemon",
    "assert_clean_graph",
    "assert_no_new_files",
    "event",
    "files_in",
    "load_schema",
    "replay",
    "version_of",
]
