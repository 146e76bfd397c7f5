# SPDX-License-Identifier: MIT
"""What a migration is asked to do, how far it is, and how it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from qmpmirror import errors
from qmpmirror.operations.options import valid_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class MigrateKeywords(TypedDict, total=False):
    """The fields of `MigrateOptions`, as keyword arguments."""

    incremental: bool
    disks: Sequence[str]
    synchronous_writes: bool
    tls_creds: str
    bandwidth: int
    disks_uri: str
    migrate_uri: str
    suspend_after: float | None
    safe_start: bool
    report: Callable[[MigrationProgress], object] | None


def _positive(_: object, __: object, value: float | None) -> None:
    if value is not None and value <= 0:
        raise errors.UsageError(f"suspend_after {value:g} s is no time at all")


@attrs.frozen(kw_only=True)
class MigrateOptions:
    """How to migrate.

    Attributes:
        incremental: copy the active image of each disk only (``sync=top``): the destination's image
            stands on a base of its own that holds the same as the source's.
        disks: the disks whose storage is copied; empty for all that the destination does not share.
        synchronous_writes: the guest's writes wait for both sides once the disks mirror; from the
            start where QEMU (before 8.2) cannot switch later.
        tls_creds: a folder with TLS credentials for NBD and the memory: those of the server are
            read by the destination, those of the client by the source.
        bandwidth: limit in bytes/s for each disk and for the memory. 0: none for the disks, and for
            the memory what QEMU's ``max-bandwidth`` says.
        disks_uri: where the destination offers its disks: ``tcp://HOST:PORT`` or ``unix:///PATH``.
        migrate_uri: where it waits for the memory.
        suspend_after: seconds after which the guest is suspended, so that a migration comes to its
            end that the guest is too busy for; it runs again at the destination.
        safe_start: as for a copy.
        report: is told how far the migration is, twice a second.
    """

    incremental: bool = False
    disks: Sequence[str] = ()
    synchronous_writes: bool = False
    tls_creds: str = ""
    bandwidth: int = attrs.field(default=0, validator=valid_bandwidth)
    disks_uri: str = ""
    migrate_uri: str = ""
    suspend_after: float | None = attrs.field(default=None, validator=_positive)
    safe_start: bool = True
    report: Callable[[MigrationProgress], object] | None = None


@attrs.frozen
class MigrationProgress:
    """How far a migration is.

    Attributes:
        phase: ``disks``, ``memory`` or ``done``.
        offset: bytes of work done, disks and memory together.
        length: bytes of work in all; it grows while the guest writes.
        rate: bytes/s in this phase; 0 when not known yet.
        eta: seconds until the end of this phase; None when not known.
        io_status: always ``ok``: an I/O error ends a migration.
        result: how it has ended, with the last report: that one comes even if the migration was
            cancelled too late.
    """

    phase: str
    offset: int
    length: int
    rate: float = 0.0
    eta: float | None = None
    io_status: str = "ok"
    result: MigrationResult | None = None

    @property
    def percent(self) -> float:
        """0 to 100; 100 only in the end."""
        if self.phase == "done":
            return 100.0
        if not self.length:
            return 0.0
        return min(99.99, int(10000 * self.offset / self.length) / 100)

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = attrs.asdict(self, filter=lambda field, _: field.name != "result")
        return plain | {"percent": self.percent, "rate": round(self.rate)}


@attrs.frozen
class MigrationResult:
    """How a migration has ended: well.

    Attributes:
        disks: names of the disks whose storage was copied.
        images: for each of them the image that the guest uses now, at the destination.
        running: whether the guest runs; it does not if it did not at the source.
        downtime: milliseconds for which it stood still, as the source says.
        total_time: milliseconds for which the memory was sent, as the source says.
        memory: bytes of memory that were sent.
        notes: what the user must know, one sentence each.
        left: what could not be cleaned up, one entry each.
    """

    disks: tuple[str, ...]
    images: tuple[str, ...]
    running: bool
    downtime: int
    total_time: int
    memory: int
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
