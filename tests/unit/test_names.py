# SPDX-License-Identifier: MIT
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qmpmirror
from qmpmirror import names
from qmpmirror.names import Flag, JobName, Mark

RUN = "0a1b2c3d"
WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""What QEMU takes as a job id (``id_wellformed``)."""

SOURCES = [
    "vda",
    "drive-virtio-disk0",
    "#block123",
    "libvirt-1-format",
    "node.with.dots",
    "node_with_underscores",
    "__",
    "_5f",
    "a_5f_5fb",
    "plätte-0",
    "磁盘",
    "\N{PILE OF POO}",
    "with space",
    "line\nbreak",
    "-",
    "--",
    "qmpmirror-0a1b2c3d-format",
    "",
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("flags", [set(), {Flag.FULL}, {Flag.SHALLOW, Flag.CREATED}, set(Flag)])
def test_a_job_name_comes_back_as_it_was(source: str, flags: set[Flag]) -> None:
    name = JobName("copy", RUN, frozenset(flags), source)
    assert names.parse_job(str(name)) == name


@pytest.mark.parametrize("replaced", [("b",), ("a.b", "_.", "."), tuple(SOURCES)])
def test_the_replaced_nodes_come_back_in_order(replaced: tuple[str, ...]) -> None:
    name = JobName("copy", RUN, frozenset({Flag.FULL}), "top", replaced)
    assert names.parse_job(str(name)) == name
    assert WELL_FORMED.fullmatch(str(name))


@pytest.mark.parametrize("ours", [False, True])
def test_the_job_that_creates_a_file(ours: bool) -> None:
    name = names.created_file(RUN, "/srv/a_b/c-d.qcow2", ours=ours)
    assert names.parse_job(str(name)) == name
    assert (name.verb, name.run, name.source) == ("create", RUN, "/srv/a_b/c-d.qcow2")
    assert (Flag.CREATED in name.flags) is ours


def test_the_job_that_writes_a_header() -> None:
    name = names.created_header(RUN)
    assert names.parse_job(str(name)) == name
    assert (name.verb, name.run) == ("format", RUN)


@pytest.mark.parametrize("source", SOURCES)
def test_qemu_accepts_a_job_name(source: str) -> None:
    name = str(JobName("copy", RUN, frozenset(Flag), source))
    assert WELL_FORMED.fullmatch(name)


def test_different_sources_give_different_job_names() -> None:
    made = {str(JobName("copy", RUN, frozenset(), source)) for source in SOURCES}
    assert len(made) == len(SOURCES)


def test_a_job_name_reads_like_the_scheme() -> None:
    flags = frozenset({Flag.CREATED, Flag.SHALLOW})
    assert str(JobName("copy", RUN, flags, "#block123")) == "qmpmirror-copy-0a1b2c3d-sc-_23block123"


def test_a_flag_of_a_later_version_is_ignored() -> None:
    found = names.parse_job(f"qmpmirror-copy-{RUN}-sic-vda")
    assert found == JobName("copy", RUN, frozenset({Flag.SHALLOW, Flag.CREATED}), "vda")


def test_broken_utf8_is_read_without_failing() -> None:
    found = names.parse_job(f"qmpmirror-copy-{RUN}-s-a_ffb")
    assert found is not None
    assert found.source == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "vda",
        "mirror-virtio0",
        "copy-vda-libvirt-3-format",
        "qmpmirror",
        "qmpmirror-",
        "qmpmirror-copy",
        f"qmpmirror-copy-{RUN}",
        f"qmpmirror-copy-{RUN}-s",
        f"qmpmirror--{RUN}-s-vda",
        f"qmpmirror-Copy-{RUN}-s-vda",
        f"qmpmirror-copy-{RUN}-S-vda",
        "qmpmirror-copy-0a1b2c3-s-vda",
        "qmpmirror-copy-0A1B2C3D-s-vda",
        f"Qmpmirror-copy-{RUN}-s-vda",
        f"my-qmpmirror-copy-{RUN}-s-vda",
        f"qmpmirror-{RUN}-format",
    ],
)
def test_a_foreign_job_is_none_of_ours(foreign: str) -> None:
    assert names.parse_job(foreign) is None


def roles_in_use() -> set[str]:
    """Every role that the package gives to a node of its own."""
    return {
        str(call.args[1].value)
        for path in Path(qmpmirror.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("node_name")
        and len(call.args) == 2
        and isinstance(call.args[1], ast.Constant)
    }


def test_the_roles_in_use_are_found() -> None:
    assert roles_in_use() >= {"format", "storage"}


@pytest.mark.parametrize("role", sorted(roles_in_use() | {"slice"}))
def test_a_node_name_comes_back_and_fits(role: str) -> None:
    name = names.node_name(RUN, role)
    assert names.parse_node(name) == (RUN, role)
    assert len(name) <= 31
    assert WELL_FORMED.fullmatch(name)


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "#block123",
        "libvirt-1-format",
        f"qmpmirror-{RUN}",
        f"qmpmirror-{RUN}-",
        f"qmpmirror-{RUN}-Format",
        f"qmpmirror-{RUN}-format1",
        f"qmpmirror-{RUN}-format-x",
        "qmpmirror-0a1b2c3-format",
        f"x-qmpmirror-{RUN}-format",
        f"qmpmirror-copy-{RUN}-s-vda",
    ],
)
def test_a_foreign_node_is_none_of_ours(foreign: str) -> None:
    assert names.parse_node(foreign) is None
    assert names.parse_bitmap(foreign) is None


@pytest.mark.parametrize("mark", Mark)
def test_a_bitmap_name_comes_back_and_fits(mark: Mark) -> None:
    name = names.bitmap_name(RUN, mark)
    assert names.parse_bitmap(name) == (RUN, mark)
    assert len(name) <= 1023


def test_a_bitmap_of_ours_has_a_known_mark() -> None:
    assert names.parse_bitmap(f"qmpmirror-{RUN}-other") is None


def test_a_run_id_is_new_each_time() -> None:
    runs = {names.new_run() for _ in range(1000)}
    assert len(runs) == 1000
    assert all(re.fullmatch(r"[0-9a-z]{8}", run) for run in runs)


def test_a_node_name_does_not_hide_a_job() -> None:
    """A source that looks like a name of ours cannot be mistaken for one."""
    nested = JobName("copy", RUN, frozenset({Flag.SHALLOW}), f"qmpmirror-copy-{RUN}-s-vda")
    assert names.parse_job(str(nested)) == nested


@pytest.mark.parametrize("runs", [False, True])
def test_a_destination_remembers_how_it_was(runs: bool) -> None:
    off = frozenset({Flag.EVENTS_WERE_OFF, Flag.RETURN_PATH_WAS_OFF, Flag.BITMAPS_WERE_OFF})
    for flags in (frozenset[Flag](), off):
        role = names.arrival_role(runs=runs, flags=flags)
        assert names.parse_arrival(role) == (runs, flags)
        name = names.node_name(RUN, role)
        assert names.parse_node(name) == (RUN, role)
        assert len(name) <= 31
    assert names.parse_arrival("format") is None
