# SPDX-License-Identifier: MIT
"""The block graph from replies of real QEMUs (see the fixture `recorded` for their disks)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import graph
from qmpmirror.graph import FILTERS, Bitmap, Graph, User

if TYPE_CHECKING:
    from collections.abc import Mapping

MOMENTS = ("idle", "mirroring", "pivoted", "daemon")


def parse(replies: Mapping[str, Any], *, debug: bool = True) -> Graph:
    return graph.parse(
        replies["query-block"],
        replies["query-named-block-nodes"],
        replies["x-debug-query-block-graph"] if debug else None,
    )


def without_children(found: Graph) -> dict[str, object]:
    return {name: attrs.evolve(node, children=()) for name, node in found.nodes.items()}


def root_of(found: Graph, drive: str) -> str:
    """The node under a drive; QEMU makes up its name anew at each start."""
    (name,) = (d["inserted"]["node-name"] for d in found.drives if d["device"] == drive)
    return str(name)


@pytest.fixture
def idle(recorded: dict[str, dict[str, Any]]) -> Graph:
    return parse(recorded["idle"])


@pytest.fixture
def mirroring(recorded: dict[str, dict[str, Any]]) -> Graph:
    return parse(recorded["mirroring"])


@pytest.fixture
def pivoted(recorded: dict[str, dict[str, Any]]) -> Graph:
    return parse(recorded["pivoted"])


@pytest.mark.parametrize("version", ["11.1"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_children_tell_the_same_as_the_debug_graph(
    recorded: dict[str, dict[str, Any]], moment: str
) -> None:
    """A QEMU without the debug command is read by ``children``, which came with 10.1."""
    with_debug, with_children = (parse(recorded[moment], debug=debug) for debug in (True, False))
    assert without_children(with_debug) == without_children(with_children)
    for name, node in with_debug.nodes.items():
        assert sorted(node.children) == sorted(with_children.nodes[name].children)
        root = with_debug.image(name).name
        assert with_children.image(name).name == root
        chain = [image.name for image in with_debug.chain(name)]
        assert [image.name for image in with_children.chain(name)] == chain
        assert with_children.storage(root).name == with_debug.storage(root).name
        assert set(with_children.image_nodes(root)) == set(with_debug.image_nodes(root))
        assert with_children.stack(name) == with_debug.stack(name)
        assert with_children.is_root(name) == with_debug.is_root(name)
    assert with_children.users == {}


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_node_is_there(recorded: dict[str, dict[str, Any]], moment: str) -> None:
    replies = recorded[moment]
    found = parse(replies)
    assert [*found.nodes] == [node["node-name"] for node in replies["query-named-block-nodes"]]
    assert len(found.drives) == len(replies["query-block"])
    for node in found.nodes.values():
        assert all(child in found.nodes for _, child in node.children)


def test_the_facts_of_a_node(idle: Graph) -> None:
    top = idle.nodes["top"]
    assert (top.driver, top.filename, top.read_only) == ("qcow2", "/vm/top.qcow2", False)
    assert (top.virtual_size, top.cluster_size, top.extended_l2) == (64 << 20, 64 << 10, False)
    assert (top.cache_direct, top.cache_no_flush, top.detect_zeroes) == (False, True, "off")
    assert top.actual_size is not None
    assert 0 < top.actual_size < 64 << 20
    assert top.bitmaps == (Bitmap("b0", 64 << 10, 0, True, True, False),)
    assert idle.nodes["base"].read_only
    assert not idle.nodes["base"].cache_no_flush
    assert idle.nodes["slice"].virtual_size == 1 << 20
    storage = idle.nodes["base-file"]
    assert (storage.driver, storage.cluster_size, storage.extended_l2) == ("file", 0, False)
    assert storage.bitmaps == ()


def test_what_a_header_says_of_the_backing_file(idle: Graph) -> None:
    top, base = idle.nodes["top"], idle.nodes["base"]
    assert (top.backing_filename, top.backing_format) == ("/vm/snap.qcow2", "qcow2")
    assert (base.backing_filename, base.backing_format) == ("", "")


def test_children_have_roles(idle: Graph) -> None:
    top = idle.nodes["top"]
    assert top.child("backing") == "snap"
    assert idle.nodes[top.child("file")].driver == "file"
    assert top.child("data-file") == ""
    assert idle.nodes["base"].child("backing") == ""
    assert idle.nodes[idle.nodes["ext"].child("data-file")].filename == "/vm/ext.raw"


def test_names_that_qemu_made_up(idle: Graph) -> None:
    assert idle.nodes["top"].named_by_user
    assert not idle.nodes[idle.nodes["top"].child("file")].named_by_user


# --- filters and chains ----------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["idle", "mirroring"])
def test_the_image_is_below_its_filters(recorded: dict[str, dict[str, Any]], moment: str) -> None:
    found = parse(recorded[moment])
    assert found.stack("cor") == ["cor", "thr", "top"]
    assert found.image("cor").name == "top"
    assert found.image("thr").name == "top"
    assert found.image("top").name == "top"
    assert [image.name for image in found.chain("cor")] == ["top", "snap", "base"]


def test_after_a_pivot_the_copy_is_below_the_filters(pivoted: Graph) -> None:
    assert pivoted.stack("cor") == ["cor", "thr", "tgt"]
    assert [image.name for image in pivoted.chain("cor")] == ["tgt", "snap", "base"]


def test_a_job_s_own_filter_is_a_filter(mirroring: Graph) -> None:
    above = {node.child("backing"): node for node in mirroring.nodes.values() if node.is_filter}
    for root in ("cor", root_of(mirroring, "virtio0")):
        assert above[root].driver == "mirror_top"
        assert mirroring.below(above[root].name) == root
        assert mirroring.image(above[root].name) == mirroring.image(root)


def test_raw_is_no_filter(idle: Graph) -> None:
    assert "raw" not in FILTERS
    assert idle.image("slice").name == "slice"
    assert idle.stack("slice") == ["slice"]


def test_the_chain_of_a_plain_drive(idle: Graph) -> None:
    chain = idle.chain(root_of(idle, "virtio0"))
    assert [image.filename for image in chain] == ["/vm/drv.qcow2", "/vm/drv-base.qcow2"]
    assert [image.driver for image in chain] == ["qcow2", "qcow2"]


@pytest.mark.parametrize(
    ("image", "path"),
    [
        ("top", "/vm/top.qcow2"),
        ("snap", "/vm/snap.qcow2"),
        ("slice", "/vm/sliced.raw"),
        ("ext", "/vm/ext.qcow2"),
        ("base-file", "/vm/base.qcow2"),
        ("loose", ""),
    ],
)
def test_where_an_image_is(idle: Graph, image: str, path: str) -> None:
    assert idle.path(image) == path
    assert idle.location(image) == (path or "null-co://")
    assert idle.storage(image).driver == ("file" if path else "null-co")


def test_the_nodes_of_an_image(idle: Graph) -> None:
    def kinds(image: str) -> list[tuple[str, str]]:
        nodes = [idle.nodes[name] for name in idle.image_nodes(image)]
        return [(node.driver, node.filename) for node in nodes]

    assert idle.image_nodes("snap") == ["snap", "snap-file"]
    assert kinds("top") == [("qcow2", "/vm/top.qcow2"), ("file", "/vm/top.qcow2")]
    assert kinds("ext")[0] == ("qcow2", "/vm/ext.qcow2")
    assert set(kinds("ext")[1:]) == {("file", "/vm/ext.qcow2"), ("file", "/vm/ext.raw")}


@pytest.mark.parametrize(
    ("driver", "filename", "path"),
    [
        ("file", "/vm/a", "/vm/a"),
        ("file", "a", "a"),
        ("file", "file:a:b", "a:b"),
        ("file", 'json:{"driver": "file", "filename": "/vm/a", "locking": "on"}', "/vm/a"),
        ("file", 'json:{"driver": "file", "fd": 5}', ""),
        ("host_device", "/dev/vg/lv", "/dev/vg/lv"),
        ("host_cdrom", "/dev/sr0", "/dev/sr0"),
        ("nbd", "nbd://host:10809/e", ""),
        ("nbd", 'json:{"driver": "nbd", "filename": "/no/path"}', ""),
    ],
)
def test_the_path_of_a_storage_node(idle: Graph, driver: str, filename: str, path: str) -> None:
    node = attrs.evolve(idle.nodes["base-file"], driver=driver, filename=filename)
    found = attrs.evolve(idle, nodes={"base-file": node})
    assert found.path("base-file") == path
    assert found.location("base-file") == path or filename


# --- who uses what ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cor", "loose", "ext", "slice", "sata"])
def test_roots(idle: Graph, mirroring: Graph, name: str) -> None:
    assert idle.is_root(name)
    assert mirroring.is_root(name)


@pytest.mark.parametrize("name", ["thr", "top", "snap", "snap-file", "base", "base-file"])
def test_nodes_below_a_root(idle: Graph, name: str) -> None:
    assert not idle.is_root(name)


def test_the_targets_of_jobs_are_roots(mirroring: Graph) -> None:
    assert mirroring.is_root("tgt")
    assert mirroring.is_root("tgt2")
    assert not mirroring.is_root("tgt-file")


def test_parents(idle: Graph, mirroring: Graph) -> None:
    assert [node.name for node in idle.parents("snap")] == ["top"]
    assert {node.name for node in mirroring.parents("snap")} == {"top", "tgt"}
    assert idle.parents("cor") == []


def test_the_users_of_a_node(idle: Graph, mirroring: Graph) -> None:
    backend = User("block-backend", "/machine/peripheral/vd0/virtio-backend", "root", writes=True)
    assert idle.users["cor"] == (backend,)
    drive = User("block-backend", "virtio0", "root", writes=True)
    assert idle.users[root_of(idle, "virtio0")] == (drive,)
    roles = {(user.name, user.role) for user in mirroring.users["tgt"]}
    assert roles == {("shallow", "target"), ("", "root")}
    assert any(user.writes for user in mirroring.users["tgt"])
    assert mirroring.users["cor"] == (User("block-job", "shallow", "source"),)


def test_an_export_is_a_user_without_a_name(recorded: dict[str, dict[str, Any]]) -> None:
    found = parse(recorded["daemon"])
    assert found.users["disk"] == (User("block-backend", "", "root", writes=True),)
    assert found.drives == ()


def test_no_jobs(idle: Graph, pivoted: Graph) -> None:
    for found in (idle, pivoted):
        assert found.jobs_on(found.nodes) == []


def test_jobs_are_seen_through_their_filter(mirroring: Graph) -> None:
    drive = root_of(mirroring, "virtio0")
    assert mirroring.jobs_on(mirroring.stack("cor")) == ["shallow"]
    assert mirroring.jobs_on(["cor"]) == ["shallow"]
    assert mirroring.jobs_on(["tgt"]) == ["shallow"]
    assert mirroring.jobs_on([drive]) == ["full"]
    assert mirroring.jobs_on(["cor", drive, "cor"]) == ["shallow", "full"]
    assert mirroring.jobs_on(["sata", "ext", "slice", "loose"]) == []
    assert mirroring.jobs_on(["no-such-node"]) == []


# --- what a pivot leaves behind --------------------------------------------------------------


def test_what_a_shallow_pivot_replaces(pivoted: Graph) -> None:
    assert pivoted.replaced_by_pivot("top", whole_chain=False) == ["top"]
    assert pivoted.replaced_by_pivot("snap", whole_chain=False) == ["snap", "snap-file"]


def test_what_a_full_pivot_replaces(pivoted: Graph) -> None:
    """Format before storage, overlay before backing: the order in which they can be deleted."""
    expected = ["top", "snap", "snap-file", "base", "base-file"]
    assert pivoted.replaced_by_pivot("top", whole_chain=True) == expected


def test_what_goes_by_itself_is_not_named(pivoted: Graph) -> None:
    drive = root_of(pivoted, "virtio0")
    assert pivoted.replaced_by_pivot(drive, whole_chain=True) == []
    assert pivoted.replaced_by_pivot("no-such-node", whole_chain=True) == []


def test_a_node_that_came_between_two_queries_is_left_out(
    recorded: dict[str, dict[str, Any]],
) -> None:
    replies = dict(recorded["idle"])
    replies["query-named-block-nodes"] = [
        node for node in replies["query-named-block-nodes"] if node["node-name"] != "snap"
    ]
    found = parse(replies)
    assert found.nodes["top"].child("backing") == ""
    assert [image.name for image in found.chain("cor")] == ["top"]
