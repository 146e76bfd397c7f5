# SPDX-License-Identifier: MIT
"""How our jobs, nodes and bitmaps are named in QEMU, and read back.

QEMU is the only database: what a later process must know and cannot read from the block graph is
in these names. A run has an id of eight characters.

========  ===========================================  ==================================
what      name                                         limit
========  ===========================================  ==================================
job       ``qmpmirror-VERB-RUN-FLAGS-SOURCE``          none
node      ``qmpmirror-RUN-ROLE``                       31 characters (QEMU)
bitmap    ``qmpmirror-RUN-MARK``                       1023 characters (qcow2)
========  ===========================================  ==================================

FLAGS are letters (`Flag`). SOURCE is the name of the disk's image node, then those of the other
nodes that the job makes superfluous, with ``_.`` between, and after ``_-`` the name of the base of
a commit, pull or move; or the path of a file that is being created. A character that QEMU does not
allow in a job id is written as ``_`` and two hexadecimal digits.
"""

from __future__ import annotations

import enum
import re
import secrets

import attrs

PREFIX = "qmpmirror-"
RUN_LENGTH = 8
GROUP_LENGTH = 6
_ARRIVAL = "incoming"
_SEPARATOR = "_."
_BASE = "_-"
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_RUN = f"[{_ALPHABET}]{{{RUN_LENGTH}}}"
_JOB = re.compile(rf"{PREFIX}(?P<verb>[a-z]+)-(?P<run>{_RUN})-(?P<flags>[a-z]*)-(?P<source>.*)")
_OTHER = re.compile(rf"{PREFIX}(?P<run>{_RUN})-(?P<role>[a-z]+)")


class Flag(enum.Enum):
    """What a job's name remembers about it."""

    SHALLOW = "s"
    FULL = "f"
    LATE_CHAIN = "l"
    OWN_CHAIN = "o"
    OBJECTS = "x"
    KEEP_SOURCE = "h"
    DATA_FILE = "e"
    GROUP = "g"
    CHECK_BASE = "b"
    CREATED = "c"
    DRIVE_MIRROR = "d"
    THEN_PIVOT = "p"
    THEN_FINISH = "k"
    ACTIVE = "a"
    DELETE_FILES = "r"
    BITMAPS = "m"
    TEMPORARY = "t"
    MOVE = "v"
    SYNCHRONOUS = "n"
    EVENTS_WERE_OFF = "z"
    RETURN_PATH_WAS_OFF = "y"
    PAUSE_WAS_OFF = "w"
    BITMAPS_WERE_OFF = "u"


class Mark(enum.Enum):
    """Bitmaps on the target node that tell a later process what was under way.

    ``REPLACED`` is on a node that is not in a chain any more and is about to be closed, ``KEPT`` on
    one that the user wants to be left open.
    """

    PIVOT = "pivot"
    FINISH = "finish"
    ABORT = "abort"
    STOPPED = "stopped"
    REPLACED = "replaced"
    KEPT = "kept"


@attrs.frozen
class JobName:
    """A job id of ours, taken apart.

    Attributes:
        verb: the operation, such as ``copy``.
        run: the run's id.
        flags: what else the name remembers.
        source: name of the node that was the image under the guest device at the start; for
            ``create`` the path of the file.
        replaced: the other nodes that the job makes superfluous, top down: once the first is
            deleted, the graph does not tell any more which they are.
        base: the node that a commit writes to, or a pull stops above; below a disk that is moved,
            the first image that was at its new place already.
    """

    verb: str
    run: str
    flags: frozenset[Flag]
    source: str
    replaced: tuple[str, ...] = ()
    base: str = ""

    def __str__(self) -> str:
        letters = "".join(flag.value for flag in Flag if flag in self.flags)
        nodes = _SEPARATOR.join(map(_encode, (self.source, *self.replaced)))
        base = f"{_BASE}{_encode(self.base)}" if self.base else ""
        return f"{PREFIX}{self.verb}-{self.run}-{letters}-{nodes}{base}"

    @property
    def has_two_phases(self) -> bool:
        """Whether the job follows the guest until it is told to end."""
        return self.verb in {"copy", "migrate"} or Flag.ACTIVE in self.flags

    @property
    def target_node(self) -> str:
        """The node that the job writes to: that of a copy is named after the run."""
        if self.verb == "commit":
            return self.base
        return self.source if self.verb == "pull" else node_name(self.run, "format")


def created_file(run: str, path: str, *, ours: bool) -> JobName:
    """The job that creates a run's file; ``ours`` when the file is not there before."""
    return JobName("create", run, frozenset({Flag.CREATED} if ours else ()), path)


def created_data_file(run: str, path: str) -> JobName:
    """The job that creates a qcow2 image's external data file."""
    return JobName("data", run, frozenset({Flag.CREATED}), path)


def created_header(run: str) -> JobName:
    """The job that writes a run's image header into its file."""
    return JobName("format", run, frozenset(), "")


def new_run() -> str:
    """A fresh run id: eight random characters."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(RUN_LENGTH))


def member_run(group: str, number: int) -> str:
    """The run id of a group's member: the group's id and two more characters."""
    tens, ones = divmod(number, len(_ALPHABET))
    return f"{group}{_ALPHABET[tens]}{_ALPHABET[ones]}"


def new_group() -> str:
    """A fresh group id: six random characters."""
    return new_run()[:GROUP_LENGTH]


def group_of(run: str) -> str:
    """The id of the group that a member's run belongs to."""
    return run[:GROUP_LENGTH]


def node_name(run: str, role: str) -> str:
    """The name of a run's node; ``role`` is ``format``, ``storage``, ``slice`` and the like."""
    return f"{PREFIX}{run}-{role}"


def arrival_role(*, runs: bool, flags: frozenset[Flag]) -> str:
    """The role of the node by which a destination remembers a migration to it.

    Args:
        runs: whether the guest is to run there once it has arrived.
        flags: which of the migration's capabilities were off before.
    """
    known = "".join(flag.value for flag in Flag if flag in flags)
    return f"{_ARRIVAL}{'r' if runs else ''}{known}"


def parse_arrival(role: str) -> tuple[bool, frozenset[Flag]] | None:
    """What `arrival_role` was told; None for any other role."""
    if not role.startswith(_ARRIVAL):
        return None
    letters = role.removeprefix(_ARRIVAL)
    return "r" in letters, frozenset(flag for flag in Flag if flag.value in letters.strip("r"))


def bitmap_name(run: str, mark: Mark) -> str:
    """The name of the bitmap that marks something on a run's target node."""
    return f"{PREFIX}{run}-{mark.value}"


def parse_job(job_id: str) -> JobName | None:
    """Take a job id apart; None when the job is not ours."""
    match = _JOB.fullmatch(job_id)
    if match is None:
        return None
    known = {flag.value: flag for flag in Flag}
    flags = frozenset(known[letter] for letter in match["flags"] if letter in known)
    nodes, _, base = match["source"].partition(_BASE)
    source, *replaced = map(_decode, nodes.split(_SEPARATOR))
    return JobName(match["verb"], match["run"], flags, source, tuple(replaced), _decode(base))


def parse_node(name: str) -> tuple[str, str] | None:
    """The run and the role of a node of ours; None when it is not ours."""
    match = _OTHER.fullmatch(name)
    return (match["run"], match["role"]) if match else None


def parse_bitmap(name: str) -> tuple[str, Mark] | None:
    """The run and the mark of a bitmap of ours; None when it is not ours."""
    match = _OTHER.fullmatch(name)
    if match is None or match["role"] not in {mark.value for mark in Mark}:
        return None
    return match["run"], Mark(match["role"])


def _encode(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", lambda m: "".join(f"_{b:02x}" for b in m[0].encode()), name)


def _decode(text: str) -> str:
    return re.sub(
        r"(?:_[0-9a-f]{2})+",
        lambda m: bytes.fromhex(m[0].replace("_", "")).decode(errors="replace"),
        text,
    )
