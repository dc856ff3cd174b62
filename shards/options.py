"""Dataclasses of options as JSON and by dotted name: what is not known or not possible is refused with one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from itertools import zip_longest
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def from_json(kind: type[T], data: dict[str, Any], usual: Mapping[str, str] | None = None) -> T:
    """A `kind`, a dataclass that may hold others, from its `asdict`; text is converted to a field's type.

    usual: what an option is called elsewhere, to its dotted name here, for the sentence that refuses an unknown name. Raises
    ValueError with a sentence for an unknown field, a wrong type or a value its owner refuses.
    """
    _refuse_unknown(kind, data, "", lambda name: _nearest(kind, name, usual or {}))
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(reason if "is " in reason and ";" in reason else f"{name}: {reason}; mend that value") from None


def _refuse_unknown(owner: type, data: dict[str, Any], prefix: str, nearest: Callable[[str], str]) -> None:
    types = get_type_hints(owner)
    for name, value in data.items():
        if name not in types:
            wanted = next(iter(flatten({f"{prefix}{name}": value})), f"{prefix}{name}")
            found = nearest(wanted)
            has = f"did you mean {found}?" if found else f"{prefix.rstrip('.') or 'a run'} has {', '.join(types)}"
            raise ValueError(f"there is no option {wanted}; {has}")
        if isinstance(value, dict) and is_dataclass(types[name]):
            _refuse_unknown(types[name], value, f"{prefix}{name}.", nearest)


def _nearest(kind: type, wanted: str, usual: Mapping[str, str]) -> str:
    """The option that `wanted` may mean: the same last name in another group, what others call so, or one written nearly so."""
    names, last = names_of(kind), wanted.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    if len(same) == 1:
        return same[0]
    if usual.get(last) in names:
        return usual[last]
    # the last name first: that of its group alone says little

    def alike(name: str) -> tuple[float, float]:
        own = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return own, difflib.SequenceMatcher(None, wanted, name).ratio()

    best = max(names, key=alike)
    own, whole = alike(best)
    return best if own >= 0.8 or (own >= 0.6 and whole >= 0.85) else ""


def names_of(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all options of a dataclass."""
    names = []
    for name, of in get_type_hints(kind).items():
        names += names_of(of, f"{prefix}{name}.") if isinstance(of, type) and is_dataclass(of) else [f"{prefix}{name}"]
    return names


def meanings(kind: type, prefix: str = "") -> dict[str, str]:
    """Dotted names of all options to what their owners' docstrings say of them: `NAME: meaning.`, or `NAME, NAME: meaning.`"""
    text, fields = " ".join((kind.__doc__ or "").split()), get_type_hints(kind)
    found: dict[str, str] = {}
    named = [
        match
        for match in re.finditer(r"(?:^|(?<=[.:;)] ))([a-z]\w*(?:, [a-z]\w*)*): ", text)
        if all(name in fields for name in match[1].split(", "))
    ]
    for match, following in zip_longest(named, named[1:]):
        said = text[match.end() : following.start() if following else None].strip()
        found |= dict.fromkeys(match[1].split(", "), said)
    all_of_them: dict[str, str] = {}
    for name, of in fields.items():
        inside = isinstance(of, type) and is_dataclass(of)
        all_of_them |= meanings(of, f"{prefix}{name}.") if inside else {f"{prefix}{name}": found.get(name, "")}
    return all_of_them


def change(config: T, changes: Mapping[str, Any], usual: Mapping[str, str] | None = None) -> T:
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
    return from_json(type(config), data, usual)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"objective": {"tau": 1}}` to `{"objective.tau": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
