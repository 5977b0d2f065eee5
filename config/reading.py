"""Config files and overrides in, a checked Config out; and back to YAML."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from config import rules
from config.errors import ConfigError
from config.messages import explain, one_line
from config.schema import DEFAULT_NAMES, Config, kinds, names

MAX_TEXT = 1_000_000  # characters of a config file
GIVES_WAY = {"ema": ("half_life_kimg", "decay"), "objective": ("stage", "double_kimg")}  # where only the first is given
STAGE = {"stage": "double_kimg", "double_kimg": "stage"}  # one on the command line takes the place of the file's other


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 reads a string) and refuses a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # a few lines of them unfold to more than any memory
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="references (*name) are not read here", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$"), list("-+0123456789")
)
# str() refuses a hexadecimal of more digits than any message could show.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(loader.construct_yaml_int(node))))


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The checked config in the file `path`, after `section.key=value` overrides.

    Raises ConfigError: one line with the file, the key, what is wrong and the nearest right name.
    """
    raw, where = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override, where)
    return parse(raw, lambda key: where.get(key, str(path)))


def parse(raw: dict[str, Any], place: Callable[[str], str] = lambda key: "config") -> Config:
    """A checked config from nested dictionaries; `place(key)` says in messages where a key was set."""
    for section, name in DEFAULT_NAMES.items():
        if isinstance(raw.get(section), dict):
            raw = {**raw, section: {"name": name, **raw[section]}}
    for section, (given, default) in GIVES_WAY.items():
        values = raw.get(section)
        if isinstance(values, dict) and values.get(given) is not None and values.get("name") in (None, "ect"):
            raw = {**raw, section: {default: None, **values}}
    try:
        cfg = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, place)) from None
    rules.check(cfg, place)
    return cfg


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's content, and the file:line of each section and section.key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"it is longer than {MAX_TEXT:,} characters")
        loader = _Loader(text)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node else None
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: there is no such file; try config.yml or one of configs/*.yml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is no text file in UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {one_line(getattr(error, 'problem', error))}") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', found {type(raw).__name__}")
    where = {}
    for section, values in node.value:
        where[section.value] = f"{path}:{section.start_mark.line + 1}"
        for key, _ in values.value if isinstance(values, yaml.MappingNode) else ():
            where[f"{section.value}.{key.value}"] = f"{path}:{key.start_mark.line + 1}"
    return raw, where


def _apply(raw: dict[str, Any], override: str, where: dict[str, str]) -> None:
    """Set one `section.key=value` from the command line in `raw`."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, re.DOTALL)
    if not match:
        raise ConfigError(f"command line: {override!r} is no setting; write section.key=value, as train.lr=1e-3")
    section, key, text = match.groups()
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"command line: {section}.{key}: {text!r} is not valid YAML ({one_line(error)})") from None
    content = raw.setdefault(section, {})
    if content is None:
        content = raw[section] = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where.get(section, 'config')}: {section}: expected keys and values below it")
    if key == "name" and section in DEFAULT_NAMES:
        _change_name(section, content, value)
    if value is not None and where.get(f"{section}.{STAGE.get(key)}") != "command line":
        content.pop(STAGE.get(key), None)
    content[key] = value
    where[f"{section}.{key}"] = "command line"


def _change_name(section: str, content: dict[str, Any], name: Any) -> None:
    """Another name from the command line: an objective starts from its own defaults (a P_mean for ECT is none for EDM),
    a network keeps the settings that both kinds know."""
    by_name = dict(zip(names(section), kinds(section), strict=True))
    old, new = (by_name.get(str(n)) for n in (content.get("name", DEFAULT_NAMES[section]), name))
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
        for key in {**left[section], **right[section]}:
            name = f"{section}.{key}"
            if name not in ignore and left[section].get(key) != right[section].get(key):
                return f"{name} is {left[section].get(key)!r} there and {right[section].get(key)!r} here"
    return None
