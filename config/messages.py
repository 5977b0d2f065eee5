"""The one line about a setting that is wrong: its file and line, its key, what is wrong and the nearest right name."""

import difflib
import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from config.schema import DEFAULT_NAMES, Config, kinds, names


def explain(error: ValidationError, place: Callable[[str], str]) -> str:
    """One line for the first thing that is wrong; `place(key)` says where a key was set."""
    first = error.errors(include_url=False)[0]
    # A union's error names the member (network.song_unet.x): users write network.x.
    loc = [str(part) for part in first["loc"]]
    if len(loc) > 1 and loc[0] in DEFAULT_NAMES and loc[1] in names(loc[0]):
        del loc[1]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        said = "there is no such setting" + _nearest(loc)
    elif kind == "union_tag_invalid":
        name = str(value["name"])
        said = f"there is no {name!r}{_did_you_mean(name, names(loc[0]))}"
        loc.append("name")
    elif kind == "literal_error":
        allowed = first["ctx"]["expected"]
        guess = _did_you_mean(str(value), re.findall(r"'([^']+)'", allowed))
        said = f"{_short(value)} is not one of {allowed}{guess if 'did you' in guess else ''}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        said = f"expected keys and values below it, found {_short(value)}"
    else:
        said = f"{first['msg'][0].lower()}{first['msg'][1:]}, found {_short(value)}"
    return f"{place('.'.join(loc[:2]))}: {'.'.join(loc)}: {said}"


def _nearest(loc: list[str]) -> str:
    """A hint for an unknown key: the nearest of its section, or the same name in another section."""
    if len(loc) == 1:
        return _did_you_mean(loc[0], list(Config.model_fields))
    section, key = loc[0], loc[1]
    fields = {f for kind in kinds(section) for f in kind.model_fields}
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if key in fields:
        owners = [n for n, kind in zip(names(section), kinds(section), strict=True) if key in kind.model_fields]
        return f" for this {section}.name (it belongs to {', '.join(owners)})"
    if near:
        return f"; did you mean {section}.{near[0]}?"
    for other in Config.model_fields:
        if any(key in kind.model_fields for kind in kinds(other)):
            return f"; did you mean {other}.{key}?"
    return f"; {section} has: {', '.join(sorted(fields))}"


def _did_you_mean(word: str, choices: list[str]) -> str:
    swapped = [choice for choice in choices if sorted(choice) == sorted(word)]  # itc is ict before it is tcm
    near = swapped or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(choices)}"


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: object) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
