# SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import attrs
import pytest

from qmpmirror.errors import UsageError
from qmpmirror.operations.options import Options

LARGEST = 2**63 - 1


def test_what_is_asked_for_when_nothing_is() -> None:
    """Nothing: every option is off, empty or 0, but for three."""
    chosen = {name: value for name, value in attrs.asdict(Options()).items() if value}
    assert chosen == {"via": "blockdev-mirror", "on_error": "report", "safe_start": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"bandwidth": 1},
        {"bandwidth": LARGEST},
        {"buf_size": LARGEST},
        {"granularity": 512},
        {"granularity": 65536},
        {"granularity": 64 << 20},
        {"via": "drive-mirror"},
        {"on_error": "stop"},
        {"on_error": "ignore"},
        {"on_error": "enospc"},
        {"then": "pivot"},
        {"then": "finish"},
        {"detect_zeroes": "unmap"},
        {"detect_zeroes": "off"},
    ],
)
def test_what_is_accepted(fields: dict[str, Any]) -> None:
    made = Options(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


_RANGE = f"is out of range: give 0 (no limit) to {LARGEST}"
_BUFFER = f"is out of range: give 0 (QEMU's choice) to {LARGEST}"
_POWER = "is not a power of two from 512 to 64 MiB"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bandwidth": -1}, f"bandwidth -1 bytes/s {_RANGE}"),
        ({"bandwidth": LARGEST + 1}, f"bandwidth {LARGEST + 1} bytes/s {_RANGE}"),
        ({"buf_size": -4096}, f"buf-size -4096 bytes {_BUFFER}"),
        ({"buf_size": LARGEST + 1}, f"buf-size {LARGEST + 1} bytes {_BUFFER}"),
        ({"granularity": 1}, f"granularity 1 bytes {_POWER}"),
        ({"granularity": 256}, f"granularity 256 bytes {_POWER}"),
        ({"granularity": 513}, f"granularity 513 bytes {_POWER}"),
        ({"granularity": 65535}, f"granularity 65535 bytes {_POWER}"),
        ({"granularity": 128 << 20}, f"granularity {128 << 20} bytes {_POWER}"),
        ({"granularity": -512}, f"granularity -512 bytes {_POWER}"),
        (
            {"via": "block-copy"},
            "via 'block-copy' is none of blockdev-mirror, drive-mirror",
        ),
        (
            {"on_error": "retry"},
            "on-error 'retry' is none of report, stop, ignore, enospc",
        ),
    ],
)
def test_what_no_qemu_could_accept(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**fields)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"then": "abort"}, "then 'abort' is none of "),
        ({"detect_zeroes": "yes"}, "detect-zeroes 'yes' is none of "),
    ],
)
def test_what_may_be_left_empty(fields: dict[str, Any], start: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**fields)
    assert str(caught.value).startswith(start)


def test_options_do_not_change() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Options().shallow = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        Options(True)  # type: ignore[call-arg]


def test_keywords_are_the_fields() -> None:
    from qmpmirror.operations.options import Keywords  # noqa: PLC0415 - of this test only

    fields = [field.name for field in attrs.fields(Options)]
    assert sorted(Keywords.__annotations__) == sorted(fields)
