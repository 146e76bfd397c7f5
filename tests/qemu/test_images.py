# SPDX-License-Identifier: MIT
from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from qmpmirror.testing import images as on_path
from qmpmirror.testing.images import ImageError, ImageTools, Pattern, visible_patterns
from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024


def test_tools_are_those_beside_the_qemu(images: ImageTools, tmp_path: Path) -> None:
    assert sibling(images.qemu, "qemu-img") == images.qemu.replace("qemu-system-x86_64", "qemu-img")
    assert sibling(tmp_path / "no-qemu", "qemu-img") == sibling("qemu-system-x86_64", "qemu-img")
    with pytest.raises(FileNotFoundError, match="no-such-tool is neither beside"):
        sibling(images.qemu, "no-such-tool")


def test_create_with_options_and_backing(images: ImageTools, tmp_path: Path) -> None:
    base = images.create(tmp_path / "base.raw", 3 * MIB, "raw")
    top = images.create(
        tmp_path / "top.qcow2",
        backing="base.raw",
        backing_fmt="raw",
        options={"cluster_size": "128k", "compat": "1.1"},
    )
    info = images.info(top)
    assert (info["virtual-size"], info["cluster-size"]) == (3 * MIB, 128 * 1024)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.raw", "raw")
    assert images.chain(top) == [str(top), str(base)]
    assert images.info(base, "raw")["format"] == "raw"


def test_failures_are_in_the_tools_own_words(images: ImageTools, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nope"):
        images.create(tmp_path / "a", "1M", "nope")
    with pytest.raises(ImageError, match="missing"):
        images.info(tmp_path / "missing")
    with pytest.raises(ImageError, match="missing"):
        images.compare(tmp_path / "missing", tmp_path / "missing")
    with pytest.raises(ImageError, match="missing"):
        images.io(tmp_path / "missing", "read 0 4k")
    path = images.create(tmp_path / "a.qcow2", "1M")
    with pytest.raises(ImageError):
        images.io(path, "read 2M 4k")
    with pytest.raises(ImageError):
        images.io(path, "no-such-command")


def test_patterns(images: ImageTools, tmp_path: Path) -> None:
    path = images.create(tmp_path / "a.qcow2", "1M")
    images.write_pattern(path, 512, 1024, 0xA5)
    images.verify_pattern(path, 512, 1024, 0xA5)
    images.verify_pattern(path, 0, 512, 0)
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        images.verify_pattern(path, 0, 1024, 0xA5)


def test_compare(images: ImageTools, tmp_path: Path) -> None:
    one = images.create(tmp_path / "one.qcow2", "1M")
    other = images.create(tmp_path / "other.raw", "1M", "raw")
    images.compare(one, other, "qcow2", "raw")
    images.write_pattern(other, 4096, 512, 1, "raw")
    with pytest.raises(AssertionError, match="at offset 4096"):
        images.compare(one, other, "qcow2", "raw")


def test_map_tells_the_layer_of_each_extent(images: ImageTools, qemu_chain: list[Path]) -> None:
    extents = images.map(qemu_chain[-1])
    depths = {extent["start"]: extent["depth"] for extent in extents if extent["data"]}
    assert [depths[offset] for offset in (0, 256 * 1024, 512 * 1024)] == [2, 1, 0]


@pytest.mark.parametrize("formats", [["raw", "qcow2", "qcow2", "qcow2"], ["qcow2", "qcow2"]])
def test_chain_shows_exactly_the_visible_patterns(
    images: ImageTools, tmp_path: Path, formats: list[str]
) -> None:
    names = [f"layer{number}" for number in range(len(formats))]
    chain = images.make_chain(tmp_path, names, "8M", formats)
    assert images.chain(chain[-1]) == [str(path) for path in reversed(chain)]
    visible = sorted(visible_patterns(len(chain)), key=lambda pattern: pattern.offset)
    assert len({pattern.byte for pattern in visible}) == len(chain)
    ends = [Pattern(0, 0, 0), *visible, Pattern(8 * MIB, 0, 0)]
    for before, after in itertools.pairwise(ends):
        gap = before.offset + before.length
        if gap < after.offset:
            images.verify_pattern(chain[-1], gap, after.offset - gap, 0)
        if after.length:
            images.verify_pattern(chain[-1], after.offset, after.length, after.byte)


def test_module_functions_use_the_tools_on_path(tmp_path: Path) -> None:
    chain = on_path.make_chain(tmp_path, ("base", "top"), "8M")
    assert on_path.chain(chain[1]) == [str(chain[1]), str(chain[0])]
    on_path.verify_pattern(chain[1], 0, 65536, 0x11)
    on_path.compare(chain[1], chain[1])
