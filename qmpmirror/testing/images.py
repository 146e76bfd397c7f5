# SPDX-License-Identifier: MIT
"""Make, fill, inspect and compare disk images with QEMU's own tools.

The functions of this module use the tools on ``PATH``; `ImageTools` those of a certain QEMU.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qmpmirror.testing.process import sibling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KIB = 1024
_MIB = 1024 * _KIB
_DONE = re.compile(r"^(?:read|wrote|discard) (\d+)/(\d+) bytes at offset", re.MULTILINE)
_TROUBLE = re.compile(
    r"failed|error|not found|invalid|non-numeric|Unknown|Unsupported|usage:|bad argument"
    r"|not aligned|is not a|out of range|can't|cannot|no file open",
    re.IGNORECASE,
)


class ImageError(Exception):
    """An image tool failed; its own words are the message."""


def check_io(command: str, output: str) -> str:
    """Tell from the text whether a qemu-io command did what it should.

    Inside of QEMU there is no exit status, so the text is all there is.

    Args:
        command: The command, such as ``write -P 0x11 0 64k``.
        output: All that it printed.

    Returns:
        The output.

    Raises:
        AssertionError: The pattern that was read is another one.
        ImageError: It failed in any other way.
    """
    if "Pattern verification failed" in output:
        raise AssertionError(f"{command}: {output.strip()}")
    verb = command.split(maxsplit=1)[0]
    transfers = verb in {"read", "readv", "write", "writev", "discard"}
    done = _DONE.search(output)
    complete = done is not None and done[1] == done[2]
    quiet = "-q" in command.split()
    if (transfers and not quiet and not complete) or (not complete and _TROUBLE.search(output)):
        raise ImageError(f"{command}: {output.strip() or '(no output)'}")
    return output


@attrs.frozen
class Pattern:
    """An area of an image that is filled with one byte. Offset and length are in bytes."""

    offset: int
    length: int
    byte: int


def layer_patterns(layer: int, layers: int) -> list[Pattern]:
    """What `ImageTools.make_chain` writes to one layer of a chain.

    An area of its own, and a part of an area common to all layers: its first 64 KiB show the lowest
    layer, and so on up to the top one, which shows in the last 64 KiB.

    Args:
        layer: Number of the layer, 0 is the lowest.
        layers: How many layers the chain has.
    """
    byte = 0x11 + layer
    unit = 64 * _KIB
    return [
        Pattern(layer * 4 * unit, 2 * unit, byte),
        Pattern(4 * _MIB + layer * unit, (layers - layer) * unit, byte),
    ]


def visible_patterns(layers: int) -> list[Pattern]:
    """What a chain of `ImageTools.make_chain` shows through its top layer; all else is zero."""
    unit = 64 * _KIB
    return [
        pattern
        for layer in range(layers)
        for pattern in (
            layer_patterns(layer, layers)[0],
            Pattern(4 * _MIB + layer * unit, unit, 0x11 + layer),
        )
    ]


@attrs.frozen
class ImageTools:
    """``qemu-img`` and ``qemu-io`` of one QEMU version.

    Attributes:
        qemu: A QEMU binary; the tools beside it are used, else those on ``PATH``.
        timeout: Seconds after which a tool that has not ended is killed.
    """

    qemu: str = attrs.field(converter=str, default="qemu-system-x86_64")
    timeout: float = 60.0

    def create(
        self,
        path: str | Path,
        size: int | str | None = None,
        fmt: str = "qcow2",
        *,
        backing: str | Path | None = None,
        backing_fmt: str = "qcow2",
        options: Mapping[str, object] | None = None,
    ) -> Path:
        """Create an image (``qemu-img create``).

        Args:
            path: Where.
            size: Virtual size in bytes, or in qemu-img's words (``64M``); None takes the backing's.
            fmt: Its format.
            backing: Its backing file; a relative name is relative to the image.
            backing_fmt: Format of the backing file.
            options: Options of the format, such as ``{"cluster_size": "2M"}``.

        Returns:
            The path.

        Raises:
            ImageError: qemu-img failed.
        """
        words = ["create", "-q", "-f", fmt]
        if backing is not None:
            words += ["-b", str(backing), "-F", backing_fmt]
        if options:
            words += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
        self._run("qemu-img", *words, str(path), *([] if size is None else [str(size)]))
        return Path(path)

    def io(self, path: str | Path, *commands: str, fmt: str = "qcow2") -> str:
        """Execute qemu-io commands on an image that no QEMU has open.

        Returns:
            What they printed.

        Raises:
            AssertionError: ``read -P`` found another pattern.
            ImageError: A command failed.
        """
        output = ""
        for command in commands:
            run = self._call("qemu-io", "-f", fmt, "-c", command, str(path))
            text = run.stdout + run.stderr
            output += check_io(command, text)
            if run.returncode:
                raise ImageError(f"{command}: {text.strip()}")
        return output

    def write_pattern(
        self, path: str | Path, offset: int, length: int, byte: int, fmt: str = "qcow2"
    ) -> None:
        """Fill ``length`` bytes at ``offset`` with one byte."""
        self.io(path, f"write -P {byte} {offset} {length}", fmt=fmt)

    def verify_pattern(
        self, path: str | Path, offset: int, length: int, byte: int, fmt: str = "qcow2"
    ) -> None:
        """Raise AssertionError unless ``length`` bytes at ``offset`` all are ``byte``."""
        self.io(path, f"read -P {byte} {offset} {length}", fmt=fmt)

    def make_chain(
        self,
        directory: Path,
        names: Sequence[str] = ("base", "snap1", "snap2"),
        size: int | str = "64M",
        formats: Sequence[str] | None = None,
    ) -> list[Path]:
        """Create a backing chain whose layers differ in content (see `layer_patterns`).

        Args:
            directory: Where the images go.
            names: The layers' names, the lowest first; the files are called ``NAME.FORMAT``.
            size: Virtual size; 8 MiB or more.
            formats: The layers' formats, qcow2 throughout if None.

        Returns:
            The images, the lowest first: the last one is what a guest uses.
        """
        formats = ["qcow2"] * len(names) if formats is None else formats
        chain: list[Path] = []
        for layer, (name, fmt) in enumerate(zip(names, formats, strict=True)):
            path = directory / f"{name}.{fmt}"
            if chain:
                self.create(path, fmt=fmt, backing=chain[-1], backing_fmt=formats[layer - 1])
            else:
                self.create(path, size, fmt)
            for pattern in layer_patterns(layer, len(names)):
                self.write_pattern(path, pattern.offset, pattern.length, pattern.byte, fmt)
            chain.append(path)
        return chain

    def add_bitmap(self, path: str | Path, name: str) -> None:
        """Add a persistent dirty bitmap to an image that no QEMU has open."""
        self._run("qemu-img", "bitmap", "--add", str(path), name)

    def info(self, path: str | Path, fmt: str | None = None) -> dict[str, Any]:
        """What ``qemu-img info`` says, also of an image that is in use."""
        found: dict[str, Any] = self._json("info", path, fmt)
        return found

    def chain(self, path: str | Path, fmt: str | None = None) -> list[str]:
        """File names of the image and all that is below it, the image first."""
        layers = self._json("info", path, fmt, "--backing-chain")
        return [str(layer["filename"]) for layer in layers]

    def map(self, path: str | Path, fmt: str | None = None) -> list[dict[str, Any]]:
        """Extents of the image and the layers below it, as ``qemu-img map`` tells them."""
        extents: list[dict[str, Any]] = self._json("map", path, fmt)
        return extents

    def compare(
        self,
        one: str | Path,
        other: str | Path,
        fmt_one: str = "qcow2",
        fmt_other: str = "qcow2",
    ) -> None:
        """Compare what two images show to a guest, also while they are in use.

        Raises:
            AssertionError: They differ; the message says where, in qemu-img's words.
            ImageError: They could not be compared.
        """
        run = self._call(
            "qemu-img", "compare", "-U", "-f", fmt_one, "-F", fmt_other, str(one), str(other)
        )
        if run.returncode == 1:
            raise AssertionError(f"{one} and {other}: {run.stdout.strip()}")
        if run.returncode:
            raise ImageError(run.stderr.strip())

    def _json(self, verb: str, path: str | Path, fmt: str | None, *words: str) -> Any:
        chosen = [] if fmt is None else ["-f", fmt]
        return json.loads(
            self._run("qemu-img", verb, "-U", "--output=json", *chosen, *words, str(path))
        )

    def _run(self, tool: str, *words: str) -> str:
        run = self._call(tool, *words)
        if run.returncode:
            raise ImageError(run.stderr.strip() or f"{tool} exited with status {run.returncode}")
        return run.stdout

    def _call(self, tool: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sibling(self.qemu, tool), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=self.timeout,
        )


_on_path = ImageTools()

create = _on_path.create
io = _on_path.io
write_pattern = _on_path.write_pattern
verify_pattern = _on_path.verify_pattern
make_chain = _on_path.make_chain
info = _on_path.info
chain = _on_path.chain
map = _on_path.map  # noqa: A001 - qemu-img's own word
compare = _on_path.compare
