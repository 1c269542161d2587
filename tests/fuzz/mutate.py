"""Seeded damage: to bytes, and to the structure of JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31 - 1, 2**31, 2**63, -(2**64), 1e308, -0.5, float("nan"), float("inf")),
    *("", "\n", "../x", "/", "\ud800", "a" * 10_000, "never", [], {}, [[]], [None], {"": {}}, [0] * 1000),
)


def damage_bytes(content: bytes, random: Random) -> bytes:
    """Change, remove, repeat or cut some bytes."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        start = random.randrange(len(found) + 1)
        end = min(len(found), start + random.choice((1, 1, 2, 4, 16, 256)))
        match random.randrange(5):
            case 0:
                found[start:end] = random.randbytes(end - start)
            case 1:
                del found[start:end]
            case 2:
                found[start:start] = found[start:end]
            case 3:
                found[start:end] = random.choice((b"\0", b"\xff", b"\x7f")) * (end - start)
            case 4:
                del found[start if random.random() < 0.2 else len(found) :]
    return bytes(found)


def damage_json(content: bytes, random: Random) -> bytes:
    """Replace, remove, rename or nest a value somewhere in a JSON document, or damage its bytes."""
    if random.random() < 0.2:
        return damage_bytes(content, random)
    root = place = {"": json.loads(content)}
    key: Any = ""
    while isinstance(place[key], dict | list) and place[key] and random.random() < 0.85:
        place = place[key]
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
    match random.randrange(4):
        case 1 if place is not root:
            del place[key]
        case 2 if place is not root and isinstance(place, dict):
            place[f"{key}_"] = place.pop(key)
        case 3:
            depth = random.choice((1, 10, 100_000))
            marker = "marker of the nested value"
            value, place[key] = json.dumps(place[key]), marker
            return json.dumps(root[""]).replace(json.dumps(marker), "[" * depth + value + "]" * depth).encode()
        case _:
            place[key] = random.choice(VALUES)
    return json.dumps(root[""]).encode()
