"""JSON documents of ours, read with words for what is wrong with them."""

import json
from collections.abc import Mapping
from typing import Any

Kinds = type | tuple[type, ...]


def document(text: str, version: int, keys: Mapping[str, Kinds], what: str, error: type[ValueError]) -> dict[str, Any]:
    """The object in a text, with the keys it must have.

    Args:
        version: its "format". keys: name → kind of each value. what: its name in messages. error: to raise.

    >>> document('{"format": 1, "sizes": []}', 1, {"sizes": list}, "network", ValueError)["sizes"]
    []
    """
    if not isinstance(text, str | bytes | bytearray):
        raise error(f"{what} JSON is text, got a {type(text).__name__}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"this is no {what} JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{what} JSON is an object, got a {type(value).__name__}")
    if value.get("format") != version or isinstance(value["format"], bool):
        raise error(f"{what} format {value.get('format')!r}, this version reads {version}")
    for key, kinds in keys.items():
        if key not in value:
            raise error(f"{what} JSON has no {key!r}; it has {', '.join(sorted(value))}")
        kind = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value[key], kind + ((int,) if float in kind else ())) or isinstance(value[key], bool):
            expected = " or ".join(_WORDS[one] for one in kind)
            raise error(f"{what} JSON has {key}: {value[key]!r}, expected {expected}")
    return value


_WORDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", type(None): "null"}


def is_size(value: object) -> bool:
    """Whether a value is an integer ≥ 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
