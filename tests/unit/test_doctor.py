# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest

from qmpmirror.operations.complaints import hazards
from qmpmirror.operations.doctor import without_secrets


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ((5, 2, 0), [6, 8, 9, 13]),
        ((7, 2, 22), [6, 8, 13]),
        ((8, 2, 0), [6, 7, 8, 13]),
        ((10, 0, 9), [6, 7, 13]),
        ((10, 0, 10), [13]),
        ((10, 0, 11), []),
        ((10, 1, 5), [6, 7, 13]),
        ((10, 2, 2), [6, 13]),
        ((10, 2, 3), [13]),
        ((11, 0, 1), [13]),
        ((11, 0, 2), []),
        ((11, 1, 3), []),
    ],
)
def test_the_known_bugs_of_a_version(version: tuple[int, int, int], numbers: list[int]) -> None:
    assert [*hazards(version)] == numbers


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/disk?sig=abc&x=y z", "https://***@host/disk?*** z"),
        ("nbd://host:10809/disk", "nbd://host:10809/disk"),
        ("ssh://root@host/disk.qcow2", "ssh://***@host/disk.qcow2"),
        ("nbd+unix:///disk?socket=/run/nbd.sock", "nbd+unix:///disk?socket=/run/nbd.sock"),
        (
            'json:{"driver": "https", "password": "p\\"w", "url": "x", "cookie":"c"}',
            'json:{"driver": "https", "password": "***", "url": "x", "cookie":"***"}',
        ),
        (
            'json:{"file.password-secret": "sec0", "file.username": "ann"}',
            'json:{"file.password-secret": "***", "file.username": "***"}',
        ),
        ("/images/user@host:/x.qcow2", "/images/user@host:/x.qcow2"),
    ],
)
def test_no_secret_is_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
