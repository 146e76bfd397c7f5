# SPDX-License-Identifier: MIT
"""The options of a copy, checked when they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypedDict

import attrs

from qmpmirror import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BLOCKDEV_MIRROR: Final = "blockdev-mirror"
DRIVE_MIRROR: Final = "drive-mirror"
POLICIES: Final = ("report", "stop", "ignore", "enospc")

_MAX_INT64: Final = 2**63 - 1
_GRANULARITY: Final = range(512, 64 * 1024 * 1024 + 1)


def valid_bandwidth(_: object, __: object, value: int) -> None:
    """Refuse what no QEMU could take; an attrs validator."""
    if not 0 <= value <= _MAX_INT64:
        raise errors.UsageError(
            f"bandwidth {value} bytes/s is out of range: give 0 (no limit) to {_MAX_INT64}"
        )


def _valid_buf_size(_: object, __: object, value: int) -> None:
    if not 0 <= value <= _MAX_INT64:
        raise errors.UsageError(
            f"buf-size {value} bytes is out of range: give 0 (QEMU's choice) to {_MAX_INT64}"
        )


def _valid_granularity(_: object, __: object, value: int) -> None:
    if value and (value not in _GRANULARITY or value & (value - 1)):
        raise errors.UsageError(
            f"granularity {value} bytes is not a power of two from 512 to 64 MiB"
        )


def _one_of(*allowed: str) -> Callable[[Any, attrs.Attribute[str], str], None]:
    def check(_: object, attribute: attrs.Attribute[str], value: str) -> None:
        if value not in allowed:
            name = attribute.name.replace("_", "-")
            raise errors.UsageError(
                f"{name} {value!r} is none of {', '.join(filter(None, allowed))}"
            )

    return check


class Keywords(TypedDict, total=False):
    """The fields of `Options`, as keyword arguments."""

    shallow: bool
    format: str
    bandwidth: int
    granularity: int
    buf_size: int
    synchronous_writes: bool
    via: str
    on_error: str
    safe_start: bool
    reuse_external: bool
    overwrite: bool
    blockdev: bool
    creation: Mapping[str, Any]
    secret: str
    tls_creds: str
    server_seconds: float
    detect_zeroes: str
    dest_is_zero: bool
    keep_source: bool
    check_base: bool
    then: str
    temporary: bool


@attrs.frozen(kw_only=True)
class Options:
    """How to copy.

    Attributes:
        shallow: copy the active layer only and share its backing chain (``sync=top``).
        format: of the copy; empty for the source's.
        bandwidth: limit in bytes/s, 0 for none.
        granularity: of the dirty bitmap, in bytes: a power of two from 512 to 64 MiB; 0 for QEMU's
            choice.
        buf_size: bytes in flight, 0 for QEMU's choice.
        synchronous_writes: a guest's write waits for both images (``copy-mode=write-blocking``).
        via: ``blockdev-mirror`` or ``drive-mirror``.
        on_error: what an I/O error does: ``report`` (end the job), ``stop``, ``ignore`` or
            ``enospc`` (stop only when space runs out).
        reuse_external: the destination was prepared by the user: open it, do not format it.
        overwrite: format a destination that holds something.
        blockdev: the destination must be a block device.
        creation: more options of ``blockdev-create`` for the new image, such as ``cluster-size``.
        secret: a file with a passphrase; a new image is encrypted with LUKS.
        tls_creds: a folder with TLS credentials, for NBD.
        server_seconds: how long to wait for a server that is not up yet.
        detect_zeroes: ``off``, ``on`` or ``unmap``; empty for the source's.
        dest_is_zero: the destination is known to read as zeroes (QEMU 10.1).
        keep_source: leave the old image open after a pivot.
        check_base: compare the content of a prepared destination's base with the source's.
        then: how the copy is going to be ended in the mirroring phase: ``pivot``, ``finish``, or
            empty when that is open. Nothing acts on it but `recover`, should this process die.
        temporary: the copy serves only this process: `recover` always removes it.
        safe_start: stop the vCPUs while the mirror starts, on QEMUs that would miss writes then.
    """

    shallow: bool = False
    format: str = ""
    bandwidth: int = attrs.field(default=0, validator=valid_bandwidth)
    granularity: int = attrs.field(default=0, validator=_valid_granularity)
    buf_size: int = attrs.field(default=0, validator=_valid_buf_size)
    synchronous_writes: bool = False
    via: str = attrs.field(
        default=BLOCKDEV_MIRROR, validator=_one_of(BLOCKDEV_MIRROR, DRIVE_MIRROR)
    )
    on_error: str = attrs.field(default="report", validator=_one_of(*POLICIES))
    reuse_external: bool = False
    overwrite: bool = False
    blockdev: bool = False
    creation: Mapping[str, Any] = attrs.field(factory=dict)
    secret: str = ""
    tls_creds: str = ""
    server_seconds: float = 0.0
    detect_zeroes: str = attrs.field(default="", validator=_one_of("", "off", "on", "unmap"))
    dest_is_zero: bool = False
    keep_source: bool = False
    check_base: bool = False
    then: str = attrs.field(default="", validator=_one_of("", "pivot", "finish"))
    temporary: bool = False
    safe_start: bool = True
