# SPDX-License-Identifier: MIT
"""What real QEMUs have answered, recorded once, so that the tests of this folder need none."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qmpmirror.schema import Schema

DATA = Path(__file__).with_name("data")
VERSIONS = ("5.2", "7.2", "10.0", "11.1")


@cache
def _load(name: str) -> Any:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Each recorded QEMU version in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def schemas() -> dict[str, Schema]:
    """The schema of every recorded QEMU, by version."""
    return {version: Schema.parse(_load(f"schema-{version}")) for version in VERSIONS}


@pytest.fixture
def schema(version: str, schemas: dict[str, Schema]) -> Schema:
    """The schema of the version in turn."""
    return schemas[version]


@pytest.fixture
def recorded(version: str) -> dict[str, dict[str, Any]]:
    """Replies of one VM of the version in turn, and of a storage daemon, by moment and command.

    The VM's moments are ``idle``, ``mirroring`` (a shallow mirror that is ready, and a full one)
    and ``pivoted`` (after the shallow one; the full one is gone). Its disks:

    * ``vd0``: ``cor`` (copy-on-read) over ``thr`` (throttle) over ``top`` over ``snap`` over
      ``base``, all ``-blockdev``; ``top`` describes its storage inside, the others by name.
    * ``virtio0``: a ``-drive if=virtio`` of two layers.
    * ``drv0``: a ``-drive if=none`` with a ``scsi-hd``, raw.
    * ``ide0-cd0``: an empty CD-ROM drive.
    * ``nv0``: an NVMe disk on ``slice``, a part of a raw file.
    * ``ext``: a ``virtio-blk`` without id, on a qcow2 image with a data file of its own.
    * ``hd0``: a SATA disk on ``sata``.
    * ``loose``: a node that no device uses.
    """
    found: dict[str, dict[str, Any]] = _load(f"graph-{version}")
    return found
