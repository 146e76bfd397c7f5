# SPDX-License-Identifier: MIT
"""What is said of a job: virsh's words on stdout, and ours about the images."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

import attrs

from qmpmirror.cli.exits import Exit
from qmpmirror.life import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpmirror.cli.render import Output
    from qmpmirror.operations.conclusion import Result


def launch_words(result: Result) -> str:
    """The words for QEMU's next command line, as a shell takes them."""
    return shlex.join(result.launch)


@attrs.frozen
class Words:
    """The messages of one command.

    Attributes:
        noun: what failed or was aborted, as the sentence begins.
        started: when it is left running at once.
        mirroring: when it is left running in the mirroring phase; empty for jobs of one phase.
        finished: when it has ended well without a switch.
        switched: when the guest was switched.
    """

    noun: str
    started: str
    mirroring: str
    finished: str
    switched: str = "Successfully pivoted"

    def aborted(self, output: Output, code: Exit = Exit.FAILED) -> Exit:
        """Say that it was aborted, when there is nothing else to say; return the exit code."""
        output.say(f"{self.noun} aborted")
        output.event("result", outcome="aborted", exit=int(code))
        return code

    def success(self, outcome: Phase) -> str:
        """What is said of an outcome that was asked for."""
        return self.switched if outcome is Phase.PIVOTED else self.finished

    def images(self, result: Result) -> Iterator[str]:
        """What must be known of the images when the guest was not switched."""
        copies = self in {COPY, MOVE}
        if result.outcome is Phase.ABORTED and not copies:
            yield f"{result.active} is whole; the next time goes on with what was done by now"
        elif not copies:
            yield from (f"{path} has been removed" for path in result.deleted)
        elif result.removed:
            yield f"{result.destination} was incomplete and has been removed"
        elif not result.consistent:
            yield f"{result.destination} is incomplete: do not use it"
        elif result.outcome is Phase.ABORTED:
            yield f"{result.destination} is a consistent copy"


COPY: Final = Words(
    noun="Copy",
    started="Block Copy started",
    mirroring="Now in mirroring phase",
    finished="Successfully copied",
)
MOVE: Final = attrs.evolve(COPY, noun="Move", switched="Successfully moved")
ACTIVE_COMMIT: Final = Words(
    noun="Commit",
    started="Active Block Commit started",
    mirroring="Now in synchronized phase",
    finished="Commit complete, overlay image kept",
)
COMMIT: Final = Words(
    noun="Commit", started="Block Commit started", mirroring="", finished="Commit complete"
)
PULL: Final = Words(
    noun="Pull", started="Block Pull started", mirroring="", finished="Pull complete"
)
