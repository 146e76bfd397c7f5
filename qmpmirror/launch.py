# SPDX-License-Identifier: MIT
"""What to write on QEMU's next command line, since nobody rewrites it for its user."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpmirror.disks import Disk


def options(disk: Disk, destination: str, new_format: str) -> list[str]:
    """The words that open the copy in the place of the disk's old image.

    A disk of ``-drive`` gets a ``-drive`` with the same id, one of ``-blockdev`` a ``-blockdev``
    with the same node name, so that the rest of the command line can stay as it was.
    """
    if disk.drive or disk.image is None or not disk.image.named_by_user:
        words = [f"file={destination.replace(',', ',,')}", f"format={new_format}"]
        if disk.drive:
            words.append(f"id={disk.drive}")
        return ["-drive", ",".join(words)]
    node = {
        "driver": new_format,
        "node-name": disk.image.name,
        "file": {"driver": "file", "filename": destination},
    }
    return ["-blockdev", json.dumps(node)]
