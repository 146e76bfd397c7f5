# SPDX-License-Identifier: MIT
"""Command lines as people write them, and sockets as the kernel lists them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from qmpmirror.discover import Endpoint, Process, parse_command_line

X86 = "qemu-system-x86_64"
CWD = Path("/srv/vm")
UNIX = Endpoint.unix
TCP = Endpoint.tcp


def parse(line: str) -> tuple[str, str, tuple[Endpoint, ...]]:
    return parse_command_line(shlex.split(line), CWD)


ENDPOINTS: list[tuple[str, list[Endpoint]]] = [
    # -qmp
    ("-qmp unix:/run/vm.sock,server,nowait", [UNIX("/run/vm.sock")]),
    ("-qmp unix:/run/vm.sock,server=on,wait=off", [UNIX("/run/vm.sock")]),
    ("-qmp unix:/run/vm.sock,wait=off,server=on", [UNIX("/run/vm.sock")]),
    ("-qmp unix:/run/vm.sock,server=yes,wait=no", [UNIX("/run/vm.sock")]),
    ("-qmp-pretty unix:/run/vm.sock,server=on,wait=off", [UNIX("/run/vm.sock")]),
    ("--qmp unix:/run/vm.sock,server,nowait", [UNIX("/run/vm.sock")]),
    ("--qmp=unix:/run/vm.sock,server,nowait", [UNIX("/run/vm.sock")]),
    ("-qmp unix:run/qmp.sock,server,nowait", [UNIX("/srv/vm/run/qmp.sock")]),
    ("-qmp unix:./qmp.sock,server,nowait", [UNIX("/srv/vm/qmp.sock")]),
    ("-qmp unix:path=/run/vm.sock,server=on", [UNIX("/run/vm.sock")]),
    ("-qmp unix:/run/a,,b.sock,server=on", [UNIX("/run/a,b.sock")]),
    ("-qmp 'unix:/run/two words.sock,server=on'", [UNIX("/run/two words.sock")]),
    ("-qmp unix:vm,abstract=on,server=on", [UNIX("@vm")]),
    ("-qmp tcp::4444,server", [TCP("localhost", 4444)]),
    ("-qmp tcp::4444,server,nowait,ipv4", [TCP("localhost", 4444)]),
    ("-qmp tcp:0:4444,server=on", [TCP("0", 4444)]),
    ("-qmp tcp:0.0.0.0:4444,server=on,wait=off", [TCP("localhost", 4444)]),
    ("-qmp tcp:localhost:4444,server,nowait", [TCP("localhost", 4444)]),
    ("-qmp tcp:192.0.2.7:4444,server,nowait", [TCP("192.0.2.7", 4444)]),
    ("-qmp tcp:[::1]:4444,server,nowait", [TCP("::1", 4444)]),
    ("-qmp tcp:[::]:4444,server,nowait", [TCP("localhost", 4444)]),
    ("-qmp telnet:localhost:4444,server,nowait", [TCP("localhost", 4444)]),
    ("-qmp stdio", []),
    ("-qmp none", []),
    ("-qmp pty", []),
    # -chardev with -mon
    (
        "-chardev socket,id=mon0,path=/run/vm.sock,server=on,wait=off -mon mon0,mode=control",
        [UNIX("/run/vm.sock")],
    ),
    (
        "-mon chardev=mon0,mode=control,pretty=on -chardev socket,id=mon0,path=vm.sock,server",
        [UNIX("/srv/vm/vm.sock")],
    ),
    (
        "-chardev socket,server,nowait,path=/run/vm.sock,id=c -mon mode=control,chardev=c",
        [UNIX("/run/vm.sock")],
    ),
    (
        "-chardev socket,id=c,host=127.0.0.1,port=4444,server=on -mon c,mode=control",
        [TCP("127.0.0.1", 4444)],
    ),
    (
        "-chardev socket,id=c,port=4444,host=::,server=on,ipv6=on -mon c,mode=control",
        [TCP("localhost", 4444)],
    ),
    (
        "-chardev socket,id=c,path=vm,abstract=on,server=on -mon c,mode=control",
        [UNIX("@vm")],
    ),
    ("-chardev socket,id=c,path=/run/vm.sock,server=on -qmp chardev:c", [UNIX("/run/vm.sock")]),
    # these speak no QMP
    ("-chardev socket,id=c,path=/run/vm.sock,server=on -mon c", []),
    ("-chardev socket,id=c,path=/run/vm.sock,server=on -mon chardev=c,mode=readline", []),
    ("-chardev socket,id=c,path=/run/vm.sock,server=on -serial chardev:c", []),
    ("-chardev socket,id=c,path=/run/vm.sock,server=on -monitor chardev:c", []),
    ("-monitor stdio", []),
    ("-monitor unix:/run/hmp.sock,server,nowait", []),
    ("-monitor telnet::4445,server,nowait -qmp tcp::4444,server", [TCP("localhost", 4444)]),
    # these take no clients
    ("-qmp unix:/run/vm.sock", []),
    ("-qmp unix:/run/vm.sock,server=off", []),
    ("-qmp tcp:localhost:4444", []),
    ("-chardev socket,id=c,path=/run/vm.sock,reconnect=1 -mon c,mode=control", []),
    ("-chardev socket,id=c,path=/run/vm.sock,server=off -mon c,mode=control", []),
    ("-chardev stdio,id=c -mon c,mode=control", []),
    # nobody can say where these listen
    ("-chardev socket,id=c,fd=27,server=on,wait=off -mon c,mode=control", []),
    ("-chardev socket,id=c,host=localhost,port=qmp,server=on -mon c,mode=control", []),
    ("-mon chardev=absent,mode=control", []),
    ("-mon mode=control", []),
    ("-qmp", []),
    # several, in order
    (
        "-mon a,mode=control -chardev socket,id=a,path=a,server -qmp unix:b,server",
        [UNIX("/srv/vm/a"), UNIX("/srv/vm/b")],
    ),
]


@pytest.mark.parametrize(("options", "endpoints"), ENDPOINTS)
def test_where_a_qemu_listens(options: str, endpoints: list[Endpoint]) -> None:
    line = f"/usr/bin/{X86} -machine q35 {options} -drive file=a.qcow2,if=virtio -nographic"
    assert parse(line) == ("", X86, tuple(endpoints))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("", ""),
        ("-name web", "web"),
        ("-name guest=web,debug-threads=on", "web"),
        ("-name debug-threads=on,guest=web", "web"),
        ("-name web,process=qemu-web", "web"),
        ("-name web,debug-threads=on", "web"),
        ("--name web", "web"),
        ("-name a,,b", "a,b"),
        ("-name guest=a,,b,debug-threads=on", "a,b"),
        ("-name guest=a,,,debug-threads=on", "a,"),
        ("-name guest=a,,,,b", "a,,b"),
        ("-name 'two words'", "two words"),
        ("-name guest=k=v", "k=v"),
        ("-name debug-threads=on", ""),
        ("-name first -name debug-threads=on", "first"),
        ("-name", ""),
    ],
)
def test_what_a_qemu_is_called(options: str, name: str) -> None:
    assert parse(f"{X86} {options}")[0] == name


@pytest.mark.parametrize(
    ("options", "endpoints"),
    [
        (
            "--chardev socket,path=/run/qsd.sock,server=on,wait=off,id=c --monitor chardev=c",
            [UNIX("/run/qsd.sock")],
        ),
        (
            "--monitor=chardev=c --chardev=socket,path=qsd.sock,server=on,wait=off,id=c",
            [UNIX("/srv/vm/qsd.sock")],
        ),
        (
            "--chardev socket,path=/run/qsd.sock,server=on,id=c --monitor c",
            [UNIX("/run/qsd.sock")],
        ),
        (
            "--chardev socket,path=/run/qsd.sock,server=on,id=c --monitor c,mode=control",
            [UNIX("/run/qsd.sock")],
        ),
        ("--chardev socket,path=/run/qsd.sock,server=on,id=c --monitor c,mode=readline", []),
        ("--chardev socket,path=/run/qsd.sock,server=on,id=c", []),
        ("--chardev stdio,id=c --monitor c", []),
    ],
)
def test_where_a_storage_daemon_listens(options: str, endpoints: list[Endpoint]) -> None:
    line = f"qemu-storage-daemon --blockdev file,node-name=a,filename=a {options}"
    assert parse(line) == ("", "qemu-storage-daemon", tuple(endpoints))


QMP = "-qmp unix:/run/vm.sock,server=on"


@pytest.mark.parametrize(
    ("line", "program"),
    [
        (f"{X86} {QMP}", X86),
        (f"/usr/bin/{X86} {QMP}", X86),
        (f"qemu-system-aarch64 {QMP}", "qemu-system-aarch64"),
        (f"qemu-system-x86_64-microvm {QMP}", "qemu-system-x86_64-microvm"),
        (f"/usr/libexec/qemu-kvm {QMP}", "qemu-kvm"),
        (f"/usr/bin/kvm {QMP}", "kvm"),
        (f"/lib64/ld-linux-x86-64.so.2 /opt/{X86} {QMP}", X86),
        (f"/opt/ld-linux.so.2 --library-path /opt/lib /opt/bin/{X86} {QMP}", X86),
        (f"ld-linux.so.2 --argv0 {X86} /opt/bin/{X86} {QMP}", X86),
    ],
)
def test_a_qemu_is_known_by_its_program(line: str, program: str) -> None:
    assert parse(line) == ("", program, (UNIX("/run/vm.sock"),))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "''",
        f"sh -c '{X86} {QMP}'",
        f"sh -c {X86} {QMP}",
        f"timeout 5 {X86} {QMP}",
        f"sudo {X86} {QMP}",
        f"/usr/bin/strace -f {X86} {QMP}",
        f"gdb --args {X86} {QMP}",
        f"vim {X86}",
        f"grep {X86}",
        f"ld-linux.so.2 /bin/echo {QMP}",
        f"my-{X86} {QMP}",
        f"qemu-img {QMP}",
        f"qemu-nbd {QMP}",
        f"qemu-x86_64 {QMP}",
        f"qemu-system- {QMP}",
        f"{X86}/ls {QMP}",
    ],
)
def test_other_processes_are_no_qemu(line: str) -> None:
    assert parse(line) == ("", "", ())


def test_a_folder_with_odd_bytes() -> None:
    cwd = Path(os.fsdecode(b"/srv/\xff"))
    _, _, endpoints = parse_command_line([X86, "-qmp", "unix:q,server=on"], cwd)
    assert endpoints == (UNIX(os.fsdecode(b"/srv/\xff/q")),)


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (UNIX("/run/vm.sock"), "/run/vm.sock"),
        (UNIX("@vm"), "@vm"),
        (TCP("localhost", 4444), "localhost:4444"),
        (TCP("::1", 4444), "[::1]:4444"),
    ],
)
def test_an_endpoint_in_messages(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("name", "endpoints", "text"),
    [
        ("web", (), "web (pid 7, no QMP socket)"),
        ("", (UNIX("/a"),), f"{X86} (pid 7, /a)"),
        ("web", (UNIX("/a"), TCP("::1", 1)), "web (pid 7, /a, [::1]:1)"),
    ],
)
def test_a_process_in_messages(name: str, endpoints: tuple[Endpoint, ...], text: str) -> None:
    assert Process(7, name, X86, endpoints).describe() == text
