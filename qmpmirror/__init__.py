# SPDX-License-Identifier: MIT
"""virsh blockcopy for the QEMU processes that libvirt does not manage.

async with qmpmirror.connect("/run/vm/qmp.sock") as vm:
    copy = await vm.blockcopy("vda", "/backup/copy.qcow2", shallow=True)
    await copy.ready()
    result = await copy.pivot()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpmirror.disks import Disk
    from qmpmirror.errors import (
        AmbiguousDisk,
        AmbiguousDomain,
        CommandFailed,
        CommandTimeout,
        ConnectError,
        ConnectionLost,
        DeadlineExceeded,
        DestinationError,
        DestinationExists,
        DiskBusy,
        DiskError,
        DiskNotFound,
        EmptyDrive,
        EndingAlreadyAsked,
        Error,
        JobError,
        JobFailed,
        JobNotFound,
        MigrationFailed,
        MonitorBusy,
        NoSuchMonitor,
        NotListening,
        NotQMP,
        NotReady,
        Refused,
        Stalled,
        Unsupported,
        UsageError,
    )
    from qmpmirror.graph import Graph, Node
    from qmpmirror.job import JobInfo
    from qmpmirror.life import Ending, Phase
    from qmpmirror.machine import Machine, connect
    from qmpmirror.operations.blockcommit import ActiveCommit, CommitOptions, InnerCommit
    from qmpmirror.operations.blockpull import Pull
    from qmpmirror.operations.conclusion import Result
    from qmpmirror.operations.copy import Copy
    from qmpmirror.operations.findings import Finding, Way
    from qmpmirror.operations.group import CopyGroup, Cut, GroupResult, Member
    from qmpmirror.operations.handle import BlockJob, Progress
    from qmpmirror.operations.image_create import Flattened
    from qmpmirror.operations.migration import MigrateOptions, MigrationProgress, MigrationResult
    from qmpmirror.operations.move import Move
    from qmpmirror.operations.options import Options
    from qmpmirror.operations.plan import Plan
    from qmpmirror.operations.snapshot import Snapshot, SnapshotResult

__version__ = "0.1.0.dev0"

# Loaded when first used: a command line that only prints its help needs none of it.
_HOMES = {
    "ActiveCommit": "operations.blockcommit",
    "BlockJob": "operations.handle",
    "CommitOptions": "operations.blockcommit",
    "Copy": "operations.copy",
    "CopyGroup": "operations.group",
    "Cut": "operations.group",
    "Disk": "disks",
    "Ending": "life",
    "Finding": "operations.findings",
    "Flattened": "operations.image_create",
    "Graph": "graph",
    "GroupResult": "operations.group",
    "InnerCommit": "operations.blockcommit",
    "JobInfo": "job",
    "Machine": "machine",
    "Member": "operations.group",
    "Move": "operations.move",
    "MigrateOptions": "operations.migration",
    "MigrationProgress": "operations.migration",
    "MigrationResult": "operations.migration",
    "Node": "graph",
    "Options": "operations.options",
    "Phase": "life",
    "Plan": "operations.plan",
    "Progress": "operations.handle",
    "Pull": "operations.blockpull",
    "Result": "operations.conclusion",
    "Snapshot": "operations.snapshot",
    "SnapshotResult": "operations.snapshot",
    "Way": "operations.findings",
    "connect": "machine",
}

__all__ = [
    "ActiveCommit",
    "AmbiguousDisk",
    "AmbiguousDomain",
    "BlockJob",
    "CommandFailed",
    "CommandTimeout",
    "CommitOptions",
    "ConnectError",
    "ConnectionLost",
    "Copy",
    "CopyGroup",
    "Cut",
    "DeadlineExceeded",
    "DestinationError",
    "DestinationExists",
    "Disk",
    "DiskBusy",
    "DiskError",
    "DiskNotFound",
    "EmptyDrive",
    "Ending",
    "EndingAlreadyAsked",
    "Error",
    "Finding",
    "Flattened",
    "Graph",
    "GroupResult",
    "InnerCommit",
    "JobError",
    "JobFailed",
    "JobInfo",
    "JobNotFound",
    "Machine",
    "Member",
    "MigrateOptions",
    "MigrationFailed",
    "MigrationProgress",
    "MigrationResult",
    "MonitorBusy",
    "Move",
    "NoSuchMonitor",
    "Node",
    "NotListening",
    "NotQMP",
    "NotReady",
    "Options",
    "Phase",
    "Plan",
    "Progress",
    "Pull",
    "Refused",
    "Result",
    "Snapshot",
    "SnapshotResult",
    "Stalled",
    "Unsupported",
    "UsageError",
    "Way",
    "connect",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - as late as everything else here

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
