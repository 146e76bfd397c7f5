# SPDX-License-Identifier: MIT
from __future__ import annotations

from tests.guest.live import scene

__all__ = ["scene"]
