# SPDX-License-Identifier: MIT
"""Against the real schemas of four QEMUs."""

from __future__ import annotations

from typing import Any

import pytest

from qmpmirror.errors import Unsupported
from qmpmirror.schema import Schema

ALL = frozenset({"5.2", "7.2", "10.0", "11.1"})
FROM_7 = ALL - {"5.2"}
FROM_10 = FROM_7 - {"7.2"}
ONLY_11 = frozenset({"11.1"})
NONE: frozenset[str] = frozenset()


def having(schemas: dict[str, Schema], method: str, *what: str) -> set[str]:
    """The versions for which a question is answered with yes."""
    return {version for version, schema in schemas.items() if getattr(schema, method)(*what)}


@pytest.mark.parametrize(
    ("command", "versions"),
    [
        ("blockdev-mirror", ALL),
        ("drive-mirror", ALL),
        ("job-complete", ALL),
        ("job-cancel", ALL),
        ("job-dismiss", ALL),
        ("job-finalize", ALL),
        ("query-jobs", ALL),
        ("block-job-cancel", ALL),
        ("block-job-set-speed", ALL),
        ("block-job-pause", ALL),
        ("blockdev-create", ALL),
        ("block-export-add", ALL),
        ("nbd-server-add", ALL),
        ("x-debug-query-block-graph", ALL),
        ("x-blockdev-reopen", frozenset({"5.2"})),
        ("blockdev-reopen", FROM_7),
        ("yank", FROM_7),
        ("block-job-change", FROM_10),
        ("blockdev-set-active", FROM_10),
        ("job-set-speed", NONE),
        ("no-such-command", NONE),
        ("JOB_STATUS_CHANGE", NONE),
        ("MirrorSyncMode", NONE),
        ("1", NONE),
        ("", NONE),
    ],
)
def test_which_qemu_has_a_command(
    schemas: dict[str, Schema], command: str, versions: frozenset[str]
) -> None:
    assert having(schemas, "has_command", command) == versions


@pytest.mark.parametrize(
    ("command", "argument", "versions"),
    [
        ("blockdev-mirror", "job-id", ALL),
        ("blockdev-mirror", "granularity", ALL),
        ("blockdev-mirror", "buf-size", ALL),
        ("blockdev-mirror", "replaces", ALL),
        ("blockdev-mirror", "filter-node-name", ALL),
        ("blockdev-mirror", "copy-mode", ALL),
        ("blockdev-mirror", "auto-finalize", ALL),
        ("blockdev-mirror", "auto-dismiss", ALL),
        ("blockdev-mirror", "target-is-zero", ONLY_11),
        ("blockdev-mirror", "unmap", NONE),
        ("blockdev-mirror", "node-name", NONE),
        ("blockdev-mirror", "bitmap", NONE),
        ("drive-mirror", "node-name", ALL),
        ("drive-mirror", "unmap", ALL),
        ("drive-mirror", "copy-mode", ALL),
        ("drive-mirror", "target-is-zero", NONE),
        ("drive-mirror", "filter-node-name", NONE),
        ("query-named-block-nodes", "flat", ALL),
        ("query-block", "flat", ONLY_11),
        ("block-job-cancel", "force", ALL),
        ("blockdev-reopen", "options", FROM_7),
        ("blockdev-backup", "discard-source", FROM_10),
        ("blockdev-backup", "on-cbw-error", ONLY_11),
        ("block-job-change", "id", FROM_10),
        ("query-jobs", "id", NONE),
        ("no-such-command", "id", NONE),
        ("BLOCK_JOB_READY", "type", NONE),
    ],
)
def test_which_qemu_has_an_argument(
    schemas: dict[str, Schema], command: str, argument: str, versions: frozenset[str]
) -> None:
    assert having(schemas, "has_argument", command, argument) == versions


@pytest.mark.parametrize(
    ("command", "versions"),
    [
        ("block-job-pause", ONLY_11),
        ("block-job-resume", ONLY_11),
        ("block-job-complete", ONLY_11),
        ("block-job-dismiss", ONLY_11),
        ("block-job-finalize", ONLY_11),
        ("block-job-cancel", NONE),
        ("block-job-change", NONE),
        ("block-job-set-speed", NONE),
        ("drive-mirror", NONE),
        ("drive-backup", FROM_7),
        ("nbd-server-add", ALL),
        ("no-such-command", NONE),
    ],
)
def test_which_qemu_deprecates_a_command(
    schemas: dict[str, Schema], command: str, versions: frozenset[str]
) -> None:
    assert having(schemas, "is_deprecated", command) == versions


@pytest.mark.parametrize(
    ("command", "feature", "versions"),
    [
        ("blockdev-snapshot", "allow-write-only-overlay", ALL),
        ("x-debug-query-block-graph", "unstable", FROM_7),
        ("blockdev-mirror", "allow-write-only-overlay", NONE),
        ("no-such-command", "unstable", NONE),
    ],
)
def test_which_qemu_has_a_feature(
    schemas: dict[str, Schema], command: str, feature: str, versions: frozenset[str]
) -> None:
    assert having(schemas, "has_feature", command, feature) == versions


@pytest.mark.parametrize(
    ("command", "argument", "values"),
    [
        ("blockdev-mirror", "copy-mode", {"background", "write-blocking"}),
        ("blockdev-mirror", "sync", {"top", "full", "none", "incremental", "bitmap"}),
        ("drive-mirror", "mode", {"existing", "absolute-paths"}),
        (
            "blockdev-mirror",
            "on-target-error",
            {"report", "ignore", "enospc", "stop", "auto"},
        ),
        ("blockdev-mirror", "speed", set()),
        ("blockdev-mirror", "no-such-argument", set()),
        ("no-such-command", "sync", set()),
    ],
)
def test_the_values_of_an_argument(
    schema: Schema, command: str, argument: str, values: set[str]
) -> None:
    assert schema.values(command, argument) == values


@pytest.mark.parametrize(
    ("driver", "versions"),
    [
        ("qcow2", ALL),
        ("throttle", ALL),
        ("gluster", ALL - ONLY_11),
        ("copy-before-write", FROM_7),
        ("no-such-driver", NONE),
    ],
)
def test_which_qemu_has_a_driver(
    schemas: dict[str, Schema], driver: str, versions: frozenset[str]
) -> None:
    having_it = {v for v, schema in schemas.items() if driver in schema.values(*ADD_DRIVER)}
    assert having_it == versions


ADD_DRIVER = ("blockdev-add", "driver")
CREATABLE = {"file", "luks", "nfs", "parallels", "qcow", "qcow2", "qed", "rbd", "ssh", "vdi"} | {
    "vhdx",
    "vmdk",
    "vpc",
}


def test_only_what_can_create_images_is_creatable(version: str, schema: Schema) -> None:
    """The schema has a branch for each driver, empty for those that cannot."""
    removed = {"5.2": {"gluster", "sheepdog"}, "11.1": set()}.get(version, {"gluster"})
    assert schema.creatable_drivers() == CREATABLE | removed


@pytest.mark.parametrize(
    ("driver", "option", "has"),
    [
        ("qcow2", "backing-fmt", True),
        ("qcow2", "backing-file", True),
        ("qcow2", "extended-l2", True),
        ("qcow2", "cluster-size", True),
        ("qcow2", "subformat", False),
        ("vmdk", "backing-fmt", False),
        ("vmdk", "backing-file", True),
        ("qed", "backing-fmt", True),
        ("qcow", "backing-fmt", False),
        ("throttle", "size", False),
        ("no-such-driver", "size", False),
    ],
)
def test_the_options_of_creation(schema: Schema, driver: str, option: str, has: bool) -> None:
    assert schema.has_creation_option(driver, option) is has


def test_a_qemu_without_creation() -> None:
    schema = Schema.parse([])
    assert schema.creatable_drivers() == frozenset()
    assert not schema.has_creation_option("qcow2", "size")


# --- checking a whole command ----------------------------------------------------------------

MIRROR = {"job-id": "j", "device": "d", "target": "t", "sync": "full"}
FILE = {"driver": "file", "filename": "/vm/a"}
QCOW2 = {"driver": "qcow2", "node-name": "n", "file": "storage"}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("query-jobs", {}),
    ("stop", {}),
    ("blockdev-mirror", MIRROR),
    ("blockdev-mirror", {**MIRROR, "speed": 0, "auto-dismiss": False, "copy-mode": "background"}),
    ("blockdev-mirror", {**MIRROR, "speed": 2**63 - 1}),
    ("block-job-cancel", {"device": "j", "force": False}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n", "read-zeroes": True}),
    ("blockdev-add", QCOW2),
    ("blockdev-add", {**QCOW2, "backing": None}),
    ("blockdev-add", {**QCOW2, "backing": "base"}),
    ("blockdev-add", {**QCOW2, "backing": {**QCOW2, "file": FILE}}),
    ("blockdev-add", {**QCOW2, "file": {"driver": "raw", "offset": 512, "file": FILE}}),
    ("blockdev-add", {**QCOW2, "cache": {"direct": True, "no-flush": False}}),
    ("blockdev-add", {**QCOW2, "overlap-check": "all"}),
    ("blockdev-add", {**QCOW2, "overlap-check": {"template": "all", "snapshot-table": False}}),
    (
        "blockdev-add",
        {"driver": "quorum", "children": ["a", FILE, "b"], "vote-threshold": 2},
    ),
    (
        "blockdev-add",
        {
            "driver": "nbd",
            "server": {"type": "inet", "host": "localhost", "port": "10809"},
            "export": "e",
        },
    ),
    ("blockdev-add", {"driver": "nbd", "server": {"type": "unix", "path": "/vm/nbd"}}),
    (
        "blockdev-create",
        {"job-id": "c", "options": {"driver": "file", "filename": "/vm/a", "size": 0}},
    ),
    (
        "blockdev-create",
        {
            "job-id": "c",
            "options": {
                "driver": "qcow2",
                "file": "storage",
                "size": 1 << 30,
                "backing-file": "/vm/base.qcow2",
                "backing-fmt": "qcow2",
                "cluster-size": 65536,
                "extended-l2": True,
            },
        },
    ),
    (
        "transaction",
        {
            "actions": [
                {
                    "type": "block-dirty-bitmap-add",
                    "data": {"node": "n", "name": "b", "granularity": 65536},
                },
                {"type": "abort", "data": {}},
            ]
        },
    ),
    ("qom-set", {"path": "/", "property": "p", "value": {"anything": [1, None, "x"]}}),
]


@pytest.mark.parametrize(("command", "arguments"), GOOD)
def test_what_qemu_takes(schema: Schema, command: str, arguments: dict[str, Any]) -> None:
    schema.check(command, arguments)


NO = "this QEMU's {command} has no argument {argument}"
NEEDS = "this QEMU's {command} needs an argument {argument}"
BAD = "this QEMU's {command} does not accept {value!r} for {argument}"

REFUSED: list[tuple[str, dict[str, Any], str, str, object]] = [
    # what is not there
    ("blockdev-mirror", {**MIRROR, "bitmap": "b"}, NO, "bitmap", None),
    ("query-jobs", {"id": "j"}, NO, "id", None),
    ("blockdev-add", {**QCOW2, "filename": "/vm/a"}, NO, "filename", None),
    ("blockdev-add", {**QCOW2, "file": {**FILE, "size": 1}}, NO, "file.size", None),
    ("blockdev-add", {**QCOW2, "cache": {"dirct": True}}, NO, "cache.dirct", None),
    (
        "blockdev-add",
        {**QCOW2, "backing": {**QCOW2, "file": {**FILE, "oops": 1}}},
        NO,
        "backing.file.oops",
        None,
    ),
    # what is missing
    ("blockdev-mirror", {"device": "d", "sync": "full"}, NEEDS, "target", None),
    ("blockdev-add", {}, NEEDS, "driver", None),
    ("blockdev-add", {"driver": "qcow2"}, NEEDS, "file", None),
    ("blockdev-add", {**QCOW2, "file": {"driver": "file"}}, NEEDS, "file.filename", None),
    (
        "blockdev-create",
        {"job-id": "c", "options": {"driver": "qcow2", "file": "f"}},
        NEEDS,
        "options.size",
        None,
    ),
    # wrong values
    ("blockdev-mirror", {**MIRROR, "sync": "fully"}, BAD, "sync", "fully"),
    ("blockdev-mirror", {**MIRROR, "sync": ["top"]}, BAD, "sync", ["top"]),
    ("blockdev-mirror", {**MIRROR, "sync": None}, BAD, "sync", None),
    ("blockdev-mirror", {**MIRROR, "device": 1}, BAD, "device", 1),
    ("blockdev-mirror", {**MIRROR, "speed": "1"}, BAD, "speed", "1"),
    ("blockdev-mirror", {**MIRROR, "speed": 1.5}, BAD, "speed", 1.5),
    ("blockdev-mirror", {**MIRROR, "speed": True}, BAD, "speed", True),
    ("blockdev-mirror", {**MIRROR, "speed": None}, BAD, "speed", None),
    ("blockdev-mirror", {**MIRROR, "auto-dismiss": 0}, BAD, "auto-dismiss", 0),
    ("blockdev-mirror", {**MIRROR, "auto-dismiss": "off"}, BAD, "auto-dismiss", "off"),
    ("blockdev-add", {**QCOW2, "driver": "qcow3"}, BAD, "driver", "qcow3"),
    ("blockdev-add", {**QCOW2, "backing": 5}, BAD, "backing", 5),
    ("blockdev-add", {**QCOW2, "file": None}, BAD, "file", None),
    ("blockdev-add", {**QCOW2, "cache": True}, BAD, "cache", True),
    ("blockdev-add", {**QCOW2, "file": {**FILE, "filename": 1}}, BAD, "file.filename", 1),
    ("transaction", {"actions": {"type": "abort"}}, BAD, "actions", {"type": "abort"}),
    ("transaction", {"actions": ["abort"]}, BAD, "actions", "abort"),
    (
        "transaction",
        {"actions": [{"type": "blockdev-mirror", "data": MIRROR}]},
        BAD,
        "actions.type",
        "blockdev-mirror",
    ),
]


@pytest.mark.parametrize(("command", "arguments", "sentence", "argument", "value"), REFUSED)
def test_what_qemu_refuses(
    schema: Schema,
    command: str,
    arguments: dict[str, Any],
    *,
    sentence: str,
    argument: str,
    value: object,
) -> None:
    with pytest.raises(Unsupported) as caught:
        schema.check(command, arguments)
    assert str(caught.value) == sentence.format(command=command, argument=argument, value=value)
    assert (caught.value.command, caught.value.argument) == (command, argument)


def test_an_unknown_command(schema: Schema) -> None:
    with pytest.raises(Unsupported, match=r"^this QEMU has no command blockdev-mirrors$") as caught:
        schema.check("blockdev-mirrors", MIRROR)
    assert (caught.value.command, caught.value.argument) == ("blockdev-mirrors", "")


def test_an_argument_that_only_new_qemus_have(version: str, schema: Schema) -> None:
    arguments = {**MIRROR, "target-is-zero": True}
    if version == "11.1":
        schema.check("blockdev-mirror", arguments)
    else:
        with pytest.raises(Unsupported, match=r"blockdev-mirror has no argument target-is-zero$"):
            schema.check("blockdev-mirror", arguments)


@pytest.mark.parametrize("version", ["10.0", "11.1"])
def test_a_union_in_a_branch_of_a_union(version: str, schemas: dict[str, Schema]) -> None:
    address = {"transport": "socket", "type": "unix", "path": "/vm/sock"}
    channel = {"channel-type": "main", "addr": address}
    schemas[version].check("migrate", {"channels": [channel]})
    address["host"] = "localhost"
    with pytest.raises(Unsupported, match=r"has no argument channels\.addr\.host$"):
        schemas[version].check("migrate", {"channels": [channel]})


def test_a_change_of_the_copy_mode(version: str, schema: Schema) -> None:
    change = {"id": "j", "type": "mirror", "copy-mode": "write-blocking"}
    if version in FROM_10:
        schema.check("block-job-change", change)
        with pytest.raises(Unsupported, match=r"does not accept 'synchronous' for copy-mode$"):
            schema.check("block-job-change", {**change, "copy-mode": "synchronous"})
    else:
        with pytest.raises(Unsupported, match=r"has no command block-job-change$"):
            schema.check("block-job-change", change)
