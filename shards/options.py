"""Dataclasses of options as JSON and by dotted name: what is not known or not possible is refused with one sentence."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def from_json(kind: type[T], data: dict[str, Any]) -> T:
    """A `kind`, a dataclass that may hold others, from its `asdict`; text is converted to a field's type.

    Raises ValueError with a sentence for an unknown field, a wrong type or a value its owner refuses.
    """
    _refuse_unknown(kind, data, "")
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(reason if "is " in reason and ";" in reason else f"{name}: {reason}; mend that value") from None


def _refuse_unknown(owner: type, data: dict[str, Any], prefix: str) -> None:
    types = get_type_hints(owner)
    for name, value in data.items():
        if name not in types:
            raise ValueError(f"there is no option {prefix}{name}; {prefix.rstrip('.') or 'a run'} has {', '.join(types)}")
        if isinstance(value, dict) and is_dataclass(types[name]):
            _refuse_unknown(types[name], value, f"{prefix}{name}.")


def change(config: T, changes: dict[str, Any]) -> T:
    """`config` with values replaced by dotted name, e.g. `{"objective.tau": "0.1"}`; text is converted to the field's type."""
    data = asdict(config)  # type: ignore[call-overload]
    for name, value in changes.items():
        *path, last = name.split(".")
        owner = data
        for part in path:
            owner = owner.setdefault(part, {}) if isinstance(owner, dict) else {}
        if not isinstance(owner, dict) or isinstance(owner.get(last), dict):
            raise ValueError(f"option {name} is not a single value; give one of its fields, as in objective.tau=0.1")
        owner[last] = value
    return from_json(type(config), data)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"objective": {"tau": 1}}` to `{"objective.tau": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
