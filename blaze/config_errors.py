"""What is wrong with a config, said with the path of the field."""

from __future__ import annotations

from pydantic import ValidationError


def describe(error: ValidationError) -> str:
    """One line per wrong field: path, reason, and the value that was given."""
    lines = []
    errors = error.errors(include_url=False)
    for item in errors:
        if item["type"] == "too_short" and any(
            e["loc"][: len(item["loc"])] == item["loc"] != e["loc"] for e in errors
        ):
            continue  # "models is empty", because its wrong entries were left out
        path = field_path(item["loc"]) or "args"
        reason = item["msg"].removeprefix("Value error, ")
        given = item.get("input")
        # Whatever is there may be a key, in the wrong place.
        secret = any("key" in str(part) for part in item["loc"])
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) and not secret else ""
        lines.append(f"{path}: {reason}{shown}")
    return "; ".join(lines)


def field_path(loc: tuple[int | str, ...]) -> str:
    """``("models", 1, "llm")`` -> ``models[1].llm``."""
    path = ""
    for part in loc:
        is_index = isinstance(part, int) or part.isdigit()  # keys of a mapping arrive as text
        path += f"[{part}]" if is_index else f".{part}" if path else str(part)
    return path
