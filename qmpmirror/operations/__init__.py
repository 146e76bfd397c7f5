# SPDX-License-Identifier: MIT
"""One module per verb, each read top to bottom like its man page."""
