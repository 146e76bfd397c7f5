# SPDX-License-Identifier: MIT
"""What a QEMU can do, from its own ``query-qmp-schema``; never from its version."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import attrs

from qmpmirror.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qmpmirror.monitor import Monitor

_JSON_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "int": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list, tuple),
}


@attrs.frozen
class Schema:
    """The commands, arguments and values that one QEMU knows.

    Type names in the schema are masked numbers, so everything is walked from a command's name.
    """

    _entities: Mapping[str, Mapping[str, Any]] = attrs.field(repr=False)

    @classmethod
    def parse(cls, reply: Iterable[Mapping[str, Any]]) -> Schema:
        """From the reply of ``query-qmp-schema``."""
        return cls({entity["name"]: entity for entity in reply})

    def has_command(self, command: str) -> bool:
        """Whether QEMU knows the command."""
        return self._entities.get(command, {}).get("meta-type") == "command"

    def is_deprecated(self, command: str) -> bool:
        """Whether QEMU says that the command is going to disappear."""
        return "deprecated" in self._entities.get(command, {}).get("features", ())

    def has_feature(self, command: str, feature: str) -> bool:
        """Whether the command carries the feature flag."""
        return feature in self._entities.get(command, {}).get("features", ())

    def has_argument(self, command: str, argument: str) -> bool:
        """Whether the command takes the argument, at its top level."""
        return self.has_command(command) and argument in self._members(
            self._entities[self._entities[command]["arg-type"]]
        )

    def values(self, command: str, argument: str) -> frozenset[str]:
        """The values of an argument that is an enumeration; empty when it is none."""
        if not self.has_argument(command, argument):
            return frozenset()
        members = self._members(self._entities[self._entities[command]["arg-type"]])
        return _enum_values(self._entities[members[argument]["type"]])

    def creatable_drivers(self) -> frozenset[str]:
        """The drivers whose images ``blockdev-create`` can make."""
        options = self._creation_options()
        if options is None:
            return frozenset()
        # A driver that cannot create images is there too, with no member of its own.
        return frozenset(
            variant["case"]
            for variant in options["variants"]
            if self._members(self._entities[variant["type"]])
        )

    def has_creation_option(self, driver: str, option: str) -> bool:
        """Whether ``blockdev-create`` takes an option for a driver."""
        options = self._creation_options()
        return options is not None and option in self._members(options, {options["tag"]: driver})

    def creation_options(self, driver: str) -> dict[str, str]:
        """The options that ``blockdev-create`` takes for a driver, with their JSON types.

        The type of an enumeration is ``string``, and that of a node is ``node``.
        """
        options = self._creation_options()
        if options is None:
            return {}
        kinds = {"enum": "string", "alternate": "node", "object": "object", "array": "array"}
        found = {}
        for name, member in self._members(options, {options["tag"]: driver}).items():
            entity = self._entities[member["type"]]
            found[name] = kinds.get(entity["meta-type"]) or str(entity["json-type"])
        return found

    def _creation_options(self) -> Mapping[str, Any] | None:
        if not self.has_argument("blockdev-create", "options"):
            return None
        members = self._members(self._entities[self._entities["blockdev-create"]["arg-type"]])
        return self._entities[members["options"]["type"]]

    def check(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Check a command and all its arguments before anything is sent.

        Raises:
            Unsupported: QEMU lacks the command, an argument, or a value.
        """
        if not self.has_command(command):
            raise Unsupported(f"this QEMU has no command {command}", command=command)
        entity = self._entities[self._entities[command]["arg-type"]]
        self._check(entity, arguments, command, "")

    def _check(self, entity: Mapping[str, Any], value: Any, command: str, path: str) -> None:
        kind = entity["meta-type"]
        if kind == "object":
            self._check_object(entity, value, command, path)
        elif kind == "array":
            if not isinstance(value, (list, tuple)):
                raise _bad_value(command, path, value)
            for item in value:
                self._check(self._entities[entity["element-type"]], item, command, path)
        elif kind == "enum":
            if not isinstance(value, str) or value not in _enum_values(entity):
                raise _bad_value(command, path, value)
        elif kind == "alternate":
            self._check_alternate(entity, value, command, path)
        elif kind == "builtin" and not _is_json(value, entity["json-type"]):
            raise _bad_value(command, path, value)

    def _check_object(self, entity: Mapping[str, Any], value: Any, command: str, path: str) -> None:
        if not isinstance(value, dict):
            raise _bad_value(command, path, value)
        tag = value.get(entity.get("tag", ""))
        members = self._members(entity, value)
        if "tag" in entity and tag is not None:
            discriminator = self._entities[members[entity["tag"]]["type"]]
            self._check(discriminator, tag, command, _join(path, entity["tag"]))
        for name, item in value.items():
            if name not in members:
                where = _join(path, name)
                raise Unsupported(
                    f"this QEMU's {command} has no argument {where}",
                    command=command,
                    argument=where,
                )
            self._check(self._entities[members[name]["type"]], item, command, _join(path, name))
        for name, member in members.items():
            if name not in value and "default" not in member:
                where = _join(path, name)
                raise Unsupported(
                    f"this QEMU's {command} needs an argument {where}",
                    command=command,
                    argument=where,
                )

    def _check_alternate(
        self, entity: Mapping[str, Any], value: Any, command: str, path: str
    ) -> None:
        refusals = []
        for member in entity["members"]:
            try:
                return self._check(self._entities[member["type"]], value, command, path)
            except Unsupported as refusal:
                refusals.append(refusal)
        # The branch that understood most is the one that the caller meant.
        raise max(refusals, key=lambda refusal: refusal.argument.count("."))

    def _members(
        self, entity: Mapping[str, Any], value: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Mapping[str, Any]]:
        """The members of an object; those of a union's branch too when ``value`` has its tag."""
        members = {member["name"]: member for member in entity.get("members", ())}
        for variant in entity.get("variants", ()):
            if variant["case"] == value.get(entity["tag"]):
                members |= self._members(self._entities[variant["type"]], value)
        return members


async def read(monitor: Monitor) -> Schema:
    """Ask QEMU for its schema (150 to 250 kB of JSON)."""
    return Schema.parse(await monitor.execute("query-qmp-schema"))


def _enum_values(entity: Mapping[str, Any]) -> frozenset[str]:
    # "values" has been deprecated since QEMU 6.2 in favour of "members".
    if "members" in entity:
        return frozenset(member["name"] for member in entity["members"])
    return frozenset(entity.get("values", ()))


def _is_json(value: Any, json_type: str) -> bool:
    if json_type == "value":
        return True
    if isinstance(value, bool):
        return json_type == "boolean"
    return isinstance(value, _JSON_TYPES[json_type])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _bad_value(command: str, path: str, value: Any) -> Unsupported:
    where = f" for {path}" if path else ""
    return Unsupported(
        f"this QEMU's {command} does not accept {value!r}{where}", command=command, argument=path
    )
