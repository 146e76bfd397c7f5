# SPDX-License-Identifier: MIT
"""``python -m qmpmirror``."""

from __future__ import annotations

import sys

from qmpmirror.cli import main

if __name__ == "__main__":
    sys.exit(main())
