"""Configuration: who wins, and what is said about what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dspark.config import EngineConfig, ServeConfig
from dspark.config_file import effective, keys, load_config, validate
from dspark.errors import ConfigError


def write(folder: Path, text: str, name: str = "serve.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_without_anything() -> None:
    assert load_config(None, {}, {}) == ServeConfig()


def test_command_line_over_environment_over_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nhost: file\nnum_verifiers: 3\nengine: {kv_tokens: 100, dtype: float32, threads: 3}")
    env = {"DSPARK_PORT": "2", "DSPARK_HOST": "env", "DSPARK_KV_TOKENS": "200", "DSPARK_THREADS": "none", "PATH": "/bin"}
    config = load_config(file, env, {"port": "3", "engine.kv_tokens": 300})
    assert (config.port, config.host, config.num_verifiers) == (3, "env", 3)
    assert config.engine == EngineConfig(kv_tokens=300, dtype="float32", threads=None)


def test_toml_says_the_same_as_yaml(tmp_path: Path) -> None:
    yaml = write(tmp_path, "port: 9\nengine:\n  speculation: static:3\n  prefix_cache: false\n")
    toml = write(tmp_path, 'port = 9\n[engine]\nspeculation = "static:3"\nprefix_cache = false\n', "serve.toml")
    assert load_config(yaml, {}, {}) == load_config(toml, {}, {}) != ServeConfig()


def test_an_empty_file_and_an_empty_variable_set_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n"), {"DSPARK_PORT": ""}, {}) == ServeConfig()


def test_yaml_reads_a_bare_off_as_false_and_so_do_we(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "engine: {speculation: off}"), {}, {}).engine.speculation == "off"


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.path)
def test_every_key_has_a_variable(key) -> None:  # type: ignore[no-untyped-def]
    """A value no key takes must be refused by that key's name, and by no other."""
    section, _, name = key.path.rpartition(".")
    with pytest.raises(ConfigError) as refusal:
        validate(ServeConfig, {section: {name: object()}} if section else {name: object()}, {})
    assert str(refusal.value).startswith(f"{key.path}: ")
    assert key.variable == "DSPARK_" + key.name.upper()


def test_names_are_unique_so_that_flags_and_variables_are() -> None:
    assert [name for name, count in Counter(key.name for key in keys()).items() if count > 1] == []


def test_service_classes_are_a_section_of_a_file_or_json_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path, "default_class: chat\nservice_classes:\n  chat: {ttft_ms: 500, tpot_ms: 30}\n  batch: {priority: 5}\n")
    text = '{"chat": {"ttft_ms": 500, "tpot_ms": 30}, "batch": {"priority": 5}}'
    config = load_config(file, {}, {})
    assert config == load_config(None, {"DSPARK_SERVICE_CLASSES": text, "DSPARK_DEFAULT_CLASS": "chat"}, {})
    assert config == load_config(None, {}, {"service_classes": text, "default_class": "chat"})
    assert config.service_classes["chat"].tpot_ms == 30
    shown = {setting.path: setting for setting in effective(config)}["service_classes"]
    assert (json.loads(str(shown.value)), shown.is_default) == (
        {"chat": {"ttft_ms": 500.0, "tpot_ms": 30.0}, "batch": {"priority": 5}},
        False,
    )


BAD_FILES = {
    "unknown key of a class": (
        "service_classes: {chat: {tttf_ms: 5}}",
        r"unknown key service_classes.chat.tttf_ms .*you mean ttft_ms\?",
    ),
    "budget of a class": ("service_classes: {chat: {ttft_ms: 0}}", r"service_classes.chat.ttft_ms: should be greater than 0"),
    "name of a class": ("service_classes: {a b: {ttft_ms: 5}}", r"service_classes.a b.*should match"),
    "classes as text": ("service_classes: '{x'", r"service_classes: should be a JSON object"),
    "default of no class": ("default_class: chat", r"default_class chat is none of service_classes"),
    "fewest over most": ("autoscale: {max_verifiers: 2, min_verifiers: 3}", r"autoscale: min_verifiers 3 is over max_verifiers 2"),
    "pairs under TLS": (
        "kv_transport: collective\ntls_ca_file: a\ntls_cert_file: b\ntls_key_file: c",
        "kv_transport collective cannot be used with mutual TLS",
    ),
    "pairs for nothing": ("kv_transport: collective\nmove_kv: false", "move_kv is off"),
    "start out of range": ("num_verifiers: 5\nautoscale: {max_verifiers: 4}", r"num_verifiers 5 is not between min_verifiers 1"),
    "unknown key": ("engine: {kv_token: 5}", r"unknown key engine.kv_token \(from .*serve.yaml\); did you mean kv_tokens\?"),
    "key of another section": ("kv_tokens: 5", r"unknown key kv_tokens .*; did you mean engine.kv_tokens\?"),
    "nothing like it": ("zzz: 5", r"unknown key zzz .*; known are .*engine.*port"),
    "wrong type": ("port: [1]", r"port: should be a valid integer, not \[1\] \(from .*serve.yaml\)"),
    "out of range": ("port: 99999999999999999999", r"port: should be less than or equal to 65535"),
    "negative": ("engine: {max_num_seqs: -1}", r"engine.max_num_seqs: should be greater than or equal to 1, not -1"),
    "number as text": ("host: 5", r"host: should be a valid string, not 5"),
    "not a section": ("engine: 5", r"engine: .*dictionary"),
    "bad mode": ("engine: {speculation: static}", r"engine.speculation: should be off, static:K.* not 'static'"),
    "given twice": ("port: 1\nhost: x\nport: 2", r"line 3: key port is given twice"),
    "given twice inside": ("engine:\n  dtype: auto\n  dtype: float32", r"line 3: key dtype is given twice"),
    "a list": ("- 1", r"must hold keys and values, not a list"),
    "not YAML": ("a: [", r"is not YAML"),
    "two problems": ("port: x\nhots: y", r"port: .*; unknown key hots .*did you mean host\?"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_name_key_and_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(write(tmp_path, text), {}, {})
    assert "\n" not in str(refusal.value)


def test_a_section_that_is_none_is_refused_even_if_the_environment_fills_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine: .*dictionary"):
        load_config(write(tmp_path, "engine: 5"), {"DSPARK_KV_TOKENS": "100"}, {})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", {}, {})
    with pytest.raises(ConfigError, match=r"\.yaml, \.yml or \.toml"):
        load_config(write(tmp_path, "", "serve.txt"), {}, {})
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(write(tmp_path, "a = ", "serve.toml"), {}, {})
    (tmp_path / "latin.yaml").write_bytes(b"host: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "latin.yaml", {}, {})
    with pytest.raises(ConfigError, match="larger than"):
        load_config(write(tmp_path, "#" * (2**20 + 1)), {}, {})


def test_bad_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"unknown environment variable DSPARK_PROT; did you mean DSPARK_PORT\?"):
        load_config(None, {"DSPARK_PROT": "1"}, {})
    with pytest.raises(ConfigError, match=r"port: .*not 'x' \(from DSPARK_PORT\)"):
        load_config(None, {"DSPARK_PORT": "x"}, {})
    with pytest.raises(ConfigError, match=r"port: .*\(from the command line\)"):
        load_config(None, {"DSPARK_PORT": "80"}, {"port": "x"})


def test_the_cache_variable_and_service_links_of_kubernetes_are_not_ours() -> None:
    env = {
        "DSPARK_CACHE": "/cache",
        "DSPARK_COMMIT": "abc1234",
        "DSPARK_SERVICE_HOST": "10.0.0.1",
        "DSPARK_SERVICE_PORT": "8000",
        "DSPARK_SERVICE_PORT_HTTP": "8000",
        "DSPARK_PORT": "tcp://10.0.0.1:8000",
        "DSPARK_PORT_8000_TCP_ADDR": "10.0.0.1",
        "DSPARK_HEAD_SVC_PORT": "tcp://10.0.0.1:1",
    }
    assert load_config(None, env, {}) == ServeConfig()


def test_effective_marks_what_differs_and_redacts_secrets() -> None:
    config = load_config(None, {"DSPARK_API_KEY": "sesame"}, {"engine.dtype": "float32"})
    settings = {setting.path: setting for setting in effective(config)}
    assert list(settings) == [key.path for key in keys()]
    assert [path for path, setting in settings.items() if not setting.is_default] == ["engine.dtype", "api_key"]
    assert settings["api_key"].value == "[redacted]"
    assert "sesame" not in repr(list(settings.values()))


def test_no_message_repeats_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(write(tmp_path, "api_key: [sesame]"), {}, {})
    assert "sesame" not in str(refusal.value)
    with pytest.raises(ConfigError, match="exclude each other") as refusal:
        load_config(None, {"DSPARK_API_KEY": "sesame"}, {"api_key_file": "x"})
    assert "sesame" not in str(refusal.value)


def test_the_key_file_is_read_when_it_is_needed(tmp_path: Path) -> None:
    config = ServeConfig(api_key_file=write(tmp_path, "sesame\nsecond line", "key"))
    key = config.read_api_key()
    assert key is not None
    assert key.get_secret_value() == "sesame"
    assert ServeConfig().read_api_key() is None
    with pytest.raises(ConfigError, match="empty first line"):
        ServeConfig(api_key_file=write(tmp_path, "\n", "empty")).read_api_key()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeConfig(api_key_file=tmp_path / "none").read_api_key()
