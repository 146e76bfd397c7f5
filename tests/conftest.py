# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _strict(strict_loop: None) -> None:
    """Every test of this project."""
