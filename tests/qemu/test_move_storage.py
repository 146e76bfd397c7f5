# SPDX-License-Identifier: MIT
"""move-storage: a live disk with its whole chain goes to another folder, its shape kept."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from qmpmirror import Phase, Way, errors
from qmpmirror.operations import backing_files, programs
from qmpmirror.operations.move import Move
from tests.qemu.chained import WAYS, Chain, make
from tests.qemu.program import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.qemu.conftest import Boot, Cli, Connect, Layers, Unchanged

SLOW = ("1", "--bytes")


@attrs.frozen
class Scene:
    """A disk with a chain of four images, and the folder that it is moved to."""

    chain: Chain
    layers: Layers
    folder: Path

    def words(self, *more: str) -> list[str]:
        return ["move-storage", str(self.chain.vm.qmp), "vda", str(self.folder), *more]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """The command as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "qmpmirror", *self.words(*more)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def there(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def check_moved(self) -> None:
        """The guest runs on the same chain in the new folder, and nothing else is there."""
        names = self.chain.paths(3, 2, 1, 0)
        assert self.there() == sorted(names)
        assert self.layers.chain(self.folder / names[0]) == [str(self.folder / n) for n in names]
        assert self.chain.active == names
        assert not any(self.chain.is_open(number) for number in range(4))
        self.chain.guest.scribble()
        self.chain.guest.check()
        self.chain.vm.execute("stop")
        content = self.layers.content(self.folder / names[0])
        assert content == bytes(self.chain.guest.expected)
        assert self.chain.vm.execute("query-jobs") == []

    def check_untouched(self, *, there: list[str] | None = None) -> None:
        """Nothing has happened, and nothing is left."""
        assert self.there() == (there or [])
        assert self.chain.is_open(3)
        self.chain.guest.scribble()
        self.chain.guest.check()
        self.chain.check_clean()


@pytest.fixture
def scene(boot: Boot, layers: Layers, request: pytest.FixtureRequest) -> Scene:
    folder = layers.folder / "new"
    folder.mkdir()
    return Scene(make(boot, layers, getattr(request, "param", "blockdev")), layers, folder)


every = pytest.mark.parametrize("scene", WAYS, indirect=True)


@every
def test_the_chain_is_moved_as_it_is(scene: Scene, cli: Cli) -> None:
    scene.chain.guest.scribble()
    run = cli(*scene.words())
    assert (run.returncode, run.stdout) == (0, "Successfully moved\n"), run.stderr
    assert str(scene.folder / "snap3.qcow2") in run.stderr
    assert f"this guest does not need any more: {scene.chain.images[3]}, " in run.stderr
    scene.check_moved()


@every
async def test_images_that_are_there_already_are_used(
    scene: Scene, connect: Connect, layers: Layers
) -> None:
    base = scene.folder / layers.base.name
    shutil.copy(layers.base, base)
    before = os.stat(base)
    async with connect(scene.chain.vm) as machine:
        move = await machine.move_storage("vd0", scene.folder)
        assert [file.path for file in move.files] == [
            str(scene.folder / name) for name in scene.chain.paths(2, 1)
        ]
        assert await move.ready()
        result = await move.pivot()
    assert result.outcome is Phase.PIVOTED
    assert str(layers.base) in result.notes[-1]
    after = os.stat(base)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    scene.check_moved()


def test_progress_counts_all_images(scene: Scene, cli: Cli) -> None:
    run = cli(*scene.words("--json"))
    started, *reports, result = map(json.loads, run.stdout.splitlines())
    assert started["destination"] == str(scene.folder / "snap3.qcow2")
    assert started["brought"] == started["backing_files"]
    assert len(started["brought"]) == 3
    told = [report for report in reports if report["event"] == "progress"]
    sizes = sum(os.stat(path).st_blocks * 512 for path in scene.chain.images[:3])
    assert told[-1]["length"] >= sizes
    assert told[-1]["percent"] == 100
    assert (result["outcome"], result["exit"]) == ("pivoted", 0)
    assert result["launch"]
    scene.check_moved()


def test_what_is_in_the_way_is_refused(
    scene: Scene, cli: Cli, layers: Layers, unchanged: Unchanged
) -> None:
    base, top = scene.folder / "base.qcow2", scene.folder / "snap3.qcow2"
    shutil.copy(layers.base, base)
    layers.images.io(base, "write -P 9 0 64k")
    for words, why in (
        (scene.words(), f"{base} exists already and does not hold what {layers.base} holds"),
        ([*scene.words()[:3], str(scene.folder / "no")], "there is no folder"),
    ):
        with unchanged(scene.chain.vm, layers.folder):
            run = cli(*words)
            assert (run.returncode, run.stdout) == (4, ""), run.stderr
            assert why in run.stderr
    base.unlink()
    shutil.copy(layers.snap1, scene.folder / "snap1.qcow2")
    with unchanged(scene.chain.vm, layers.folder):
        run = cli(*scene.words())
        assert run.returncode == 4
        assert "exists already, and the image below it does not" in run.stderr
    shutil.copy(layers.base, base)
    with unchanged(scene.chain.vm, layers.folder):
        run = cli(*scene.words())
        assert run.returncode == 4
        assert f"stands on {layers.base}, not on {base}" in run.stderr
    (scene.folder / "snap1.qcow2").unlink()
    shutil.copy(layers.base, top)
    with unchanged(scene.chain.vm, layers.folder):
        run = cli(*scene.words())
        assert run.returncode == 4
        assert f"{top} exists already (if a move has left it" in run.stderr
    scene.check_untouched(there=["base.qcow2", "snap3.qcow2"])


def test_a_disk_that_is_there_need_not_be_moved(
    scene: Scene, cli: Cli, layers: Layers, unchanged: Unchanged
) -> None:
    assert cli(*scene.words()).returncode == 0
    for folder in (scene.folder, layers.folder / "." / "new"):
        with unchanged(scene.chain.vm, layers.folder):
            run = cli("move-storage", scene.chain.vm.qmp, "vda", folder)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout == f"Nothing to move: vda is in {folder} already\n"
    scene.check_moved()


def test_mode_and_owner_are_those_of_the_old_images(scene: Scene, cli: Cli) -> None:
    modes = dict(zip(scene.chain.images, (0o444, 0o640, 0o666, 0o604), strict=True))
    for path, mode in modes.items():
        path.chmod(mode)
        os.chown(path, 1, 2)
    assert cli(*scene.words()).returncode == 0
    for path, mode in modes.items():
        status = os.stat(scene.folder / path.name)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 1, 2)


def test_only_the_active_image_is_there(scene: Scene, cli: Cli, unchanged: Unchanged) -> None:
    over = scene.folder / "over.qcow2"
    spec = f"vda,file={over}"
    cli("snapshot-create-as", scene.chain.vm.qmp, "s", "--disk-only", "--diskspec", spec)
    with unchanged(scene.chain.vm, scene.folder):
        run = cli(*scene.words())
    assert (run.returncode, run.stdout) == (4, "")
    assert f"the active image of disk 'vda' is in {scene.folder} already" in run.stderr


def test_a_disk_without_backing_file_is_moved(boot: Boot, cli: Cli, layers: Layers) -> None:
    folder, raw = layers.folder / "new", layers.folder / "disk.raw"
    folder.mkdir()
    raw.write_bytes(layers.content(layers.snap2))
    disk = f"if=none,id=d0,format=raw,file={raw}"
    vm = boot("-drive", disk, "-device", "virtio-blk-pci,drive=d0,id=vd0")
    run = cli("move-storage", vm.qmp, "vda", folder)
    assert (run.returncode, run.stdout) == (0, "Successfully moved\n"), run.stderr
    assert (folder / "disk.raw").read_bytes() == raw.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["disk.raw"]
    assert vm.execute("query-jobs") == []


@pytest.mark.parametrize("how", ["data file", "encrypted", "same names"])
def test_chains_that_cannot_be_moved_are_refused(
    boot: Boot, cli: Cli, layers: Layers, unchanged: Unchanged, tmp_path: Path, how: str
) -> None:
    folder, top = layers.folder / "new", layers.folder / "top.qcow2"
    folder.mkdir()
    extra: list[str] = []
    if how == "data file":
        base = layers.folder / "with-data.qcow2"
        layers.images.create(base, "8M", options={"data_file": layers.folder / "data"})
    elif how == "same names":
        (tmp_path / "other").mkdir()
        base = layers.images.create(tmp_path / "other" / "top.qcow2", "8M")
    else:
        base = layers.folder / "secret.qcow2"
        (layers.folder / "key").write_text("secret")
        words = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        secret = ["--object", f"secret,id=s,file={layers.folder / 'key'}"]
        tool = str(layers.images.qemu).replace("qemu-system-x86_64", "qemu-img")
        create = [tool, "create", "-q", *secret, "-f", "qcow2", "-o", words, str(base), "8M"]
        subprocess.run(create, check=True, stdin=subprocess.DEVNULL)
        extra = ["-object", f"secret,id=s,file={layers.folder / 'key'}"]
    backing: dict[str, Any] = {"driver": "qcow2", "node-name": "base"}
    backing["file"] = {"driver": "file", "filename": str(base)}
    if extra:
        backing["encrypt"] = {"format": "luks", "key-secret": "s"}
    layers.images.create(top, "8M")
    node = {"driver": "qcow2", "node-name": "top", "backing": backing}
    node["file"] = {"driver": "file", "filename": str(top)}
    vm = boot(*extra, "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=top,id=vd0")
    with unchanged(vm, layers.folder):
        run = cli("move-storage", vm.qmp, "vda", folder)
    why = {
        "data file": "is no plain file",
        "encrypted": "is encrypted",
        "same names": "two images of the chain are called top.qcow2",
    }
    assert (run.returncode, run.stdout) == (4, ""), run.stderr
    assert why[how] in run.stderr


async def test_a_file_that_cannot_be_copied_undoes_all(
    scene: Scene, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = programs.run

    async def full(program: str, *words: str, **more: Any) -> tuple[int, str]:
        if program == "cp" and words[-1].endswith(".part") and "snap1" in words[-1]:
            return 1, "cp: error writing: No space left on device"
        code, said = await run(program, *words, **more)
        return code, said

    monkeypatch.setattr("qmpmirror.operations.programs.run", full)
    async with connect(scene.chain.vm) as machine:
        move = await machine.move_storage("vd0", scene.folder)
        with pytest.raises(errors.JobFailed, match=r"No space left on device.*the guest runs on"):
            await move.ready()
    scene.check_untouched()


async def test_something_that_appears_in_the_way_undoes_all(scene: Scene, connect: Connect) -> None:
    async with connect(scene.chain.vm) as machine:
        move = await machine.move_storage("vd0", scene.folder)
        assert await move.ready()
        # What appears under a name that was free is somebody else's from then on.
        (scene.folder / "snap1.qcow2").write_text("not ours")
        with pytest.raises(errors.JobFailed, match="was not there before"):
            await move.pivot()
    scene.check_untouched(there=["snap1.qcow2"])
    assert (scene.folder / "snap1.qcow2").read_text() == "not ours"


async def test_a_file_that_comes_before_ours_is_not_taken_for_it(
    scene: Scene, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = programs.run

    async def faster(program: str, *words: str, **more: Any) -> tuple[int, str]:
        if program == "cp":
            (scene.folder / "base.qcow2").write_text("not ours")
        code, said = await run(program, *words, **more)
        return code, said

    monkeypatch.setattr("qmpmirror.operations.programs.run", faster)
    async with connect(scene.chain.vm) as machine:
        move = await machine.move_storage("vd0", scene.folder)
        assert await move.ready()
        with pytest.raises(errors.JobFailed, match="was not there before"):
            await move.pivot()
    scene.check_untouched(there=["base.qcow2"])


async def test_it_cannot_be_finished_without_a_pivot(scene: Scene, connect: Connect) -> None:
    async with connect(scene.chain.vm) as machine:
        move = await machine.move_storage("vd0", scene.folder)
        assert await move.ready()
        with pytest.raises(errors.JobError, match="can only be ended by a pivot or an abort"):
            await move.finish()
        result = await move.abort()
        assert (result.outcome, result.removed) == (Phase.ABORTED, True)
    scene.check_untouched()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_it_copies(scene: Scene, cli: Cli, number: signal.Signals) -> None:
    program = scene.start(*SLOW)
    # Its backing files are there; the active image takes for ever.
    until(lambda: len([name for name in scene.there() if name.endswith(".copied")]) == 3)
    program.send_signal(number)
    program.wait(30)
    if number is signal.SIGKILL:
        assert "left running" in cli("recover", scene.chain.vm.qmp).stdout
        run = cli("recover", scene.chain.vm.qmp, "--undo")
        assert "aborted: the incomplete copy was removed" in run.stdout
    scene.check_untouched()


@pytest.mark.parametrize("way", ["again", "recover", "blockjob"])
def test_a_move_whose_client_died_is_ended_by_another(scene: Scene, cli: Cli, way: str) -> None:
    program = scene.start(*SLOW)
    until(lambda: any(name.endswith(".copied") for name in scene.there()))
    program.kill()
    program.wait(30)
    socket = str(scene.chain.vm.qmp)
    elsewhere = scene.layers.folder / "elsewhere"
    elsewhere.mkdir()
    run = cli("move-storage", socket, "vda", elsewhere)
    assert (run.returncode, "already has a block job" in run.stderr) == (4, True)
    cli("blockjob", socket, "vda", "--bandwidth", "0")
    if way == "again":
        run = cli(*scene.words())
        assert (run.returncode, run.stdout) == (0, "Successfully moved\n"), run.stderr
    elif way == "recover":
        assert ": pivoted" in cli("recover", socket, "--finish").stdout
    else:
        until(lambda: "mirroring" in cli("blockjob", socket, "vda").stdout)
        run = cli("blockjob", socket, "vda", "--pivot")
        assert run.returncode == 0, run.stderr
    scene.check_moved()


async def test_a_client_that_dies_between_the_files_and_the_pivot(
    scene: Scene, connect: Connect
) -> None:
    for way in (Way.UNDO, Way.FINISH):
        async with connect(scene.chain.vm) as machine:
            move = await machine.move_storage("vd0", scene.folder)
            assert await move.ready()
            backing_files.publish(move.files, move.name.run)
        assert set(scene.chain.paths(3, 2, 1, 0)) <= set(scene.there())
        async with connect(scene.chain.vm) as machine:
            (found,) = await machine.recover(way)
            assert found.what == "move"
        if way is Way.UNDO:
            scene.check_untouched()
    scene.check_moved()


@every
async def test_a_client_that_dies_after_the_pivot(
    scene: Scene, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        """As after SIGKILL: nothing is cleaned up."""

    async def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("qmpmirror.operations.twophase.conclude", die)
        async with connect(scene.chain.vm) as machine:
            move = await machine.move_storage("vd0", scene.folder)
            assert await move.ready()
            with pytest.raises(Died):
                await move.pivot()
    async with connect(scene.chain.vm) as machine:
        (found,) = await machine.recover()
        assert (found.what, found.action) == ("move", "pivoted")
    scene.check_moved()


async def test_two_at_once_do_not_write_to_the_same_file(scene: Scene, connect: Connect) -> None:
    async with connect(scene.chain.vm) as machine:
        one = await machine.move_storage("vd0", scene.folder)
        other = await machine.move_storage("vd0", scene.folder)
        assert isinstance(other, Move)
        assert one.id == other.id
        assert all(await asyncio.gather(one.ready(), other.ready()))
        assert (await one.pivot()).outcome is Phase.PIVOTED
        assert (await other.pivot()).outcome is Phase.PIVOTED
    scene.check_moved()


@every
async def test_it_can_be_moved_again(scene: Scene, connect: Connect, layers: Layers) -> None:
    third = layers.folder / "third"
    third.mkdir()
    async with connect(scene.chain.vm) as machine:
        for folder in (scene.folder, third):
            move = await machine.move_storage("vd0", folder)
            assert await move.ready()
            result = await move.pivot()
            assert result.left == ()
            scene.chain.guest.scribble()
    attrs.evolve(scene, folder=third).check_moved()
    assert not any(
        "new/" in str(node) for node in scene.chain.vm.execute("query-named-block-nodes")
    )
