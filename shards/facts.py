"""A clip's facts as its `json` member: sorted keys, no spaces to spare, the same facts always the same bytes."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args, get_origin, get_type_hints

from cmacc.shards.clip import Facts

_KINDS = get_type_hints(Facts)
_KNOWN = {f.name: f for f in fields(Facts)}


def facts_to_json(facts: Facts) -> bytes:
    """Raises ValueError for a number that is not finite."""
    return json.dumps(asdict(facts), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def facts_from_json(data: bytes) -> Facts:
    """Raises ValueError when the bytes are not the facts of a clip."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the json member is not JSON ({e})") from e
    if not isinstance(found, dict):
        raise ValueError("the json member is not a JSON object")
    missing = [name for name, f in _KNOWN.items() if name not in found and f.default is MISSING]
    if missing or set(found) - set(_KNOWN):
        wrong = ", ".join(missing) or ", ".join(sorted(set(found) - set(_KNOWN)))
        raise ValueError(f"the json member {'lacks' if missing else 'has unknown facts'} {wrong}")
    return Facts(**{name: _typed(name, _KINDS[name], value) for name, value in found.items()})


def _typed(name: str, kind: Any, value: Any) -> Any:
    if type(value) is kind:
        return value
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, list):
            raise ValueError(f"fact {name} is {value!r}; it should be a list")
        if inner[-1] is Ellipsis:
            return tuple(_typed(name, inner[0], v) for v in value)
        if len(value) != len(inner):
            raise ValueError(f"fact {name} has {value!r}; there should be {len(inner)} values")
        return tuple(_typed(name, k, v) for k, v in zip(inner, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"fact {name} is {value!r}; it should be of type {kind.__name__}")
