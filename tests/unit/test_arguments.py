# SPDX-License-Identifier: MIT
"""virsh's way with words: every positional is an option too, in any mix."""

from __future__ import annotations

import json
import shlex

import pytest

from qmpmirror.cli.arguments import Parser, bandwidth, size

MIB = 1 << 20


def parser() -> Parser:
    made = Parser("blockcopy", "Copy.", "qmpmirror blockcopy testvm vda /x")
    made.add_named("domain", "the QEMU")
    made.add_named("path", "the disk")
    made.add_named("dest", "the copy")
    made.add_named("bandwidth", "the limit", required=False)
    made.add_argument("--wait", action="store_true")
    made.add_argument("--format")
    made.add_common()
    return made


def parse(line: str) -> tuple[str, str, str, str | None]:
    found = parser().parse(shlex.split(line))
    return found.domain, found.path, found.dest, found.bandwidth


FULL = ("testvm", "vda", "/x", None)
LIMITED = ("testvm", "vda", "/x", "10")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("testvm vda /x", FULL),
        ("testvm vda /x 10", LIMITED),
        ("testvm vda /x --bandwidth 10", LIMITED),
        ("--domain testvm vda /x --wait", FULL),
        ("testvm --path vda --dest /x", FULL),
        ("testvm --path vda /x", FULL),
        ("testvm vda --dest /x", FULL),
        ("testvm vda --dest /x 10", LIMITED),
        ("--path vda testvm /x", FULL),
        ("--dest /x --path vda --domain testvm", FULL),
        ("--dest /x --path vda testvm 10", LIMITED),
        ("--dest /x testvm --bandwidth 10 vda", LIMITED),
        ("--domain=testvm --path=vda --dest=/x", FULL),
        ("testvm --wait vda --json /x", FULL),
        ("--wait testvm vda /x", FULL),
        ("--wait --format raw testvm vda --json /x 10", LIMITED),
        ("testvm vda --format raw /x --wait 10", LIMITED),
        ("testvm vda -- /x", FULL),
        ("testvm vda -- -x", ("testvm", "vda", "-x", None)),
        ("testvm vda /x -10", ("testvm", "vda", "/x", "-10")),
        ("testvm vda /x --bandwidth -10", ("testvm", "vda", "/x", "-10")),
        ("'two words' vda '/x y'", ("two words", "vda", "/x y", None)),
        ("/run/vm.sock vda './x=y'", ("/run/vm.sock", "vda", "./x=y", None)),
    ],
)
def test_positionals_in_any_mix(line: str, expected: tuple[str, str, str, str | None]) -> None:
    assert parse(line) == expected


def test_options_are_read_wherever_they_stand() -> None:
    found = parser().parse(shlex.split("testvm --wait vda --format raw /x --json"))
    assert (found.wait, found.format, found.json) == (True, "raw", True)
    assert (found.transcript, found.connect_timeout) == (None, 10.0)
    assert not hasattr(found, "words")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "--domain is missing"),
        ("--wait", "--domain is missing"),
        ("testvm", "--path is missing"),
        ("testvm vda", "--dest is missing"),
        ("--path vda --dest /x", "--domain is missing"),
        ("testvm --dest /x", "--path is missing"),
        ("--path vda testvm", "--dest is missing"),
        ("testvm vda /x 10 more", "unexpected argument 'more'"),
        ("testvm vda /x --bandwidth 10 more and more", "unexpected argument 'more'"),
        ("--domain a --path b --dest c --bandwidth 1 d", "unexpected argument 'd'"),
        ("testvm vda /x --nonsense", "unrecognized arguments: --nonsense"),
        ("testvm vda /x --form raw", "unrecognized arguments: --form"),
        ("testvm vda /x --format", "argument --format: expected one argument"),
        ("testvm vda --dest", "argument --dest: expected one argument"),
        ("testvm vda /x --wait=yes", "argument --wait: ignored explicit argument 'yes'"),
        (
            "testvm vda /x --connect-timeout 0",
            "argument --connect-timeout: '0' is no positive number of seconds",
        ),
        (
            "testvm vda /x --connect-timeout nan",
            "argument --connect-timeout: 'nan' is no positive number of seconds",
        ),
        (
            "testvm vda /x --connect-timeout soon",
            "argument --connect-timeout: 'soon' is no positive number of seconds",
        ),
    ],
)
def test_words_that_make_no_sense(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    first, _, rest = err.partition("\n")
    assert (out, rest) == ("", "")
    assert first.startswith(f"error: {sentence}")
    assert first.endswith(" (see qmpmirror blockcopy --help)")


def test_a_program_gets_a_result_for_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("testvm vda /x --bandwith 5 --json")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "event": "result",
        "outcome": "error",
        "exit": 2,
        "error": "UsageError",
        "message": "unrecognized arguments: --bandwith 5",
        "hint": "see qmpmirror blockcopy --help",
        "left": [],
    }


@pytest.mark.parametrize("text", ["0.5", "1", "10", "3600"])
def test_seconds(text: str) -> None:
    found = parser().parse(["testvm", "vda", "/x", "--connect-timeout", text])
    assert found.connect_timeout == float(text)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as caught:
        parser().parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "domain path dest [bandwidth]" in text.replace("\n", " ")
    assert "--connect-timeout SECONDS" in text
    assert text.endswith("example:\n  qmpmirror blockcopy testvm vda /x\n")


def test_a_command_without_positionals(capsys: pytest.CaptureFixture[str]) -> None:
    for line, code in (["--help"], 0), (["word"], 2):
        made = Parser("list", "List.", "qmpmirror list")
        with pytest.raises(SystemExit) as caught:
            made.parse(line)
        assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out.startswith("usage: qmpmirror list [-h]\n")
    assert err.startswith("error: unrecognized arguments: word (see")
    assert not vars(Parser("list", "List.", "qmpmirror list").parse([])).get("words")


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "with_bytes"),
    [
        ("0", 0, 0),
        ("-0", 0, 0),
        ("1", MIB, 1),
        ("100", 100 * MIB, 100),
        ("1k", 1 << 10, 1 << 10),
        ("500K", 500 << 10, 500 << 10),
        ("2M", 2 * MIB, 2 * MIB),
        ("2MiB", 2 * MIB, 2 * MIB),
        ("2mib", 2 * MIB, 2 * MIB),
        ("2MB", 2 * 10**6, 2 * 10**6),
        ("3G", 3 << 30, 3 << 30),
        ("3GB", 3 * 10**9, 3 * 10**9),
        ("1T", 1 << 40, 1 << 40),
        ("1P", 1 << 50, 1 << 50),
        ("7E", 7 << 60, 7 << 60),
        ("9EB", 9 * 10**18, 9 * 10**18),
        ("512b", 512, 512),
        ("512B", 512, 512),
        ("10 M", 10 * MIB, 10 * MIB),
        (" 10 ", 10 * MIB, 10),
        ("8796093022207", 2**63 - MIB, 8796093022207),
    ],
)
def test_a_bandwidth(text: str, plain: int, with_bytes: int) -> None:
    assert bandwidth(text, in_bytes=False) == plain
    assert bandwidth(text, in_bytes=True) == with_bytes


JUNK = "fast,K,0.5,1.5G,1e3,0x10,1_000,10 MM,10MiBs,+5,--5,10M/s,1kk,bb,inf,NaN,5 5,1Y,B,1.,.5,1bk"


@pytest.mark.parametrize("text", ["", " ", "1,000", *JUNK.split(",")])
def test_no_bandwidth(text: str) -> None:
    for in_bytes in (False, True):
        with pytest.raises(ValueError, match=r"^bandwidth ") as caught:
            bandwidth(text, in_bytes=in_bytes)
        sentence = f"bandwidth {text!r} is no number with a suffix such as k, M, G"
        assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "in_bytes"),
    [
        ("-1", False),
        ("-1", True),
        ("-500K", False),
        ("8E", False),
        ("8E", True),
        ("8796093022208", False),
        ("9223372036854775808", True),
        ("99999999999999999999999999", True),
        ("9" * 400, False),
    ],
)
def test_a_bandwidth_out_of_range(text: str, in_bytes: bool) -> None:
    with pytest.raises(ValueError, match=r"^bandwidth ") as caught:
        bandwidth(text, in_bytes=in_bytes)
    assert str(caught.value) == f"bandwidth {text!r} is out of range: give 0 (no limit) to 7E"


def test_the_largest_bandwidth() -> None:
    assert bandwidth("9223372036854775807", in_bytes=True) == 2**63 - 1


def test_a_size() -> None:
    assert size("4096") == 4096
    assert size("64k") == 65536
    assert size("1", default=512) == 512
    assert size("-1") == -1
    with pytest.raises(ValueError, match=r"^granularity 'big' is no number with a suffix"):
        size("big", what="granularity")
