# SPDX-License-Identifier: MIT
"""A fake monitor that says what a real QEMU has said: from the transcript of a connection.

The commands that change something divide the transcript into epochs. Within one, what QEMU says is
taken for a function of the time since that command: events are sent when they came, and a query is
answered as QEMU answered it last by then. So a client need not ask as often as the recorded one.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror.testing.script import FakeError

if TYPE_CHECKING:
    from pathlib import Path

    from qmpmirror.testing.fake import FakeMonitor
    from qmpmirror.testing.script import Message

_QUERIES: Final = ("query-", "qom-get", "qom-list", "x-debug-query-")
_RUN: Final = re.compile(r"qmpmirror-(?:[a-z]+-)?([a-z0-9]{8})(?=-)")


@attrs.define
class _Epoch:
    """What was said from one command that changes something to the next."""

    command: str = ""
    arguments: str = ""
    reply: Any = None
    start: float = 0.0
    events: list[tuple[float, Message]] = attrs.field(factory=list)
    answers: dict[str, list[tuple[float, Any]]] = attrs.field(factory=dict)
    commands: set[str] = attrs.field(factory=set)


@attrs.define(eq=False)
class Replay:
    """A transcript under way; `replay` makes one.

    Attributes:
        fake: who says it.
        speed: how much faster than it was recorded.
        divergence: how the client's commands differ from those recorded; empty if they do not.
    """

    fake: FakeMonitor
    speed: float
    divergence: str = attrs.field(default="", init=False)
    _epochs: list[_Epoch]
    _now: int = attrs.field(default=0, init=False)
    _since: float = attrs.field(factory=time.monotonic, init=False)
    _runs: dict[str, str] = attrs.field(factory=dict, init=False)

    @property
    def done(self) -> bool:
        """Whether all that changes something has been asked for."""
        return self._now == len(self._epochs) - 1

    def install(self) -> None:
        """Let the fake monitor answer."""
        for name in {name for epoch in self._epochs for name in epoch.commands}:
            self.fake.on(name, functools.partial(self._answer, name))
        changes = {epoch.command for epoch in self._epochs[1:]}
        for name in changes:
            self.fake.on(name, functools.partial(self._change, name))

    def _answer(self, name: str, arguments: Message) -> Any:
        key = self._key(name, arguments)
        elapsed = (time.monotonic() - self._since) * self.speed
        said = [epoch.answers.get(key, []) for epoch in self._epochs]
        now = said[self._now]
        known = [
            *(reply for answers in said[: self._now] for _, reply in answers[-1:]),
            # What was said first after a command counts at once: it was asked for to see that.
            *(reply for at, reply in now if at <= max(elapsed, now[0][0])),
        ]
        later = [reply for answers in said[self._now :] for _, reply in answers]
        if not known and not later:
            raise self._diverges(f"{name} {json.dumps(arguments)} is not in the transcript")
        return self._said(known[-1] if known else later[0])

    def _change(self, name: str, arguments: Message) -> Any:
        following = self._epochs[self._now + 1 :]
        epoch = following[0] if following else _Epoch()
        if epoch.command != name:
            raise self._diverges(f"{name} came, and {epoch.command or 'nothing'} was recorded")
        recorded, sent = _RUN.findall(epoch.arguments), _RUN.findall(json.dumps(arguments))
        self._runs.update(zip(recorded, sent, strict=False))
        self._now += 1
        self._since = time.monotonic()
        loop = asyncio.get_running_loop()
        for at, message in epoch.events:
            loop.call_later(at / self.speed, self._send, message)
        return self._said(epoch.reply)

    def _send(self, message: Message) -> None:
        told = json.loads(self._renamed(json.dumps(message)))
        self.fake.send_event(told["event"], told.get("data"))

    def _said(self, reply: Any) -> Any:
        told = json.loads(self._renamed(json.dumps(reply)))
        if "error" in told:
            raise FakeError(told["error"]["desc"], told["error"]["class"])
        return told["return"]

    def _renamed(self, text: str) -> str:
        """With the run ids of this time: they are random."""
        for recorded, now in self._runs.items():
            text = text.replace(recorded, now)
        return text

    def _key(self, name: str, arguments: Message) -> str:
        text = f"{name} {json.dumps(arguments, sort_keys=True)}"
        for recorded, now in self._runs.items():
            text = text.replace(now, recorded)
        return text

    def _diverges(self, how: str) -> FakeError:
        self.divergence = self.divergence or how
        return FakeError(f"replay: {how}")


def replay(fake: FakeMonitor, transcript: Path, *, speed: float = 1.0) -> Replay:
    """Let a fake monitor say what a transcript has recorded.

    The transcript is what ``--transcript`` or ``connect(transcript=...)`` writes. The commands that
    change something must come in the recorded order; anything else is refused, and told in
    `Replay.divergence`. Faults (`FakeMonitor.fault`, ``lost_events``, ``duplicate_event``) work as
    always, and so does `FakeMonitor.on` after this call.

    Args:
        fake: the fake monitor, which may be running already.
        transcript: the file.
        speed: how much faster than it was recorded.

    Returns:
        The replay, to ask how far it is.
    """
    made = Replay(fake, speed, _read(transcript))
    made.install()
    return made


def _read(transcript: Path) -> list[_Epoch]:
    epochs = [_Epoch()]
    sent: dict[int, tuple[_Epoch, str, Message]] = {}
    for line in map(json.loads, transcript.read_text(encoding="utf-8").splitlines()):
        message, epoch = line["message"], epochs[-1]
        if line["direction"] == "sent":
            name, arguments = message["execute"], message.get("arguments", {})
            if name.startswith(_QUERIES):
                epoch.commands.add(name)
            else:
                epoch = _Epoch(name, json.dumps(arguments), start=line["time"])
                epochs.append(epoch)
            sent[line["id"]] = (epoch, name, arguments)
        elif "event" in message:
            epoch.events.append((line["time"] - epoch.start, message))
        else:
            asked_in, name, arguments = sent[line["id"]]
            if name.startswith(_QUERIES):
                key = f"{name} {json.dumps(arguments, sort_keys=True)}"
                at = max(0.0, line["time"] - epoch.start)
                epoch.answers.setdefault(key, []).append((at, message))
            else:
                asked_in.reply = message
    return epochs
