# SPDX-License-Identifier: MIT
"""A disk with a chain of four images, connected in several ways, and a guest that writes to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror import names

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing import ImageTools, Qemu
    from tests.qemu.conftest import Boot, Guest, Layers

WAYS = ["drive", "blockdev", "throttle"]


@attrs.frozen
class Chain:
    """``base <- snap1 <- snap2 <- snap3`` under a disk ``vd0``."""

    vm: Qemu
    guest: Guest
    images: tuple[Path, ...]
    tools: ImageTools

    @property
    def active(self) -> list[str]:
        """The chain under the guest, as QEMU sees it, the active image first."""
        (drive,) = [d for d in self.vm.execute("query-block") if "virtio" in d.get("qdev", "")]
        image, found = drive["inserted"]["image"], []
        while image:
            found.append(image["filename"])
            image = image.get("backing-image")
        # A filter above shows its image twice.
        return list(dict.fromkeys(name.rpartition("/")[2].rstrip('"}') for name in found))

    def paths(self, *numbers: int) -> list[str]:
        """The names of images by number, the active one (3) first."""
        return [self.images[number].name for number in numbers]

    def headers(self) -> list[str]:
        """What the headers say of the chain of the active image."""
        return [path.rpartition("/")[2] for path in self.tools.chain(self.images[3])]

    def check_clean(self) -> None:
        """Nothing of ours may be left: no job, no node, no bitmap."""
        assert self.vm.execute("query-jobs") == []
        nodes = self.vm.execute("query-named-block-nodes", flat=True)
        assert not [node for node in nodes if names.parse_node(node["node-name"])]
        bitmaps = [b for node in nodes for b in node.get("dirty-bitmaps", ()) if b.get("name")]
        assert not [bitmap for bitmap in bitmaps if names.parse_bitmap(bitmap["name"])]

    def node(self, number: int) -> str:
        """The name of an image's node."""
        name: str = self._info(number)["node-name"]
        return name

    def bitmaps(self, number: int) -> list[dict[str, Any]]:
        """The named dirty bitmaps of an image's node."""
        return [b for b in self._info(number).get("dirty-bitmaps", ()) if b.get("name")]

    def _info(self, number: int) -> dict[str, Any]:
        nodes = self.vm.execute("query-named-block-nodes", flat=True)
        (found,) = [
            node
            for node in nodes
            if node["drv"] == "qcow2" and self.images[number].name in node["image"]["filename"]
        ]
        return dict(found)

    def is_open(self, number: int) -> bool:
        """Whether QEMU has one of the images open."""
        nodes = self.vm.execute("query-named-block-nodes", flat=True)
        return any(node["file"] == str(self.images[number]) for node in nodes)


def make(boot: Boot, layers: Layers, way: str) -> Chain:
    """Start a QEMU whose disk has the chain."""
    snap3 = layers.images.create(layers.folder / "snap3.qcow2", backing=layers.snap2)
    layers.images.io(snap3, "write -P 0x43 3M 64k", "write -P 0x44 1M 4k")
    images = (layers.base, layers.snap1, layers.snap2, snap3)
    vm = boot(*_words(images, way))
    from tests.qemu.conftest import Guest  # noqa: PLC0415 - that one imports the other fixtures

    return Chain(vm, Guest.of(vm, layers.content(snap3)), images, layers.images)


def _words(images: tuple[Path, ...], way: str) -> list[str]:
    if way == "drive":
        drive = f"if=none,id=d0,format=qcow2,file={images[3]}"
        return ["-drive", drive, "-device", "virtio-blk-pci,drive=d0,id=vd0"]
    words = []
    for number, image in enumerate(images):
        node: dict[str, Any] = {"driver": "qcow2", "node-name": f"img{number}"}
        node["file"] = {"driver": "file", "filename": str(image)}
        node["backing"] = f"img{number - 1}" if number else None
        words += ["-blockdev", json.dumps(node)]
    if way == "throttle":
        words += ["-object", "throttle-group,id=tg"]
        words += ["-blockdev", "throttle,node-name=top,throttle-group=tg,file=img3"]
    drive = "top" if way == "throttle" else "img3"
    return [*words, "-device", f"virtio-blk-pci,drive={drive},id=vd0"]
