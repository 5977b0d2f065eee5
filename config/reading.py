"""Config files and overrides in, a checked Config out; and back to YAML."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from config import rules
from config.errors import ConfigError
from config.schema import DEFAULT_NAMES, Config, is_text_setting, kinds
from config.values import meant

TAG = "tag:yaml.org,2002:"
MAX_TEXT = 1_000_000  # characters of a config file
GIVES_WAY = {"ema": ("half_life_kimg", "decay"), "objective": ("stage", "double_kimg")}  # where only the first is given
STAGE = {"stage": "double_kimg", "double_kimg": "stage"}  # one on the command line takes the place of the file's other


class _Loader(yaml.SafeLoader):
    """Safe YAML without surprises of its version 1.1: 1e-4 is a number, 0100 a hundred, 1:30 and 2024-01-01 are text.

    References (*name) are refused.
    """

    yaml_implicit_resolvers = {}

    def fetch_alias(self) -> None:  # a few lines of them unfold to more than any memory
        raise yaml.MarkedYAMLError(problem="references (*name) are not read here", problem_mark=self.get_mark())


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return int(str(loader.construct_yaml_int(node)))  # str() refuses more digits than any message could show


_Loader.add_constructor(f"{TAG}int", _whole)
EXPONENT = r"[eE][-+]?\d+"
for _kind, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(\d[\d_]*|0x[\da-fA-F_]+|0b[01_]+)",
    "float": rf"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)({EXPONENT})?|\d[\d_]*{EXPONENT}|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"{TAG}{_kind}", re.compile(f"(?:{_pattern})$"), None)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The checked config in the file `path`, after `section.key=value` overrides.

    Raises ConfigError: one line with the file, the key, what is wrong and the nearest right name.
    """
    raw, where = _read_yaml(Path(os.path.expanduser(path)))
    for override in overrides:
        _apply(raw, override, where)
    _stay(raw, where, Path(path))
    return parse(raw, lambda key: where.get(key, str(path)))


def _stay(raw: dict[str, Any], where: dict[str, str], path: Path) -> None:
    """A run is where its config.yml lies, though its folder was moved or copied, unless the command line says where."""
    folder, run = path.parent, raw.setdefault("run", {})
    kept = ("metrics.jsonl", "checkpoints/last.ckpt", "checkpoints/step-*.ckpt")
    if path.name != "config.yml" or not isinstance(run, dict) or not any(any(folder.glob(name)) for name in kept):
        return
    named = where.get("run.name") == "command line" and not run.get("dir")
    if where.get("run.dir") != "command line" and not named:
        run["dir"] = str(folder)


def parse(raw: dict[str, Any], place: Callable[[str], str] = lambda key: "config") -> Config:
    """A checked config from nested dictionaries; `place(key)` says in messages where a key was set."""
    for section, name in DEFAULT_NAMES.items():
        if isinstance(raw.get(section), dict):
            content = {"name": name, **raw[section]}
            raw = {**raw, section: {**content, "name": _kind_name(section, content["name"])}}
    for section, (given, default) in GIVES_WAY.items():
        values = raw.get(section)
        if isinstance(values, dict) and values.get(given) is not None and values.get("name") in (None, "ect"):
            raw = {**raw, section: {default: None, **values}}
    try:
        cfg = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, place)) from None
    rules.check(cfg, place)
    return cfg


def _kind_name(section: str, name: Any) -> Any:
    """The name of a kind of this section, whatever its case: ect for ECT."""
    return meant(Literal[tuple(kinds(section))], name)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's content, and the file:line of each section and section.key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"it is longer than {MAX_TEXT:,} characters")
        loader = _Loader(text)
        node = loader.get_single_node()
        where = _places(node, path)
        _keep_text(node)
        raw = loader.construct_document(node) if node else None
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: there is no such file; try config.yml or one of configs/*.yml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is no text file in UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_one_line(getattr(error, 'problem', error))}") from None
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', found {type(raw).__name__}")
    return raw or {}, where


def _places(node: yaml.Node | None, path: Path, above: str = "") -> dict[str, str]:
    """The file:line of each section and section.key of a file; refuses a key given twice."""
    where = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{above}{key.value}"
        if not isinstance(key, yaml.ScalarNode) or name in where:
            problem = f"{key.value} is given twice" if name in where else "a key must be a name"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        where[name] = f"{path}:{key.start_mark.line + 1}"
        if not above:
            where |= _places(value, path, f"{name}.")
    return where


def _keep_text(node: yaml.Node | None) -> None:
    """Let paths and names be text, whatever YAML would make of them: `name: 0100`."""
    for section, content in node.value if isinstance(node, yaml.MappingNode) else ():
        for key, value in content.value if isinstance(content, yaml.MappingNode) else ():
            numbers = value.tag in (f"{TAG}int", f"{TAG}float", f"{TAG}bool")
            if numbers and isinstance(value, yaml.ScalarNode) and is_text_setting(section.value, key.value):
                value.tag = f"{TAG}str"


def _read_value(section: str, key: str, text: str) -> Any:
    """What section.key=text on the command line says. Raises ConfigError."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text_setting(section, key) and not quoted:  # a path may hold " #", ": " and brackets
        return None if text in ("", "~", "null") else text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"command line: {section}.{key}: {text!r} is not valid YAML ({_one_line(error)})") from None


def _apply(raw: dict[str, Any], override: str, where: dict[str, str]) -> None:
    """Set one `section.key=value` from the command line in `raw`."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, re.DOTALL)
    if not match:
        raise ConfigError(f"command line: {override!r} is no setting; write section.key=value, as train.lr=1e-3")
    section, key, text = match.groups()
    value = _read_value(section, key, text)
    content = raw[section] = {} if raw.get(section) is None else raw[section]
    if not isinstance(content, dict):
        raise ConfigError(f"{where.get(section, 'config')}: {section}: expected keys and values below it")
    if key == "name" and section in DEFAULT_NAMES:
        value = _kind_name(section, value)
        _change_name(section, content, value)
    if key in STAGE and value is not None and where.get(f"{section}.{STAGE[key]}") != "command line":
        content.pop(STAGE[key], None)
    content[key] = value
    where[f"{section}.{key}"] = "command line"


def _change_name(section: str, content: dict[str, Any], name: Any) -> None:
    """Another name from the command line: an objective starts from its own defaults (a P_mean for ECT is none for EDM),
    a network keeps the settings that both kinds know."""
    old, new = (kinds(section).get(str(n)) for n in (content.get("name", DEFAULT_NAMES[section]), name))
    if old and new and old is not new:
        kept = new.model_fields if section == "network" else {"teacher"} & new.model_fields.keys()
        for key in old.model_fields.keys() - kept:
            content.pop(key, None)


def dump(cfg: Config) -> str:
    """The whole config as YAML, readable by load."""
    sections = cfg.model_dump(mode="json")
    for section, values in sections.items():
        if "name" in values:
            sections[section] = {"name": values.pop("name"), **values}
    return yaml.safe_dump(sections, sort_keys=False, default_flow_style=None)


def first_difference(a: BaseModel, b: BaseModel, ignore: frozenset[str] = frozenset()) -> str | None:
    """The first section.key in which two configs differ, with both values; None where they agree."""
    left, right = a.model_dump(), b.model_dump()
    for section in left:
        for key in {"name": None, **left[section], **right[section]}:  # a kind's name before what only it has
            name = f"{section}.{key}"
            if name not in ignore and left[section].get(key) != right[section].get(key):
                return f"{name} is {left[section].get(key)!r} there and {right[section].get(key)!r} here"
    return None


def _explain(error: ValidationError, place: Callable[[str], str]) -> str:
    """One line for the first thing that is wrong; `place(key)` says where a key was set."""
    first = error.errors(include_url=False)[0]
    # A union's error names the member (network.song_unet.x): users write network.x.
    loc = [str(part) for part in first["loc"]]
    if len(loc) > 1 and loc[0] in DEFAULT_NAMES and loc[1] in kinds(loc[0]):
        del loc[1]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        said = "there is no such setting" + _nearest(loc)
    elif kind == "union_tag_invalid":
        name = str(value["name"])
        said = f"there is no {name!r}{_did_you_mean(name, list(kinds(loc[0])))}"
        loc.append("name")
    elif kind == "literal_error":
        allowed = first["ctx"]["expected"]
        guess = _did_you_mean(str(value), re.findall(r"'([^']+)'", allowed))
        said = f"{_short(value)} is not one of {allowed}{guess if 'did you' in guess else ''}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        said = f"expected keys and values below it, found {_short(value)}"
    else:
        text = first["msg"].removeprefix("Value error, ") + (", true or false" if kind == "bool_type" else "")
        said = f"{text[0].lower()}{text[1:]}, found {_short(value)}"
    return f"{place('.'.join(loc[:2]))}: {'.'.join(loc)}: {said}"


def _nearest(loc: list[str]) -> str:
    """A hint for an unknown key: the nearest of its section, or the same name in another section."""
    if len(loc) == 1:
        return _did_you_mean(loc[0], list(Config.model_fields))
    section, key = loc[0], loc[1]
    fields = {f for kind in kinds(section).values() for f in kind.model_fields}
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if key in fields:
        owners = [name for name, kind in kinds(section).items() if key in kind.model_fields]
        return f" for this {section}.name (it belongs to {', '.join(owners)})"
    if near:
        return f"; did you mean {section}.{near[0]}?"
    for other in Config.model_fields:
        if any(key in kind.model_fields for kind in kinds(other).values()):
            return f"; did you mean {other}.{key}?"
    return f"; {section} has: {', '.join(sorted(fields))}"


def _did_you_mean(word: str, choices: list[str]) -> str:
    swapped = [choice for choice in choices if sorted(choice) == sorted(word)]  # itc is ict before it is tcm
    near = swapped or difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(choices)}"


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: object) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
