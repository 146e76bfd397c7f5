# SPDX-License-Identifier: MIT
"""The QEMU processes of this host and their QMP sockets, from their own command lines."""

from __future__ import annotations

import os
import re
from glob import iglob
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROGRAM: Final = re.compile(r"(qemu-system-[\w-]+|qemu-kvm|kvm|qemu-storage-daemon)(\.\w+)?")
_DAEMON: Final = "qemu-storage-daemon"
_ON: Final = frozenset({"on", "yes", "true", "y"})
_PATH: Final = re.compile(
    r"""(?:\b(?:file|filename|path)"?\s*[=:]\s*"?|^unix:)([^,"}:]+)|^([^-,=:{][^,=:{]*)$"""
)
"""What may be a path in a word of a command line."""

_CONNECTED: Final = "03"
_TCP_ESTABLISHED: Final = "01"


@attrs.frozen
class Endpoint:
    """A place where a monitor may listen: a unix socket, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def unix(cls, path: str) -> Endpoint:
        """A unix socket; an abstract one starts with ``@``."""
        return cls(path=path)

    @classmethod
    def tcp(cls, host: str, port: int) -> Endpoint:
        """A TCP port."""
        return cls(host=host, port=port)

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@attrs.frozen
class Process:
    """A running QEMU or qemu-storage-daemon.

    Attributes:
        pid: its process id.
        name: what ``-name`` gave it, or an empty string.
        program: such as ``qemu-system-x86_64``.
        endpoints: its QMP sockets that accept clients, in the order of the command line.
    """

    pid: int
    name: str
    program: str
    endpoints: tuple[Endpoint, ...]

    def describe(self) -> str:
        """Pid, name and sockets, for messages."""
        sockets = ", ".join(map(str, self.endpoints)) or "no QMP socket"
        return f"{self.name or self.program} (pid {self.pid}, {sockets})"


def processes() -> list[Process]:
    """All of them that this user may look at, by pid. Reads ``/proc`` only."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            process = _read(folder)
            if process is not None:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def is_taken(endpoint: Endpoint) -> bool:
    """Whether a client is connected to the endpoint, as the kernel's socket tables say."""
    if endpoint.path:
        return any(
            state == _CONNECTED and _is_bound_to(endpoint.path, bound, inode)
            for state, inode, bound in _unix_sockets()
        )
    return any(
        state == _TCP_ESTABLISHED and port == endpoint.port for state, port in _tcp_sockets()
    )


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in {"Z", "X"}


def working_folder(pid: int | None) -> str | None:
    """The folder in which a process was started, and against which the paths that it was given are.

    With ``-daemonize`` QEMU changes to the root folder after it has opened its images: then the
    command line, the environment and the open files tell. None when it cannot be known.
    """
    process = Path(f"/proc/{pid}")
    try:
        folder = os.readlink(process / "cwd") if pid else None
        return (_start_folder(process) or folder) if folder == "/" else folder
    except OSError:
        return None


def _start_folder(process: Path) -> str | None:
    """The folder in which most of the relative paths of a daemon's command line are."""
    words = (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
    if "daemonize" not in (word.lstrip("-") for word in words):
        return None
    parts = (part for word in words[1:] for groups in _PATH.findall(word) for part in groups)
    found = {path for path in parts if path and not os.path.isabs(path)}
    environment = (process / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    candidates = [word.removeprefix("PWD=") for word in environment if word.startswith("PWD=/")]
    for link in (process / "fd").iterdir():
        target = os.readlink(link)
        ends = (f"/{os.path.normpath(path)}" for path in found)
        candidates += [target.removesuffix(end) for end in ends if target.endswith(end)]
    there = {
        folder: sum(os.path.exists(os.path.join(folder, path)) for path in found)
        for folder in candidates
    }
    best = max(there, key=lambda folder: there[folder], default="")
    return best if there.get(best) else None


def sees_our_files(pid: int | None) -> bool:
    """Whether a path means the same file to a process and to us; False when in doubt."""
    try:
        same_mounts = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        return same_mounts and os.path.samefile(f"/proc/{pid}/root", "/")
    except OSError:
        return False


def parse_command_line(argv: Sequence[str], cwd: Path) -> tuple[str, str, tuple[Endpoint, ...]]:
    """The name, the program and the QMP endpoints of a QEMU command line.

    Args:
        argv: the process's arguments.
        cwd: the process's working folder, against which socket paths are resolved.

    Returns:
        ``("", "", ())`` when the command line is not QEMU's.
    """
    start = _program_index(argv)
    if start is None:
        return "", "", ()
    program = Path(argv[start]).name
    daemon = program.startswith(_DAEMON)
    name = ""
    chardevs: dict[str, Endpoint | None] = {}
    monitors: list[Endpoint | str | None] = []
    for option, value in options(argv[start + 1 :]):
        if option == "name":
            parsed = suboptions(value, implied="guest")
            name = parsed.get("guest", name)
        elif option in {"qmp", "qmp-pretty"}:
            monitors.append(_legacy_chardev(value, cwd))
        elif option == "chardev":
            parsed = suboptions(value, implied="backend")
            chardevs[parsed.get("id", "")] = _chardev(parsed, cwd)
        elif option == ("monitor" if daemon else "mon"):
            monitors.append(_monitor(value, default_mode="control" if daemon else "readline"))
    resolved = (chardevs.get(m) if isinstance(m, str) else m for m in monitors)
    endpoints = tuple(endpoint for endpoint in resolved if endpoint is not None)
    return name, program, endpoints


def _read(folder: Path) -> Process | None:
    try:
        argv = (folder / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
        if _program_index(argv) is None:
            return None
        cwd = working_folder(int(folder.name))
        if cwd is None:
            return None
        name, program, endpoints = parse_command_line(argv, Path(cwd))
    except OSError:  # it has ended meanwhile, or is somebody else's
        return None
    return Process(int(folder.name), name, program, endpoints)


def _program_index(argv: Sequence[str]) -> int | None:
    if not argv:
        return None
    if _PROGRAM.fullmatch(Path(argv[0]).name):
        return 0
    # A binary may be started through a dynamic loader of its own.
    if Path(argv[0]).name.startswith("ld-"):
        for index, word in enumerate(argv[1:8], 1):
            if not word.startswith("-") and _PROGRAM.fullmatch(Path(word).name):
                return index
    return None


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options with their values: QEMU writes both ``-x`` and ``--x``."""
    for index, word in enumerate(words):
        if word.startswith("-"):
            option, equals, inline = word.lstrip("-").partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            yield option, inline if equals else following


def suboptions(value: str, implied: str) -> dict[str, str]:
    """``a,b=c`` as a dictionary; ``,,`` is a comma, and the first word may lack its key."""
    parsed: dict[str, str] = {}
    # No command line has a NUL in it; of three commas the first two are the literal one.
    for index, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, word = part.replace("\0", ",").partition("=")
        if equals:
            parsed[key] = word
        elif index == 0:
            parsed[implied] = key
        else:
            parsed[key.removeprefix("no")] = "off" if key.startswith("no") else "on"
    return parsed


def _monitor(value: str, default_mode: str) -> str | None:
    """The chardev that ``-mon`` makes a QMP monitor of."""
    parsed = suboptions(value, implied="chardev")
    return parsed.get("chardev") if parsed.get("mode", default_mode) == "control" else None


def _legacy_chardev(value: str, cwd: Path) -> Endpoint | str | None:
    """The endpoint that ``-qmp`` describes, or the id of the chardev that it names."""
    scheme, _, rest = value.partition(":")
    if scheme == "chardev":
        return rest
    if scheme == "unix":
        return _chardev({"backend": "socket"} | suboptions(rest, implied="path"), cwd)
    if scheme in {"tcp", "telnet"}:
        parsed = {"backend": "socket"} | suboptions(rest, implied="address")
        parsed["host"], _, parsed["port"] = parsed.pop("address", "").rpartition(":")
        return _chardev(parsed, cwd)
    return None


def _chardev(parsed: dict[str, str], cwd: Path) -> Endpoint | None:
    if parsed.get("backend") != "socket" or parsed.get("server") not in _ON:
        return None
    if "path" in parsed:
        if parsed.get("abstract") in _ON:
            return Endpoint.unix("@" + parsed["path"])
        return Endpoint.unix(_socket_path(parsed["path"], cwd))
    return _tcp_endpoint(parsed.get("host", ""), parsed.get("port", ""))


def _socket_path(path: str, cwd: Path) -> str:
    return str(cwd / path)


def _tcp_endpoint(host: str, port: str) -> Endpoint | None:
    host = host.strip("[]")
    wildcard = host in {"", "0.0.0.0", "::"}  # noqa: S104 - read here, never bound
    return Endpoint.tcp("localhost" if wildcard else host, int(port)) if port.isdecimal() else None


def _is_bound_to(path: str, bound: str, inode: str) -> bool:
    """Whether a socket is at ``path``; the kernel remembers the words that it was bound by."""
    if bound == path:
        return True
    if bound.startswith("@") or os.path.basename(bound) != os.path.basename(path):
        return False
    folder = "/" if os.path.isabs(bound) else _folder_of_socket(inode)
    if folder is None:
        return path.endswith(f"/{os.path.normpath(bound)}")
    return os.path.realpath(os.path.join(folder, bound)) == os.path.realpath(path)


def _folder_of_socket(inode: str) -> str | None:
    """The working folder of the process that holds a socket; None when it cannot be known."""
    for link in iglob("/proc/[0-9]*/fd/*"):
        try:
            found = os.readlink(link) == f"socket:[{inode}]"
        except OSError:  # closed meanwhile
            continue
        if found:
            return working_folder(int(link.split("/")[2]))
    return None


def _unix_sockets() -> Iterator[tuple[str, str, str]]:
    """State, inode and name of every socket that has a name."""
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:  # noqa: PLR2004 - the eighth column is the path
            yield fields[5], fields[6], fields[7]


def _tcp_sockets() -> Iterator[tuple[str, int]]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                yield fields[3], int(fields[1].rpartition(":")[2], 16)
