"""Where settings come from: command line over environment over file over defaults.

Every key of ``ServeConfig`` has one name in all three: ``engine.kv_tokens`` in a file is the variable
``DSPARK_KV_TOKENS`` and the flag ``--kv-tokens``. Unknown keys and variables are errors that suggest the right one.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from dspark.config import EngineConfig, ServeConfig
from dspark.errors import ConfigError

PREFIX = "DSPARK_"
DRAFT_TOKEN = "DSPARK_DRAFT_TOKEN"  # what verifiers show to a draft worker that stands alone
OTHER_VARIABLES = frozenset({"DSPARK_CACHE", "DSPARK_COMMIT", DRAFT_TOKEN})  # read elsewhere, not configuration keys
MAX_FILE_BYTES = 2**20
# Kubernetes puts the addresses of services into the environment; for one named "dspark" they begin like ours.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$|_PORT$")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key: its dotted path, and the model field that describes it."""

    path: str
    field: FieldInfo

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def short_flag(self) -> str | None:
        extra = self.field.json_schema_extra
        return str(extra["short_flag"]) if isinstance(extra, dict) and "short_flag" in extra else None

    @property
    def is_bool(self) -> bool:
        return self.field.annotation is bool

    @property
    def is_optional(self) -> bool:
        return types.NoneType in get_args(self.field.annotation)

    def parse(self, text: str) -> str | None:
        """A value from text; ``none`` unsets an optional key. Other conversions are the model's."""
        return None if self.is_optional and text.lower() in ("none", "null") else text


@dataclass(frozen=True, slots=True)
class Setting:
    """An effective value; secrets are redacted."""

    path: str
    value: object
    is_default: bool


@lru_cache(maxsize=4)
def keys(model: type[BaseModel] = ServeConfig) -> tuple[Key, ...]:
    """All keys of a configuration, nested ones by dotted path."""
    return tuple(Key(path, field) for path, field in _fields(model, ""))


def load_config(file: Path | None, env: Mapping[str, str], overrides: Mapping[str, object]) -> ServeConfig:
    """Merge file (YAML or TOML), environment and ``overrides`` (by dotted path), the later winning.

    ConfigError names the key, where its value came from, and what would be right.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if file is not None:
        values = read_file(file)
        sources = {path: str(file) for path in _paths(values, "")}
    for key in keys():
        if (text := env.get(key.variable)) and not _SERVICE_ADDRESS.match(text):
            _put(values, key.path, key.parse(text))
            sources[key.path] = key.variable
    _check_variables(env)
    for path, value in overrides.items():
        _put(values, path, value)
        sources[path] = "the command line"
    return validate(ServeConfig, values, sources)


def engine_config(values: Mapping[str, object]) -> EngineConfig:
    """Engine settings from keyword arguments; ConfigError names the key."""
    return validate(EngineConfig, values, {})


def validate(model: type[Model], values: Mapping[str, Any], sources: Mapping[str, str]) -> Model:
    """Build a configuration; ConfigError lists everything that is wrong with it on one line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, problem, sources) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems)) from None


def effective(config: BaseModel) -> tuple[Setting, ...]:
    """Every key with its value, in the order of the models."""
    return tuple(_settings(config, ""))


def read_file(path: Path) -> dict[str, Any]:
    """The mapping a YAML or TOML file holds; ConfigError when it holds something else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        content = _parse(path, data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return content


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: the name must end in .yaml, .yml or .toml")
    import yaml

    try:
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    """YAML takes the last of two equal keys in silence; here one of them would be an option without effect."""
    seen: set[str] = set()
    for name, value in node.value if node is not None and node.id == "mapping" else ():
        if name.value in seen:
            raise ConfigError(f"{path}, line {name.start_mark.line + 1}: key {name.value} is given twice")
        seen.add(name.value)
        _refuse_repeated_keys(path, value)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from _fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _paths(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _put(values: dict[str, Any], path: str, value: object) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            return  # the file has something else in this place: validation says so
        values = inner
    values[name] = value


def _check_variables(env: Mapping[str, str]) -> None:
    known = {key.variable for key in keys()} | OTHER_VARIABLES
    for name in env:
        if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.search(name):
            raise ConfigError(f"unknown environment variable {name}{_suggest(name, sorted(known))}")


def _explain(model: type[BaseModel], problem: Any, sources: Mapping[str, str]) -> str:
    """One pydantic problem as a sentence with the key's full path."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    source = f" (from {sources[path]})" if path in sources else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}{source}{_suggest_key(model, location)}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    known = {key.path: key for key in keys(model)}
    is_shown = path in known and "api_key" not in path and problem["type"] != "missing"
    given = f", not {problem['input']!r:.100}" if is_shown else ""
    return f"{path}: {message}{given}{source}" if path else message


def _suggest_key(model: type[BaseModel], location: Sequence[str]) -> str:
    """A key of the same name elsewhere, one like it beside the unknown one, or one like it elsewhere."""
    *parents, name = location
    beside = sorted(_model_at(model, parents).model_fields)
    elsewhere = {key.name: key.path for key in keys(model)}
    if name in elsewhere:
        return f"; did you mean {elsewhere[name]}?"
    if not difflib.get_close_matches(name, beside, 1) and (match := difflib.get_close_matches(name, elsewhere, 1)):
        return f"; did you mean {elsewhere[match[0]]}?"
    return _suggest(name, beside)


def _model_at(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The model whose fields stand at a place; a mapping of models has user-given names in between."""
    parts = iter(location)
    for part in parts:
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            next(parts, None)
        assert isinstance(annotation, type)
        model = annotation
    return model


def _suggest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {match[0]}?" if match else f"; known are {', '.join(known)}"


def _settings(config: BaseModel, prefix: str) -> Iterator[Setting]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, _shown(value), value == field.default)


def _shown(value: object) -> object:
    """A value as people may see it: no secrets, and mappings of models as they would be written."""
    if isinstance(value, SecretStr):
        return "[redacted]"
    if isinstance(value, dict):
        return json.dumps({name: entry.model_dump(exclude_defaults=True) for name, entry in value.items()})
    return value
