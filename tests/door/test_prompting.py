"""Messages to token ids: what is accepted, what is refused, and that templates cannot break out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.toy_tokenizers import byte_level
from transformers import AutoTokenizer

from dspark import prompting
from dspark.errors import BadRequest
from dspark.prompting import encode, render_chat

USER = {"role": "user", "content": "hi"}


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


def rendered(tokenizer: Any, messages: Any) -> str:
    return str(tokenizer.decode(render_chat(tokenizer, messages)))


def test_roles_and_contents(tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "unknown": 1},
        {"role": "assistant", "content": ""},
    ]
    assert rendered(tokenizer, messages) == "<s>system: be brief\n<s>user: one\ntwo\n<s>assistant: \n<s>assistant: "
    assert render_chat(tokenizer, [USER])[0] == tokenizer.bos_token_id


def test_messages_are_not_changed(tokenizer: Any) -> None:
    message = {"role": "developer", "content": [{"type": "text", "text": "one"}]}
    render_chat(tokenizer, [message])
    assert message == {"role": "developer", "content": [{"type": "text", "text": "one"}]}


def test_tool_calls_reach_the_template_with_arguments_as_objects(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments.city }}{% endfor %}"
        "{{ m.content }}{{ m.tool_call_id }}{{ m.name }};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "rain", "tool_call_id": "1", "name": "w"}]
    assert rendered(tokenizer, messages) == "weather:Oslo;rain1w;"


BAD_MESSAGES: dict[str, tuple[Any, str, str]] = {
    "no list": ("hi", "must be a list", "messages"),
    "nothing": (None, "must be a list", "messages"),
    "empty": ([], "is empty", "messages"),
    "too many": ([USER] * 3000, "3000 entries; at most 2048", "messages"),
    "no object": (["hi"], "must be an object", "messages[0]"),
    "unknown role": ([USER, {"role": "king", "content": "x"}], "must be one of system, developer, user", "messages[1].role"),
    "no role": ([{"content": "x"}], "not None", "messages[0].role"),
    "role of another type": ([{"role": ["user"], "content": "x"}], "must be one of", "messages[0].role"),
    "no content": ([{"role": "user"}], "must be text, not NoneType", "messages[0].content"),
    "a number as content": ([{"role": "user", "content": 5}], "must be text, not int", "messages[0].content"),
    "no parts": ([{"role": "user", "content": []}], "1 to 1024 parts, not 0", "messages[0].content"),
    "many parts": ([{"role": "user", "content": [{}] * 2000}], "1 to 1024 parts, not 2000", "messages[0].content"),
    "an image": ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'", "messages[0].content[0]"),
    "a part that is text": ([{"role": "user", "content": ["x"]}], "only parts of type 'text'", "messages[0].content[0]"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "not NoneType", "messages[0].content[0].text"),
    "half a surrogate pair": ([{"role": "user", "content": "a\ud800"}], "not valid Unicode at character 1", "messages[0].content"),
    "a name that is a number": ([USER | {"name": 5}], "must be text", "messages[0].name"),
    "calls that are no list": ([{"role": "assistant", "content": "", "tool_calls": 5}], "list of objects", "messages[0].tool_calls"),
    "calls without a function": ([{"role": "assistant", "tool_calls": [{}]}], "with a function", "messages[0].tool_calls"),
    "arguments that are no JSON": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "not JSON",
        "messages[0].tool_calls",
    ),
    "what the template refuses": ([{"role": "tool", "content": "x"}], "template refused the messages: no tools here", "messages"),
}


@pytest.mark.parametrize(("messages", "words", "param"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages_name_the_field(tokenizer: Any, messages: Any, words: str, param: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        render_chat(tokenizer, messages)
    assert words in str(refusal.value)
    assert refusal.value.param == param


def test_sizes_are_limited(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompting, "MAX_PROMPT_CHARS", 40)
    with pytest.raises(BadRequest, match="prompt has 41 characters; at most 40"):
        encode(tokenizer, "a" * 41)
    with pytest.raises(BadRequest, match="messages have 60 characters"):
        render_chat(tokenizer, [{"role": "user", "content": "a" * 30}] * 2)
    with pytest.raises(BadRequest, match="rendered messages have"):
        render_chat(tokenizer, [{"role": "user", "content": "a" * 30}])


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "changing messages": "{{ messages.append(1) }}",
    "endless loop": "{% for i in range(10**9) %}a{% endfor %}",
    "files": "{% include '/etc/passwd' %}",
    "division": "{{ 1 / 0 }}",
    "missing attribute": "{{ messages[0].nope + 'a' }}",
    "missing index": "{{ messages[9].content }}",
    "syntax": "{{ messages",
    "type": "{{ 'a' + 1 }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_templates_are_sandboxed_and_their_errors_are_refusals(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(BadRequest, match="chat template refused"):
        render_chat(tokenizer, [USER])


def test_models_without_template_or_tokenizer() -> None:
    with pytest.raises(BadRequest, match="no chat template: send a plain prompt"):
        render_chat(byte_level(), [USER])
    with pytest.raises(BadRequest, match="no tokenizer: send token ids"):
        render_chat(None, [USER])
    with pytest.raises(BadRequest, match="no tokenizer: send token ids"):
        encode(None, "hi")


def test_plain_prompts(tokenizer: Any) -> None:
    assert tokenizer.decode(encode(tokenizer, "héllo <s>")) == "héllo <s>"
    with pytest.raises(BadRequest, match="the prompt is empty"):
        encode(tokenizer, "")
