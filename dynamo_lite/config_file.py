"""YAML file + `--set` overrides → Config. Every error names its file, line and column, and all come at once.

The file is composed into YAML nodes, which know where they stand, and turned into plain data beside a map from
each key's path to its place. pydantic then judges the data, and its errors are put back to their places.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dynamo_lite.config import Config, Model
from dynamo_lite.errors import ConfigError

KeyPath = tuple[str | int, ...]
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}
MERGE_TAG = "tag:yaml.org,2002:merge"
MAX_DEPTH = 32  # nesting; also ends an alias that contains itself


class Place(NamedTuple):
    """Where something is written; overrides have no line."""

    file: str
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration and where each of its settings is written."""

    config: Config
    file: str
    keys: Mapping[KeyPath, Place]

    def located(self, error: ConfigError) -> ConfigError:
        """The same error, at the line of the setting it is about, where that is written down."""
        path: KeyPath = tuple(error.key.split(".")) if error.key else ()
        while path and path not in self.keys:
            path = path[:-1]
        place = self.keys.get(path, Place(self.file))
        return ConfigError(
            error.message,
            file=place.file,
            line=place.line,
            column=place.column,
            hint=error.hint,
            key=error.key,
            more=[self.located(other) for other in error.more],
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Raises ConfigError, which lists every error found."""
    return load(path, overrides).config


def load(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Like load_config, and keeps the places. Raises ConfigError."""
    reader = _Reader(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {_reason(error)}", file=str(path)) from error
    data = reader.read(text)
    for override in overrides:
        reader.override(data, override)
    errors = list(reader.errors)
    try:
        config = Config.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        errors += [_explain(details, reader) for details in error.errors(include_url=False)]
    if errors:
        raise _all(errors)
    return Source(config, str(path), reader.keys)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def _all(errors: Sequence[ConfigError]) -> ConfigError:
    first, *more = sorted(errors, key=lambda error: (error.line == 0, error.line, error.column))
    return ConfigError(
        first.message,
        file=first.file,
        line=first.line,
        column=first.column,
        hint=first.hint,
        key=first.key,
        more=more,
    )


@dataclass(slots=True)
class _Reader:
    """Turns nodes into data, noting where every key and value stands."""

    file: str
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    errors: list[ConfigError] = field(default_factory=list)
    scalars: yaml.constructor.SafeConstructor = field(default_factory=yaml.constructor.SafeConstructor)

    def read(self, text: str) -> dict[str, Any]:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
            problem = f"not valid YAML: {error.problem or error.context}"
            raise ConfigError(problem, file=self.file, line=line, column=column) from error
        except yaml.YAMLError as error:  # characters YAML does not allow
            raise ConfigError(f"not valid YAML: {error}", file=self.file) from error
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise self._error("a configuration is made of 'key: value' lines", self._place(node))
        data: dict[str, Any] = self._value(node, (), Config)
        return data

    def override(self, data: dict[str, Any], text: str) -> None:
        """Apply one `a.b=c`; the value is YAML."""
        place = Place(f"--set {text}")
        dotted, equals, value = text.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            self.errors.append(self._error("write --set section.key=value", place))
            return
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except yaml.YAMLError:
            self.errors.append(self._error(f"'{value}' is not valid YAML", place))
            return
        section: dict[str, Any] = data
        model: type[Model] | None = Config
        for depth, key in enumerate(path[:-1]):
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section, model = section[key], _section(model, key)
            self.keys.setdefault(path[: depth + 1], place)
        inner = _Reader(place.file, errors=self.errors)
        section[path[-1]] = inner._value(node, path, _section(model, path[-1]))
        for known in (self.keys, self.values):
            for old in [known_path for known_path in known if known_path[: len(path)] == path]:
                del known[old]
            known.update(dict.fromkeys((*inner.keys, *inner.values, path), place))

    def _value(self, node: yaml.Node, path: KeyPath, model: type[Model] | None) -> Any:
        self.values[path] = self._place(node)
        if len(path) > MAX_DEPTH:
            raise self._error("nested too deeply", self._place(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, model)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, index), None) for index, item in enumerate(node.value)]
        if node.value == "" and node.tag.endswith(":null") and model is not None:
            return {}  # `prefill:` with nothing under it is a section of defaults; `prefill: null` is none
        if node.tag not in PLAIN_TAGS:
            return node.value  # dates and the like are text here
        try:
            return self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self.errors.append(self._error(f"'{node.value}' cannot be understood", self._place(node)))
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, model: type[Model] | None) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == MERGE_TAG:
                merged += _merged(value_node)
            elif not isinstance(key_node, yaml.ScalarNode):
                self.errors.append(self._error("a key is one word", self._place(key_node)))
            elif key_node.value in data:
                message = f"'{key_node.value}' is given twice; first in line {self.keys[(*path, key_node.value)].line}"
                self.errors.append(self._error(message, self._place(key_node)))
            else:
                self._entry(data, key_node, value_node, path, model)
        for key_node, value_node in merged:
            if key_node.value not in data:
                self._entry(data, key_node, value_node, path, model)
        return data

    def _entry(
        self, data: dict[str, Any], key: yaml.Node, value: yaml.Node, path: KeyPath, model: type[Model] | None
    ) -> None:
        inner = (*path, key.value)
        self.keys[inner] = self._place(key)
        data[key.value] = self._value(value, inner, _section(model, key.value))

    def _place(self, node: yaml.Node) -> Place:
        mark = node.start_mark
        if mark is None or self.file.startswith("--set "):
            return Place(self.file)
        return Place(self.file, mark.line + 1, mark.column + 1)

    def _error(self, message: str, place: Place) -> ConfigError:
        return ConfigError(message, file=place.file, line=place.line, column=place.column)


def _merged(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The entries `<<: *anchor` or `<<: [*a, *b]` brings in, strongest first."""
    for mapping in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(mapping, yaml.MappingNode):
            yield from mapping.value


def _section(model: type[Model] | None, key: str | int) -> type[Model] | None:
    """The model of the section `key` of `model`, if it is a section."""
    info = model.model_fields.get(str(key)) if model is not None else None
    if info is None:
        return None
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, Model):
            return kind
    return None


def _explain(details: ErrorDetails, reader: _Reader) -> ConfigError:
    path: KeyPath = details["loc"]
    dotted = ".".join(map(str, path))
    if details["type"] == "extra_forbidden":
        parent = ".".join(map(str, path[:-1]))
        place = reader.keys.get(path, Place(reader.file))
        message = f"unknown key '{path[-1]}'" + (f" in {parent}" if parent else "")
        hint = _nearest(path)
    else:
        known = path
        while known and known not in reader.values:
            known = known[:-1]
        place = reader.values.get(known, Place(reader.file))
        message, hint = _sentence(details, dotted), ""
    return ConfigError(message, file=place.file, line=place.line, column=place.column, hint=hint, key=dotted)


def _sentence(details: ErrorDetails, dotted: str) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return f"{dotted}: {context['error']}" if dotted else str(context["error"])
    bounds = {"greater_than": "above", "greater_than_equal": "at least", "less_than_equal": "at most"}
    limit = next((context[short] for short in ("gt", "ge", "le") if short in context), None)
    wanted = {
        "bool_type": "true or false",
        "dict_type": "a section of 'key: value' lines",
        "float_type": "a number",
        "int_from_float": "a whole number",
        "int_type": "a whole number",
        "literal_error": str(context.get("expected")),
        "model_type": "a section of 'key: value' lines",
        "path_type": "a path",
        "string_type": "text; put it in quotes",
        "tuple_type": "a list",
        **{name: f"{word} {limit}" for name, word in bounds.items()},
    }.get(kind)
    if wanted is None:
        return f"{dotted}: {details['msg'][0].lower()}{details['msg'][1:]}"
    found = details["input"]
    shown = "a section" if isinstance(found, dict) else "nothing" if found is None else json.dumps(found)
    return f"{dotted} must be {wanted}, not {shown}"


def _nearest(path: KeyPath) -> str:
    """The nearest known key: a sibling that is spelt alike, else the section where a key of this name belongs."""
    section: type[Model] | None = Config
    for key in path[:-1]:
        section = _section(section, key)
    wrong = str(path[-1])
    siblings = list(section.model_fields) if section is not None else []
    if close := difflib.get_close_matches(wrong, siblings, n=1):
        return f"did you mean '{close[0]}'?"
    everywhere = dict(_all_keys(Config, ""))
    if elsewhere := everywhere.get(wrong):
        return f"'{wrong}' belongs under '{elsewhere}'" if elsewhere != "." else f"'{wrong}' belongs at the top level"
    if close := difflib.get_close_matches(wrong, everywhere, n=1, cutoff=0.75):
        prefix = everywhere[close[0]]
        return f"did you mean '{close[0] if prefix == '.' else f'{prefix}.{close[0]}'}'?"
    return "known keys here: " + ", ".join(siblings) if siblings else ""


def _all_keys(model: type[Model], prefix: str) -> Iterator[tuple[str, str]]:
    """(key, the section it is in), outermost last so that it wins in a dict."""
    for name in model.model_fields:
        if inner := _section(model, name):
            yield from _all_keys(inner, f"{prefix}.{name}" if prefix else name)
    yield from ((name, prefix or ".") for name in model.model_fields)
