# SPDX-License-Identifier: MIT
"""``list``, ``domblklist --chain``, ``domblkinfo`` and ``domblkstat`` as programs."""

from __future__ import annotations

import json
import os
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.qemu.program import PINNED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Cli, Layers

SIZE = r"\d+(?:\.\d)? (?:B|[KM]iB)"


def new_name() -> str:
    return f"lists-{os.urandom(6).hex()}"


def cells(stdout: str) -> list[list[str]]:
    """The rows of a table of virsh's, whose layout is checked: header, rule, rows, empty line."""
    header, rule, *rows, blank, end = stdout.split("\n")
    assert (blank, end) == ("", "")
    assert re.fullmatch("-+", rule)
    starts = [match.start() for match in re.finditer(r"(?<=\s)\S", header)]
    assert starts[0] == 1
    found = []
    for row in (header, *rows):
        assert row == row.rstrip()
        assert len(row) <= len(rule)
        assert all(row[start - 1] == " " for start in starts)
        limits = zip(starts, [*starts[1:], len(rule)], strict=True)
        found.append([row[start:end].strip() for start, end in limits])
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    assert len(rule) == sum(width + 3 for width in widths)
    return found


@pytest.fixture
def vm(boot: Boot, layers: Layers) -> Qemu:
    """``vda`` on ``snap2`` and ``vdb`` on ``other``, both on ``snap1``; an empty CD-ROM ``hda``."""
    other = layers.images.create(layers.folder / "other.qcow2", backing=layers.snap1)
    return boot(
        *("-drive", f"if=virtio,format=qcow2,file={layers.snap2}"),
        *("-blockdev", f"qcow2,node-name=fmt1,file.driver=file,file.filename={other}"),
        *("-device", "virtio-blk-pci,drive=fmt1,id=dev1"),
        *("-device", "ide-cd,id=cd0"),
        name=new_name(),
    )


@pytest.fixture
def copy(layers: Layers) -> Path:
    return layers.folder / "copy.qcow2"


def test_list_tells_name_state_and_which_monitors_are_free(boot: Boot, cli: Cli) -> None:
    running = boot(name=new_name(), qmp_sockets=3)
    stopped = boot("-S", name=new_name())
    nameless = boot(name=None)
    paused = boot(name=new_name())
    paused.execute("stop")
    machines = {vm.pid: vm for vm in (running, stopped, nameless, paused)}
    states = dict(zip(machines, ("running", "prelaunch", "running", "paused"), strict=True))
    with socket.socket(socket.AF_UNIX) as holder, socket.socket(socket.AF_UNIX) as other:
        holder.connect(str(running.sockets[1]))
        other.connect(str(paused.qmp))
        plain, as_json = cli("list"), cli("list", "--json")
    assert (plain.returncode, plain.stderr) == (as_json.returncode, as_json.stderr) == (0, "")
    header, *rows = cells(plain.stdout)
    assert header == ["Pid", "Name", "State", "Socket", "Monitor"]
    ours = [row for row in rows if int(row[0]) in machines]
    taken = {str(running.sockets[1]), str(paused.qmp)}
    expected = [
        [
            str(pid),
            vm.name or "-",
            states[pid],
            str(path),
            "taken" if str(path) in taken else "free",
        ]
        for pid, vm in sorted(machines.items())
        for path in (*vm.sockets, vm.directory / f"{vm.label}.harness")
    ]
    assert ours == expected
    *events, result = map(json.loads, as_json.stdout.splitlines())
    assert result == {"event": "result", "outcome": "done", "exit": 0}
    assert [event for event in events if event["pid"] in machines] == [
        {
            "event": "qemu",
            "pid": int(pid),
            "name": "" if name == "-" else name,
            "state": state,
            "socket": path,
            "free": monitor == "free",
        }
        for pid, name, state, path, monitor in expected
    ]


def test_details_show_the_empty_drive_too(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblklist", vm.name, "--details")
    assert (ran.returncode, ran.stderr) == (0, "")
    header, *rows = cells(ran.stdout)
    assert header == ["Type", "Device", "Target", "Source"]
    assert sorted(rows) == [
        ["file", "cdrom", "hda", "-"],
        ["file", "disk", "vda", str(layers.snap2)],
        ["file", "disk", "vdb", str(layers.folder / "other.qcow2")],
    ]


def tree(stdout: str, folder: Path) -> str:
    """A drawn chain with file names alone, and without the sizes."""
    bare = stdout.replace(f"{folder}/", "")
    return re.sub(rf" \[(\w+), {SIZE}, {SIZE} allocated\]", r" (\1)", bare)


def test_chain_of_two_disks_that_share_a_base(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblklist", vm.name, "--chain")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert tree(ran.stdout, layers.folder).splitlines()[0] == "base.qcow2 (qcow2)"
    # Each -drive and -blockdev has opened the shared images for itself.
    assert tree(ran.stdout, layers.folder) == (
        "base.qcow2 (qcow2)\n"
        "└─ snap1.qcow2 (qcow2)\n"
        "   └─ snap2.qcow2 (qcow2)  <- vda (guest)\n"
        "base.qcow2 (qcow2)\n"
        "└─ snap1.qcow2 (qcow2)\n"
        "   └─ other.qcow2 (qcow2)  <- vdb (guest)\n\n"
    )


def test_chain_of_two_disks_that_share_the_nodes_of_a_base(
    boot: Boot, layers: Layers, cli: Cli
) -> None:
    other = layers.images.create(layers.folder / "other.qcow2", backing=layers.base)
    file = "qcow2,file.driver=file,file.filename="
    vm = boot(
        *("-blockdev", f"{file}{layers.base},node-name=base,read-only=on"),
        *("-blockdev", f"{file}{layers.snap1},node-name=one,backing=base"),
        *("-blockdev", f"{file}{other},node-name=two,backing=base"),
        *("-device", "virtio-blk-pci,drive=one", "-device", "virtio-blk-pci,drive=two"),
        name=new_name(),
    )
    ran = cli("domblklist", vm.name, "--chain")
    assert tree(ran.stdout, layers.folder) == (
        "base.qcow2 (qcow2)\n"
        "├─ snap1.qcow2 (qcow2)  <- vda (guest)\n"
        "└─ other.qcow2 (qcow2)  <- vdb (guest)\n\n"
    )


@pytest.mark.parametrize("pinned", [PINNED, ("--wait",)], ids=["copying", "mirroring"])
def test_running_copy_is_drawn_beside_its_source(
    vm: Qemu, layers: Layers, cli: Cli, copy: Path, pinned: tuple[str, ...]
) -> None:
    assert cli("blockcopy", vm.name, "vda", copy, "--shallow", *pinned).returncode == 0
    beside = (
        "base.qcow2 (qcow2)\n"
        "└─ snap1.qcow2 (qcow2)\n"
        "   ├─ snap2.qcow2 (qcow2)  <- vda (guest)\n"
        "   └─ copy.qcow2 (qcow2)  <- copy under way\n"
    )
    assert beside in tree(cli("domblklist", vm.name, "--chain").stdout, layers.folder)
    if pinned == PINNED:
        return
    assert cli("blockjob", vm.name, "vda", "--pivot").returncode == 0
    after = "   └─ copy.qcow2 (qcow2)  <- vda (guest)\n"
    shown = tree(cli("domblklist", vm.name, "--chain", "--details").stdout, layers.folder)
    assert after in shown
    assert "snap2" not in shown
    assert "copy under way" not in shown


def test_running_full_copy_is_a_tree_of_its_own(
    vm: Qemu, layers: Layers, cli: Cli, copy: Path
) -> None:
    assert cli("blockcopy", vm.name, "vdb", copy, "--raw", *PINNED).returncode == 0
    shown = tree(cli("domblklist", vm.name, "--chain").stdout, layers.folder)
    assert "\ncopy.qcow2 (raw)  <- copy under way\n" in shown
    assert "   └─ other.qcow2 (qcow2)  <- vdb (guest)\n" in shown


def test_node_that_no_device_uses_is_not_the_guests(boot: Boot, layers: Layers, cli: Cli) -> None:
    node = f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.base}"
    vm = boot("-blockdev", node, name=new_name())
    shown = tree(cli("domblklist", vm.name, "--chain").stdout, layers.folder)
    assert shown == "base.qcow2 (qcow2)  <- fmt0\n\n"


def test_foreign_commit_is_not_drawn_as_a_copy(boot: Boot, layers: Layers, cli: Cli) -> None:
    vm = boot("-drive", f"if=virtio,format=qcow2,file={layers.snap2}", name=new_name())
    vm.execute("block-commit", job_id="theirs", device="virtio0", speed=1)
    shown = tree(cli("domblklist", vm.name, "--chain").stdout, layers.folder)
    assert "base.qcow2 (qcow2)  <- commit under way\n" in shown
    assert "   └─ snap2.qcow2 (qcow2)  <- vda (guest)\n" in shown


def test_sizes_in_the_drawing_and_chains_in_json(vm: Qemu, layers: Layers, cli: Cli) -> None:
    lines = cli("domblklist", vm.name, "--chain").stdout.splitlines()
    (line,) = [line for line in lines if "snap2" in line]
    allocated = layers.images.info(layers.snap2)["actual-size"] / 1024
    assert f"[qcow2, 8.0 MiB, {allocated:.1f} KiB allocated]" in line
    *disks, result = map(json.loads, cli("domblklist", vm.name, "--json").stdout.splitlines())
    assert result == {"event": "result", "outcome": "done", "exit": 0}
    chains = {disk["target"]: disk["chain"] for disk in disks}
    shared = [str(layers.snap1), str(layers.base)]
    assert chains == {
        "vda": [str(layers.snap2), *shared],
        "vdb": [str(layers.folder / "other.qcow2"), *shared],
        "hda": [],
    }


def sizes(stdout: str) -> dict[str, int]:
    """virsh's lines of ``domblkinfo``, whose layout is checked."""
    layout = r"Capacity:       (\d+)\nAllocation:     (\d+)\nPhysical:       (\d+)\n\n"
    found = re.fullmatch(layout, stdout)
    assert found is not None, stdout
    return dict(zip(("capacity", "allocation", "physical"), map(int, found.groups()), strict=True))


def test_sizes_of_a_disk(vm: Qemu, layers: Layers, cli: Cli) -> None:
    ran = cli("domblkinfo", vm.name, "vda")
    assert (ran.returncode, ran.stderr) == (0, "")
    before = sizes(ran.stdout)
    assert before["capacity"] == 8 << 20
    assert before["physical"] == layers.images.info(layers.snap2)["actual-size"]
    vm.io("virtio0", "write -P 1 6M 1M")
    after = sizes(cli("domblkinfo", vm.name, "vda").stdout)
    assert after["capacity"] == 8 << 20
    assert after["physical"] == layers.images.info(layers.snap2)["actual-size"]
    assert after["physical"] >= before["physical"] + (1 << 20)
    assert after["allocation"] >= before["allocation"] + (1 << 20)
    disk, result = map(json.loads, cli("domblkinfo", vm.name, "vda", "--json").stdout.splitlines())
    assert disk == {"event": "disk", "name": "vda", **after}
    assert result == {"event": "result", "outcome": "done", "exit": 0}
    human = cli("domblkinfo", vm.name, "vda", "--human").stdout
    layout = rf"Capacity:       8\.0 MiB\nAllocation:     {SIZE}\nPhysical:       {SIZE}\n\n"
    assert re.fullmatch(layout, human)


@pytest.mark.parametrize("human", [False, True])
def test_sizes_of_all_disks(vm: Qemu, cli: Cli, *, human: bool) -> None:
    ran = cli("domblkinfo", vm.name, "--all", *(["--human"] if human else []))
    assert (ran.returncode, ran.stderr) == (0, "")
    header, *rows = cells(ran.stdout)
    assert header == ["Target", "Capacity", "Allocation", "Physical"]
    by_target = {target: numbers for target, *numbers in rows}
    assert by_target.keys() == {"vda", "vdb", "hda"}
    assert by_target["hda"] == ["-", "-", "-"]
    number = SIZE if human else r"\d+"
    for target in ("vda", "vdb"):
        assert by_target[target][0] == ("8.0 MiB" if human else str(8 << 20))
        assert all(re.fullmatch(number, cell) for cell in by_target[target])


def test_an_empty_drive_has_no_sizes(vm: Qemu, cli: Cli) -> None:
    lines = cli("domblkinfo", vm.name, "--all", "--json").stdout.splitlines()
    found = {line.pop("name"): line for line in map(json.loads, lines[:-1])}
    sizes = {"capacity": None, "allocation": None, "physical": None}
    assert found["hda"] == {"event": "disk", **sizes}
    assert found["vda"]["capacity"] == 8 << 20


@pytest.mark.parametrize("words", [(), ("vda", "--all")])
def test_one_disk_or_all(vm: Qemu, cli: Cli, words: tuple[str, ...]) -> None:
    ran = cli("domblkinfo", vm.name, *words)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: give either a disk or --all")


NUMBERS = (
    *("rd_req", "rd_bytes", "wr_req", "wr_bytes", "errs", "flush_operations"),
    *("rd_total_times", "wr_total_times", "flush_total_times"),
)


def traffic(stdout: str, name: str) -> dict[str, int]:
    """virsh's lines of ``domblkstat``, whose layout is checked."""
    *lines, blank, end = stdout.split("\n")
    assert (blank, end) == ("", "")
    words = [line.split(" ") for line in lines]
    assert [word[:2] for word in words] == [[name, number] for number in NUMBERS]
    return {number: int(value) for _, number, value in words}


def test_traffic_grows_with_what_the_guest_does(vm: Qemu, cli: Cli) -> None:
    def ask(*words: str) -> dict[str, int]:
        ran = cli("domblkstat", vm.name, *words)
        assert (ran.returncode, ran.stderr) == (0, "")
        return traffic(ran.stdout, words[0] if words else "")

    vm.execute("stop")  # the BIOS looks at the disks too
    before, other, total = ask("vda"), ask("vdb"), ask()
    # Of qemu-io's commands only these are counted as a guest's are.
    for command in ("aio_write -P 1 0 64k", "aio_write -P 2 1M 4k", "aio_read 0 8k", "aio_flush"):
        vm.io("virtio0", command)
        vm.io("virtio0", "aio_flush")  # waits for what is under way
    after = ask("vda")
    grown = {number: after[number] - before[number] for number in NUMBERS}
    expected = {"rd_req": 1, "rd_bytes": 8 << 10, "wr_req": 2, "wr_bytes": 68 << 10, "errs": 0}
    assert grown.items() >= expected.items()
    assert all(grown[number] > 0 for number in NUMBERS if number != "errs")
    assert ask("vdb") == other
    assert {n: value - total[n] for n, value in ask().items()} == grown
    stat, result = map(json.loads, cli("domblkstat", vm.name, "vda", "--json").stdout.splitlines())
    assert stat == {"event": "stat", "device": "vda", **after}
    assert result == {"event": "result", "outcome": "done", "exit": 0}
    human = cli("domblkstat", vm.name, "vda", "--human").stdout
    assert human.startswith("Device: vda\n")
    assert f"\n number of bytes written:        {after['wr_bytes']}\n" in human
    assert f"\n number of read operations:      {after['rd_req']}\n" in human
    assert len(human.splitlines()) == 2 + len(NUMBERS)


@pytest.mark.parametrize("command", ["domblkinfo", "domblkstat"])
def test_disk_that_is_not_there(vm: Qemu, cli: Cli, command: str) -> None:
    ran = cli(command, vm.name, "vdz")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: disk 'vdz' not found: there is vda = ")
    (result,) = map(json.loads, cli(command, vm.name, "vdz", "--json").stdout.splitlines())
    assert result.items() >= {"error": "DiskNotFound", "exit": 4}.items()


def test_domain_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    ask: Callable[..., Any] = cli
    for command in ("domblklist", "domblkinfo --all", "domblkstat", "recover"):
        name, *words = command.split()
        ran = ask(name, tmp_path / "missing", *words)
        assert (ran.returncode, ran.stdout) == (3, "")
        assert ran.stderr == f"error: {tmp_path / 'missing'}: No such file or directory\n"
