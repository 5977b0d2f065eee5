"""What is meant by a value as people write it: 1e5 steps, AdamW, None; and which settings are text, taken whole."""

from types import NoneType
from typing import Any, Literal, get_args, get_origin

EXACT = 2**53  # up to here every whole number is a float's


def parts(kind: Any) -> set[Any]:
    """A setting's types and choices: {"adam", "radam", NoneType} of Literal["adam", "radam"] | None."""
    if get_origin(kind) is Literal:
        return set(get_args(kind)) | ({int} if any(type(choice) is int for choice in get_args(kind)) else set())
    inside = [part for part in get_args(kind) if isinstance(part, type) or get_args(part)]
    return set().union(*map(parts, inside)) if inside else {kind}


def is_text(kind: Any) -> bool:
    """Whether a setting of this type is any text: a path or a name, in which # : [ and digits mean nothing."""
    return parts(kind) <= {str, NoneType}


def meant(kind: Any, value: Any) -> Any:
    """The value as a setting of this type takes it: a choice whatever its case, null for None, 100000 for 1e5.

    Anything else is left as it is, for the type to refuse.
    """
    if isinstance(value, list):
        return [meant(kind, part) for part in value]
    known = parts(kind)
    if isinstance(value, str) and value not in known:
        if value.casefold() == "none" and NoneType in known:
            return None
        alike = [choice for choice in known if isinstance(choice, str) and choice.casefold() == value.casefold()]
        return alike[0] if len(alike) == 1 else value
    if type(value) is float and value.is_integer() and abs(value) <= EXACT and int in known and float not in known:
        return int(value)
    return value
