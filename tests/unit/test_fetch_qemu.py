# SPDX-License-Identifier: MIT
"""The parts of `scripts/fetch-qemu` that need no network; its wrappers run, on a fake root."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch-qemu"
ARCHIVE = "http://archive.example/debian/"
# Stands in for the dynamic linker: shows what the wrapper handed to it, one word a line.
LINKER = '#!/bin/sh\nprintf "%s\\n" "$$" "$0" "$QEMU_MODULE_DIR" "$@"\n'


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("fetch_qemu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("fetch_qemu", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Lay out what Debian's packages unpack to, as far as the script looks at it."""
    root = tmp_path / "a place" / "root"
    modules = root / "usr/lib/x86_64-linux-gnu/qemu"
    for folder in (modules, root / "lib64", root / "usr/share/qemu", root / "usr/share/seabios"):
        folder.mkdir(parents=True)
    (modules / "block-ssh.so").touch()
    (root / "lib64/ld-linux-x86-64.so.2").write_text(LINKER, encoding="utf-8")
    (root / "lib64/ld-linux-x86-64.so.2").chmod(0o755)
    return root


def targets(*rows: tuple[str, str, str, str]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("rows", "archives"),
    [
        pytest.param([(ARCHIVE, "Debian", "bookworm", "main")], [ARCHIVE], id="debian"),
        pytest.param([(ARCHIVE, "$(LABEL)", "bookworm", "main")], [ARCHIVE], id="before-update"),
        pytest.param(
            [
                (ARCHIVE, "Debian", "bookworm", "main"),
                (ARCHIVE, "Debian", "bookworm-updates", "main"),
                ("http://other.example/debian/", "Debian", "trixie", "main"),
            ],
            [ARCHIVE, "http://other.example/debian/"],
            id="each-once-in-order",
        ),
        pytest.param([(ARCHIVE, "Debian", "bookworm", "contrib")], [], id="no-main"),
        pytest.param(
            [(ARCHIVE, "Debian-Security", "bookworm-security", "main")], [], id="security"
        ),
        pytest.param([(ARCHIVE, "$(LABEL)", "bookworm-security", "main")], [], id="new-security"),
        pytest.param([(ARCHIVE, "Ubuntu", "noble", "main")], [], id="ubuntu"),
        pytest.param([(ARCHIVE, "$(LABEL)", "noble", "main")], [], id="ubuntu-before-update"),
        pytest.param([(ARCHIVE, "Vendor", "bookworm", "main")], [], id="vendor-for-debian"),
    ],
)
def test_picks_debian_archives_from_apt(
    script: Any, rows: list[tuple[str, str, str, str]], archives: list[str]
) -> None:
    assert script.parse_sources(targets(*rows)) == archives


def test_survives_odd_lines_from_apt(script: Any) -> None:
    assert script.parse_sources("\nodd\n\t\n") == []


def test_asks_apt_again_when_it_has_no_index_yet(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: str, what: str) -> str:
        assert what
        known = any(word.endswith("ReleaseInfo=false") for word in command)
        return targets((ARCHIVE, "$(LABEL)", "sid", "main")) if known else ""

    monkeypatch.setattr(script, "run", run)
    assert script.debian_sources() == [ARCHIVE]


def test_without_a_debian_source_it_ends_with_4_and_one_sentence(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ubuntu = targets((ARCHIVE, "Ubuntu", "noble", "main"))
    monkeypatch.setattr(script, "run", lambda *_, what: ubuntu if what else "")
    assert script.main(["--dir", str(tmp_path), "bullseye", "sid"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no Debian source" in err


@pytest.mark.parametrize(
    ("word", "request_"),
    [
        ("bullseye", ("bullseye", "5.2")),
        ("sid", ("sid", "")),
        ("forky", ("forky", "")),
        ("5.2", ("bullseye", "5.2")),
        ("10.0", ("trixie", "10.0")),
        ("10.0.13", ("trixie", "10.0.13")),
        ("10.1", ("sid", "10.1")),
        ("1.0", ("sid", "1.0")),
    ],
)
def test_understands_suites_and_versions(script: Any, word: str, request_: tuple[str, str]) -> None:
    assert script.parse_request(word) == request_


@pytest.mark.parametrize("word", ["", "..", "../sid", "/sid", "Sid", "5", "5.2.0.1", "-x", "a b"])
def test_refuses_other_words(script: Any, word: str) -> None:
    with pytest.raises(script.FetchError, match="neither"):
        script.parse_request(word)


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("5.2.0", "", True),
        ("5.2.0", "5.2", True),
        ("5.2.0", "5.2.0", True),
        ("10.0.13", "10.0.1", False),
        ("11.1.3", "1.1", False),
        ("7.20.0", "7.2", False),
    ],
)
def test_versions_match_by_whole_numbers(
    script: Any, version: str, wanted: str, answer: bool
) -> None:
    assert script.matches(version, wanted) is answer


def test_reads_the_version(script: Any) -> None:
    told = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003"
    assert script.parse_version(told) == "7.2.22"
    with pytest.raises(script.FetchError, match="no QEMU version"):
        script.parse_version("error while loading shared libraries")


@pytest.mark.parametrize(
    ("said", "lenient"),
    [
        ("E: Release file for http://x/InRelease is expired (invalid since 17d 2h).", True),
        ("E: Release file for http://x/InRelease is not valid yet (invalid for 5h).", True),
        ("W: GPG error: x: couldn't be verified because: NO_PUBKEY 0E98404D386FA1D9", True),
        ("E: The repository 'http://x sid InRelease' is not signed.", True),
        ("E: The repository 'http://x nosuchsuite Release' does not have a Release file.", False),
        ("E: Failed to fetch http://x/InRelease  Temporary failure resolving 'x'", False),
    ],
)
def test_only_dates_and_keys_make_it_lenient(script: Any, said: str, lenient: bool) -> None:
    assert bool(re.search(script.UNCHECKED, said)) is lenient


def test_every_check_asks_for_a_signature(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("debian-archive-keyring.gpg", "debian-archive-removed-keys.pgp"):
        (keys / name).touch()
    apt = script.Apt(tmp_path / "apt", "bullseye")
    lines = []

    def run(*_command: str, what: str) -> str:
        lines.append(apt.sources.read_text(encoding="utf-8"))
        raise script.FetchError(f"{what}: the repository is not signed")

    monkeypatch.setattr(script, "KEYRINGS", keys)
    monkeypatch.setattr(script, "run", run)
    with pytest.raises(script.FetchError, match="bullseye: reading the index"):
        apt.update([ARCHIVE])
    strict = f"deb [signed-by={keys}/debian-archive-keyring.gpg] {ARCHIVE} bullseye main\n"
    retired = strict.replace("debian-archive-keyring.gpg", "debian-archive-removed-keys.pgp")
    assert lines == [strict, strict, retired]


@pytest.fixture
def wrapped(script: Any, root: Path) -> Path:
    """Make the wrappers beside the fake root, without trying them."""
    layout = script.find_layout(root)
    for tool in script.TOOLS:
        for folder, text in (("bin", script.wrapper_text(tool, layout)), ("libexec", LINKER)):
            path = root.parent / folder / tool
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)
    return root.parent


def words_of(wrapper: str | Path, *arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """Run a wrapper; return its pid and the words that reached the linker."""
    command = [wrapper, *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=30)
    return process.pid, out.splitlines()


@pytest.mark.parametrize("way", ["absolute", "relative", "link", "moved"])
def test_system_wrapper_finds_its_own_folder(wrapped: Path, tmp_path: Path, way: str) -> None:
    top, cwd = wrapped, tmp_path
    if way == "moved":
        top = wrapped.rename(tmp_path / "another place")
    wrapper: str | Path = top / "bin/qemu-system-x86_64"
    if way == "relative":
        wrapper, cwd = "./qemu-system-x86_64", top / "bin"
    elif way == "link":
        (tmp_path / "link").symlink_to(wrapper)
        wrapper = tmp_path / "link"
    pid, words = words_of(wrapper, "-name", "two words", "", cwd=cwd)
    libraries = f"{top}/root/usr/lib/x86_64-linux-gnu"
    assert words == [
        str(pid),  # exec: the process that was started is QEMU itself
        f"{top}/libexec/qemu-system-x86_64",
        f"{libraries}/qemu",
        *("--library-path", libraries),
        f"{top}/root/usr/bin/qemu-system-x86_64",
        *("-L", f"{top}/root/usr/share/qemu", "-L", f"{top}/root/usr/share/seabios"),
        *("-name", "two words", ""),
    ]


@pytest.mark.parametrize("tool", ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"])
def test_other_wrappers_have_no_firmware_option(wrapped: Path, tmp_path: Path, tool: str) -> None:
    _, words = words_of(wrapped / "bin" / tool, "--version", cwd=tmp_path)
    assert words[-2:] == [f"{wrapped}/root/usr/bin/{tool}", "--version"]
    assert words[2].endswith("/qemu")


def test_libraries_of_either_place_are_on_the_path(script: Any, root: Path) -> None:
    for folder in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"):
        (root / folder).mkdir(parents=True)
    there = "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"
    assert script.find_layout(root)["libraries"] == ":".join(f"$root/{path}" for path in there)


def test_prune_keeps_qemu_and_turns_links_inwards(script: Any, root: Path) -> None:
    binaries = root / "usr/bin"
    for folder in (binaries, root / "etc", root / "usr/share/doc", root / "lib/x86_64-linux-gnu"):
        folder.mkdir(parents=True)
    for name in ("qemu-img", "perl"):
        (binaries / name).touch()
    (root / "lib/x86_64-linux-gnu/ld-2.31.so").write_text("linker", encoding="utf-8")
    linker = root / "lib64/ld-linux-x86-64.so.2"
    linker.unlink()
    linker.symlink_to("/lib/x86_64-linux-gnu/ld-2.31.so")
    (root / "usr/share/menu").symlink_to("/etc")
    script.prune(root)
    assert sorted(os.listdir(root)) == ["lib", "lib64", "usr"]
    assert os.listdir(binaries) == ["qemu-img"]
    assert sorted(os.listdir(root / "usr/share")) == ["qemu", "seabios"]
    assert os.readlink(linker) == "../lib/x86_64-linux-gnu/ld-2.31.so"
    assert linker.read_text(encoding="utf-8") == "linker"


@pytest.fixture
def home(script: Any, tmp_path: Path) -> Path:
    """Make the folder of a fetched suite, as far as it is read again."""
    home = tmp_path / "sid"
    home.mkdir()
    (home / "package").write_text(f"1:11.1.3+ds-1 layout {script.LAYOUT}\n", encoding="utf-8")
    (home / "version").write_text("11.1.3\n", encoding="utf-8")
    return home


def make_old(home: Path) -> None:
    then = time.time() - 2 * 24 * 3600
    os.utime(home / "version", (then, then))


def unreachable(_directory: Path, suite: str) -> None:
    raise AssertionError(f"asked for {suite}")


def test_a_fresh_folder_is_taken_without_asking(
    script: Any, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "renew", unreachable)
    assert script.main(["--dir", str(home.parent), "sid", "11.1"]) == 0
    assert capsys.readouterr().out == 2 * f"11.1.3\t{home}/bin/qemu-system-x86_64\n"


def test_another_layout_is_made_anew(script: Any, home: Path) -> None:
    assert script.is_fresh(home)
    (home / "package").write_text("1:11.1.3+ds-1 layout 0\n", encoding="utf-8")
    assert not script.is_fresh(home)


def test_an_old_folder_stays_when_its_suite_cannot_be_asked(
    script: Any, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def renew(_directory: Path, suite: str) -> None:
        raise script.FetchError(f"{suite}: no network")

    make_old(home)
    monkeypatch.setattr(script, "renew", renew)
    assert script.main(["--dir", str(home.parent), "sid"]) == 0
    assert "sid: no network" in capsys.readouterr().err
    assert script.main(["--dir", str(home.parent), "trixie", "sid"]) == 1
    out, err = capsys.readouterr()
    assert "trixie: no network" in err
    assert out.startswith("11.1.3\t")  # the others are still fetched


def test_a_suite_of_another_version_is_refused(
    script: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--dir", str(home.parent), "11.2"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "sid has QEMU 11.1.3, not 11.2" in err


def test_list_shows_whole_folders_only_and_changes_nothing(
    script: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.parent / ".new-x" / "version").parent.mkdir()
    (home.parent / ".new-x" / "version").write_text("5.2.0\n", encoding="utf-8")
    (home.parent / "half").mkdir()
    before = sorted(home.parent.rglob("*"))
    assert script.main(["--dir", str(home.parent), "--list"]) == 0
    assert capsys.readouterr().out == f"11.1.3\t{home}/bin/qemu-system-x86_64\n"
    assert sorted(home.parent.rglob("*")) == before


def test_what_a_killed_run_left_is_cleared_away(script: Any, home: Path) -> None:
    (home.parent / ".new-killed" / "root").mkdir(parents=True)
    with script.locked(home.parent):
        assert sorted(path.name for path in home.parent.iterdir()) == [".lock", "sid"]


def test_refuses_a_folder_that_the_linker_cannot_take(script: Any, tmp_path: Path) -> None:
    assert script.main(["--dir", str(tmp_path / "a:b"), "sid"]) == 1
    assert not (tmp_path / "a:b").exists()


def test_the_default_set_takes_the_systems_qemu_where_it_fits(
    script: Any, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system = home.parent / "qemu"
    system.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n", encoding="utf-8")
    system.chmod(0o755)
    monkeypatch.setattr(script, "SYSTEM_QEMU", system)
    monkeypatch.setattr(script, "SUITES", {"bookworm": "7.2", "sid": ""})
    monkeypatch.setattr(script, "renew", unreachable)
    assert script.main(["--dir", str(home.parent)]) == 0
    out, err = capsys.readouterr()
    assert out == f"7.2.22\t{system}\n11.1.3\t{home}/bin/qemu-system-x86_64\n"
    assert "bookworm: skipped" in err
    with pytest.raises(AssertionError, match="asked for bookworm"):  # named, it is fetched
        script.main(["--dir", str(home.parent), "bookworm"])
