# SPDX-License-Identifier: MIT
"""Two QEMUs with the same guest hardware: one runs, the other waits for its guest."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror.testing.graph import GraphSnapshot
from qmpmirror.testing.oneshot import CommandError
from qmpmirror.testing.process import sibling
from tests.qemu.conftest import Guest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qmpmirror.testing import Qemu
    from tests.qemu.conftest import Boot, Layers


@attrs.frozen
class Pair:
    """Two QEMUs, before and after.

    Attributes:
        source: the one that runs; each has two monitors.
        destination: the one that waits.
        guests: those of the source's disks.
        images: the destination's images.
        before: the graphs of both as they were.
    """

    source: Qemu
    destination: Qemu
    guests: list[Guest]
    images: list[Path]
    before: tuple[GraphSnapshot, GraphSnapshot]

    def slow_memory(self) -> None:
        """Let the memory take a minute or so."""
        self.source.execute("migrate-set-parameters", {"max-bandwidth": 4000})

    def check_moved(self, *, running: bool = True) -> None:
        """The guest is at the destination with all that it has written; nothing else is left."""
        assert self.source.execute("query-status")["status"] == "postmigrate"
        status = self.destination.execute("query-status")["status"]
        assert status == ("running" if running else "paused")
        for number, guest in enumerate(self.guests):
            moved = Guest.of(self.destination, bytes(guest.expected), number)
            moved.check()
            moved.scribble()
            moved.check()
        self.check_clean()

    def check_stayed(self, *, running: bool = True) -> None:
        """The guest is at the source, and nothing is left."""
        status = self.source.execute("query-status")["status"]
        # QEMU 5.2 says so of a paused guest after any migration.
        assert status in ({"running"} if running else {"paused", "postmigrate"})
        for guest in self.guests:
            guest.scribble()
            guest.check()
        self.check_clean()

    def check_clean(self) -> None:
        """Nothing must be left in either of both that lives."""
        for vm, before in zip((self.source, self.destination), self.before, strict=True):
            if vm.running:
                found = before.differences(GraphSnapshot.take(vm.execute))
                # Images that are let go, or are offered, forget or load their users' bitmaps.
                ours = [each for each in found if "bitmap" not in each or "bitmap 'q" in each]
                assert ours == []
                assert capabilities(vm) == set()
                assert objects(vm) == set()
                creds = vm.execute("query-migrate-parameters").get("tls-creds", "")
                assert creds == ""
        assert not self.has_server

    @property
    def has_server(self) -> bool:
        """Whether the destination has an NBD server."""
        if not self.destination.running:
            return False
        try:
            self.destination.execute("nbd-server-stop")
        except CommandError:
            return False
        return True


def capabilities(vm: Qemu) -> set[str]:
    """The capabilities of the migration that are on."""
    found = vm.execute("query-migrate-capabilities")
    return {each["capability"] for each in found if each["state"]}


def objects(vm: Qemu) -> set[str]:
    """The objects that a user has made."""
    found = vm.execute("qom-list", path="/objects")
    return {each["name"] for each in found if each["name"].startswith("qmpmirror")}


def make(
    boot: Boot,
    layers: Layers,
    *,
    incremental: bool = False,
    disks: int = 1,
    incoming: Sequence[str] = ("-incoming", "defer"),
    source: dict[str, Any] | None = None,
    destination: dict[str, Any] | None = None,
    images: Sequence[Path] | None = None,
) -> Pair:
    """Start both; the source's first disk has a chain of three images.

    Args:
        boot: starts a QEMU.
        layers: the chain.
        incremental: whether the destination has bases of its own, with the same in them.
        disks: how many there are.
        incoming: how the destination waits.
        source: more for the source.
        destination: and for the destination.
        images: its images, when they are not made here.
    """
    tools = layers.images
    tops = [layers.snap2]
    for number in range(1, disks):
        below = tools.create(layers.folder / f"below{number}", "8M")
        tools.io(below, f"write -P {0x50 + number} 2M 1M")
        tops.append(tools.create(layers.folder / f"top{number}", backing=below))
    made = [_counterpart(layers, top, incremental=incremental) for top in tops]
    made = [*images] if images is not None else made
    vm = boot(*_words("src", tops), **{"qmp_sockets": 2, **(source or {})})
    other = boot(*_words("dst", made), *incoming, **{"qmp_sockets": 2, **(destination or {})})
    guests = [Guest.of(vm, layers.content(top), number) for number, top in enumerate(tops)]
    for guest in guests:
        guest.scribble()
    before = GraphSnapshot.take(vm.execute), GraphSnapshot.take(other.execute)
    return Pair(vm, other, guests, made, before)


def _counterpart(layers: Layers, top: Path, *, incremental: bool) -> Path:
    path = top.with_name(f"{top.stem}-moved")
    if not incremental:
        return layers.images.create(path, "8M")
    (_, below, *_) = layers.chain(top)
    base = top.with_name(f"{top.stem}-base")
    tool = sibling(layers.images.qemu, "qemu-img")
    subprocess.run([tool, "convert", "-U", "-O", "qcow2", below, base], check=True)
    return layers.images.create(path, backing=base)


def _words(side: str, images: Sequence[Path]) -> list[str]:
    words = ["-m", "64"]
    for number, image in enumerate(images):
        fmt = "raw" if image.suffix == ".raw" or image.is_block_device() else "qcow2"
        driver = "host_device" if image.is_block_device() else "file"
        node = f"{fmt},node-name={side}{number},file.driver={driver},file.filename={image}"
        words += ["-blockdev", node]
        words += ["-device", f"virtio-blk-pci,drive={side}{number},id=vd{number}"]
    return words
