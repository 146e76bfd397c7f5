# SPDX-License-Identifier: MIT
"""qemu-storage-daemon: no guest and no devices, only nodes, and exports that use them."""

from __future__ import annotations

import itertools
import subprocess
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import pytest

from qmpmirror import Phase, Refused
from qmpmirror.testing import StorageDaemon
from qmpmirror.testing.graph import GraphSnapshot, assert_clean_graph
from qmpmirror.testing.images import check_io
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.qemu.conftest import Connect, Layers, Unchanged

both_depths = pytest.mark.parametrize("shallow", [True, False], ids=["shallow", "full"])
both_ways = pytest.mark.parametrize("via", ["blockdev-mirror", "drive-mirror"])


@attrs.define
class NbdClient:
    """A qemu-io that holds one NBD connection open, as a guest elsewhere would.

    Attributes:
        content: what the export must hold.
    """

    content: bytearray
    _process: subprocess.Popen[str]
    _rounds: int = 0

    def do(self, command: str) -> None:
        """Execute a qemu-io command; fails as `check_io` does."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{command}\n")
        stdin.flush()
        said: list[str] = []
        # Two lines tell of a transfer; what fails says it in one, and ends the output here.
        while not said or (" ops; " not in said[-1] and "failed" not in said[-1]):
            line = stdout.readline()
            assert line, f"{command}: the client has ended: {said}"
            said.append(line)
        check_io(command, "".join(said).replace("qemu-io> ", ""))

    def scribble(self) -> None:
        """Write where the export holds data of some layer, and where it holds none."""
        self._rounds += 1
        byte = 0xA0 + self._rounds
        for area in (0x00000, 0x40000, 0x80000, 0x600000):
            offset = area + 0x1000 * self._rounds
            self.do(f"write -P {byte} {offset} 4096")
            self.content[offset : offset + 0x1000] = bytes([byte]) * 0x1000

    def check(self) -> None:
        """Read everything back."""
        blocks = (bytes(self.content[at : at + 4096]) for at in range(0, len(self.content), 4096))
        offset = 0
        for block, run in itertools.groupby(blocks):
            length = 4096 * len(list(run))
            self.do(f"read -P {block[0]} {offset} {length}")
            offset += length


class Daemon(Protocol):
    """The ``daemon`` fixture."""

    def __call__(self, *arguments: str) -> StorageDaemon:
        """Start a storage daemon that has ``snap2`` open as the node ``fmt0``."""
        ...


@pytest.fixture
def daemon(layers: Layers, qemu_binary: str, tmp_path: Path) -> Iterator[Daemon]:
    started: list[StorageDaemon] = []

    def start(*arguments: str) -> StorageDaemon:
        node = f"qcow2,node-name=fmt0,file.driver=file,file.filename={layers.snap2}"
        made = StorageDaemon(
            binary=sibling(qemu_binary, "qemu-storage-daemon"),
            directory=tmp_path,
            arguments=["--blockdev", node, *arguments],
        )
        started.append(made)
        return made.start()

    yield start
    for made in started:
        made.stop()


@pytest.fixture
def exported(daemon: Daemon, layers: Layers) -> StorageDaemon:
    """A storage daemon that exports ``fmt0`` over NBD."""
    return daemon(
        "--nbd-server",
        f"addr.type=unix,addr.path={layers.folder}/nbd",
        "--export",
        "nbd,id=exp0,name=exp0,node-name=fmt0,writable=on",
    )


@pytest.fixture
def client(exported: StorageDaemon, layers: Layers) -> Iterator[NbdClient]:  # noqa: ARG001
    content = bytearray(layers.content(layers.snap2))
    uri = f"nbd+unix:///exp0?socket={layers.folder}/nbd"
    with subprocess.Popen(
        [sibling(layers.images.qemu, "qemu-io"), "-f", "raw", uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield NbdClient(content, process)
        process.kill()


@both_depths
async def test_node_is_pivoted(
    shallow: bool, daemon: Daemon, layers: Layers, connect: Connect
) -> None:
    vm, destination = daemon(), layers.folder / "copy.qcow2"
    async with connect(vm) as machine:
        assert [disk.name for disk in await machine.disks()] == ["fmt0"]
        copy = await machine.blockcopy("fmt0", destination, shallow=shallow)
        await copy.ready()
        result = await copy.pivot()
        graph = await machine.graph()
        assert (result.outcome, result.left) == (Phase.PIVOTED, ())
        assert result.active == str(destination)
        chain = [destination, layers.snap1, layers.base] if shallow else [destination]
        assert [graph.path(node.name) for node in graph.chain(copy.target_node)] == [
            *map(str, chain)
        ]
        assert len(graph.nodes) == 2 * len(chain)
    vm.stop()
    layers.images.compare(layers.snap2, destination)


@both_depths
async def test_drive_mirror_of_an_unused_node_is_refused(
    shallow: bool, daemon: Daemon, layers: Layers, connect: Connect, unchanged: Unchanged
) -> None:
    """Its target belongs to the job alone, and would be closed with it after a pivot."""
    vm, destination = daemon(), layers.folder / "copy.qcow2"
    async with connect(vm) as machine:
        with unchanged(vm, layers.folder), pytest.raises(Refused, match="fmt0, which nothing uses"):
            await machine.blockcopy("fmt0", destination, shallow=shallow, via="drive-mirror")


@both_depths
@pytest.mark.parametrize("ending", ["finish", "abort", "abort-while-copying"])
async def test_node_stays(
    ending: str,
    shallow: bool,
    daemon: Daemon,
    layers: Layers,
    connect: Connect,
    pinned: dict[str, Any],
) -> None:
    vm, destination = daemon(), layers.folder / "copy.qcow2"
    before = GraphSnapshot.take(vm.execute)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("fmt0", destination, shallow=shallow, **pinned)
        if ending != "abort-while-copying":
            await copy.set_bandwidth(0)
            await copy.ready()
        result = await (copy.finish() if ending == "finish" else copy.abort())
    assert result.outcome is (Phase.FINISHED if ending == "finish" else Phase.ABORTED)
    assert (result.active, result.left) == (str(layers.snap2), ())
    assert_clean_graph(vm.execute, before)
    if ending == "abort-while-copying":
        assert (result.consistent, result.removed) == (False, True)
        assert not destination.exists()
    else:
        layers.images.compare(layers.snap2, destination)


@both_ways
@both_depths
async def test_export_moves_with_a_pivot(
    shallow: bool,
    via: str,
    exported: StorageDaemon,
    client: NbdClient,
    layers: Layers,
    connect: Connect,
    pinned: dict[str, Any],
) -> None:
    vm, destination = exported, layers.folder / "copy.qcow2"
    client.scribble()
    async with connect(vm) as machine:
        copy = await machine.blockcopy("fmt0", destination, shallow=shallow, via=via, **pinned)
        client.scribble()
        await copy.set_bandwidth(0)
        await copy.ready()
        client.scribble()
        result = await copy.pivot()
    old = layers.digest(layers.snap2)
    client.scribble()
    client.check()
    assert (result.outcome, result.left) == (Phase.PIVOTED, ())
    assert layers.digest(layers.snap2) == old
    paths = {node["file"] for node in vm.execute("query-named-block-nodes", flat=True)}
    assert str(layers.snap2) not in paths
    assert layers.content(destination) == client.content


@both_ways
@both_depths
@pytest.mark.parametrize("ending", ["finish", "abort"])
async def test_export_stays_with_any_other_ending(
    ending: str,
    shallow: bool,
    via: str,
    exported: StorageDaemon,
    client: NbdClient,
    layers: Layers,
    connect: Connect,
) -> None:
    vm, destination = exported, layers.folder / "copy.qcow2"
    before = GraphSnapshot.take(vm.execute)
    async with connect(vm) as machine:
        copy = await machine.blockcopy("fmt0", destination, shallow=shallow, via=via)
        client.scribble()
        await copy.ready()
        client.scribble()
        result = await (copy.finish() if ending == "finish" else copy.abort())
        copied = bytes(client.content)
    client.scribble()
    client.check()
    assert_clean_graph(vm.execute, before)
    assert (result.active, result.consistent) == (str(layers.snap2), True)
    assert layers.content(destination) == copied
    assert layers.content(layers.snap2) == client.content != copied
