"""Settings: YAML over commented defaults, then section.key=value; a mistake is one line that names the key.

cfg = load_config(DEFAULTS, "configs/x.yaml", ["optim.lr=0.1"], NULLABLE)
cfg.check_positive("optim.lr")
cfg.optim.lr
"""

import argparse
import difflib
import os
import re
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from engine.text import read_text

LARGEST_FILE = 2**17  # bytes; YAML is read slowly, and nobody writes more settings
DEEPEST = 20  # sections and lists inside each other
LARGEST = 2**31  # of all numbers; no setting needs larger ones, and what computes with them may overflow
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # what neither a path nor a table can hold


class ConfigError(ValueError):
    """A configuration that cannot work; the message is one line that names the key."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def settings_parser(description: str, defaults: str) -> OneLineParser:
    """What both scripts take: a file of settings, and settings; their help ends with the defaults."""
    parser = OneLineParser(
        description=description,
        epilog="settings and their defaults:\n" + defaults,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="YAML over the settings below; several: in order"
    )
    parser.add_argument("--folder", action="store_true", help="check the settings, print run.out, and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that go before the file"
    )
    return parser


class Config(dict):
    """A nested dict whose keys are attributes: cfg.optim.lr."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def flat(self) -> dict:
        """{"optim.lr": 0.03, ...}"""
        rows = {}
        for name, value in self.items():
            if isinstance(value, Config):
                rows |= {f"{name}.{inner}": v for inner, v in value.flat().items()}
            else:
                rows[name] = value
        return rows

    def plain(self) -> dict:
        """The same in ordinary dicts."""
        return {name: v.plain() if isinstance(v, Config) else v for name, v in self.items()}

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False)

    def first_difference(self, other: "Config", ignore: tuple[str, ...] = ()) -> str | None:
        """The first key whose value differs, of those that do not start with one of `ignore`."""
        mine, theirs = self.flat(), other.flat()
        for name in mine | theirs:
            if not name.startswith(ignore) and mine.get(name) != theirs.get(name):
                return name
        return None

    def check(self, name: str, holds: bool, wanted: str) -> None:
        """Raise a ConfigError that names the key and says what is wanted, unless the condition holds."""
        if not holds:
            raise ConfigError(f"{name}: {shown(self.flat()[name])} is impossible; wanted {wanted}")

    def check_choice(self, name: str, *choices: str) -> None:
        value = self.flat()[name]
        if value not in choices:
            near = difflib.get_close_matches(value[:100].lower(), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}: {shown(value)} is not one of {', '.join(choices)}{hint}")

    def check_positive(self, *names: str) -> None:
        for name in names:
            self.check(name, 0 < self.flat()[name] < float("inf"), "a value above 0")

    def check_not_negative(self, *names: str) -> None:
        for name in names:
            self.check(name, 0 <= self.flat()[name] < float("inf"), "0 or a value above it")

    def check_fraction(self, *names: str) -> None:
        for name in names:
            self.check(name, 0 <= self.flat()[name] <= 1, "a value from 0 to 1")

    def check_range(self, *names: str) -> None:
        """Two finite numbers, the first below the second."""
        for name in names:
            value = self.flat()[name]
            numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
            self.check(name, numbers and len(value) == 2 and value[0] < value[1], "[low, high], low < high")


def load_config(
    defaults: str, path: str | Path | list | None, overrides: list[str], nullable: dict[str, type | tuple]
) -> Config:
    """Defaults (YAML text), then the file, or the files in order, then the overrides; every value has its
    default's type.

    Args:
        overrides: "section.key=value" each.
        nullable: keys that may be null, and the type (or types) that they otherwise have.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a wrong type, an unreadable file.
    """
    cfg = to_config(yaml.safe_load(defaults))
    given = {}
    for file in path if isinstance(path, list) else [path]:
        given |= flatten(read_yaml(file), cfg) if file is not None else {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{shown(text)}: expected section.key=value")
        try:
            content = from_yaml(value)
        except yaml.YAMLError:
            raise ConfigError(f"{shown(name)}: {shown(value)} is not a YAML value") from None
        given |= flatten_one(name, content, cfg)
    for name, value in given.items():
        *sections, last = name.split(".")
        place = cfg
        for section in sections:
            place = place[section]
        place[last] = fit_type(name, value, place[last], nullable)
    return cfg


def to_config(content: dict) -> Config:
    return Config({name: to_config(v) if isinstance(v, dict) else v for name, v in content.items()})


def read_yaml(path: str | Path) -> dict:
    try:
        too_large = os.path.getsize(path) > LARGEST_FILE
        content = None if too_large else from_yaml(read_text(path))
    except FileNotFoundError:
        tried = "" if Path(path).is_absolute() else f" ({Path(path).absolute()})"
        raise ConfigError(f"{path}: no such config file{tried}") from None
    except (yaml.YAMLError, ValueError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())[:160]})") from None
    if too_large:
        raise ConfigError(f"{path}: too large for a config file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections with keys, found a {type(content).__name__}")
    return content


STARTS = (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken)
STARTS += (yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class OnceEach(yaml.SafeLoader):
    """Two entries of one name, of which YAML would take the last, are an error."""

    def construct_mapping(self, node, deep=False):
        names = Counter(str(key.value) for key, _ in node.value)
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


def from_yaml(text: str):
    """The content of a YAML text. YAMLError for whatever cannot be read, and for aliases (*name), since
    ten lines of them can stand for gigabytes."""
    try:
        depth = 0
        for token in yaml.scan(text):
            depth += isinstance(token, STARTS) - isinstance(token, ENDS)
            if depth > DEEPEST:
                raise yaml.YAMLError("nested too deeply")
            if isinstance(token, yaml.AliasToken):
                raise yaml.YAMLError("aliases (*name) are not taken")
        return yaml.load(text, OnceEach)
    except yaml.YAMLError:
        raise
    except Exception as error:
        # of 2001-99-99, !!bool x, 5000 digits, deep nesting: PyYAML lets many kinds out
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def shown(value) -> str:
    """A value as a message has it: on one line and not endless."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 160 else text[:160] + " ..."


def flatten(content: dict, schema: Config) -> dict:
    """Nested sections -> {"section.key": value}, each checked against the schema's names."""
    rows = {}
    for name, value in content.items():
        rows |= flatten_one(str(name), value, schema)
    return rows


def flatten_one(name: str, value, schema: Config) -> dict:
    valid = schema.flat()
    sections = {key.rsplit(".", 1)[0] for key in valid if "." in key}
    if name in sections:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: is a section and needs keys, not {shown(value)}")
        return flatten({f"{name}.{inner}": v for inner, v in value.items()}, schema)
    if name not in valid:
        near = difflib.get_close_matches(name[:100], [*valid, *sections], n=1, cutoff=0.0)
        raise ConfigError(f"unknown key {shown(name)}; the nearest valid one is {near[0]!r}")
    return {name: value}


def fit_type(name: str, value, default, nullable: dict):
    """The value as the type that the default has; "1e-4", which YAML reads as text, counts as a float."""
    if name in nullable:
        if value is None:
            return None
        wanted = nullable[name] if isinstance(nullable[name], tuple) else (nullable[name],)
    else:
        wanted = (type(default),)
    if float in wanted and not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            value = float(value)
    right_kind = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
    if not right_kind:
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise ConfigError(f"{name}: {shown(value)} is not a {kinds}")
    check_content(name, value)
    return value


def check_content(name: str, value) -> None:
    """Numbers that nothing can compute with and texts that no file can hold raise a ConfigError."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int | float) and not -LARGEST <= one < LARGEST:  # a NaN is not either
            raise ConfigError(f"{name}: {shown(one)} is impossible; wanted a number below 2**31")
        if isinstance(one, str) and CONTROL.search(one):
            raise ConfigError(f"{name}: {shown(one)} holds control characters")


@contextmanager
def config_errors():
    """What a library call finds wrong with its arguments is the configuration's fault."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def one_line(message, longest: int = 200) -> str:
    """A message, or an error, as a line for a terminal: not endless, and what cannot be printed escaped."""
    text = " ".join(line.strip() for line in str(message).splitlines()).strip() or type(message).__name__
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[-longest // 4 :]}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
