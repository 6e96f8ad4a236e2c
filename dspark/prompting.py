"""From what a client sends to token ids: chat messages through the model's own template, text through its tokenizer.

The template comes from the model folder, never from a request. transformers renders it in jinja2's immutable sandbox;
whatever goes wrong in it is the request's fault or the template's rule, and becomes ``BadRequest``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark.errors import BadRequest

MAX_MESSAGES = 2048
MAX_PARTS = 1024  # of one message
MAX_PROMPT_CHARS = 8 * 2**20
MAX_ERROR_CHARS = 300  # of a template's own words
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer.

    ``messages`` are OpenAI's: ``role`` and ``content`` (text or a list of text parts), for tools also ``name``,
    ``tool_calls`` and ``tool_call_id``; other fields are ignored. BadRequest names the message that is wrong.
    """
    checked = check_messages(messages)
    _need_tokenizer(tokenizer)
    if not tokenizer.chat_template:
        raise BadRequest("this model has no chat template: send a plain prompt (/v1/completions, or a string) instead", "messages")
    return _tokenise(tokenizer, _render(tokenizer, checked), "messages", add_special_tokens=False)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain prompt, with the tokens that the tokenizer puts before every text."""
    _need_tokenizer(tokenizer)
    _check_text(text, "prompt")
    return _tokenise(tokenizer, text, "prompt", add_special_tokens=True)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages with known roles and contents as plain text."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise BadRequest("messages must be a list", "messages")
    if not messages:
        raise BadRequest("messages is empty", "messages")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"messages has {len(messages)} entries; at most {MAX_MESSAGES}", "messages")
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if (length := sum(len(message["content"]) for message in checked)) > MAX_PROMPT_CHARS:
        raise BadRequest(f"messages have {length} characters; at most {MAX_PROMPT_CHARS}", "messages")
    return checked


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must be an object with role and content", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r:.100}", f"{where}.role")
    checked: dict[str, Any] = {"role": ROLES[role]}
    calls = message.get("tool_calls")
    if calls:
        checked["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and role == "assistant" and calls:
        content = ""
    checked["content"] = _content_text(content, f"{where}.content")
    for name in ("name", "tool_call_id"):
        if (value := message.get(name)) is not None:
            _check_text(value, f"{where}.{name}")
            checked[name] = value
    return checked


def _content_text(content: object, where: str) -> str:
    """A content string, or the texts of its parts, one a line."""
    if isinstance(content, list):
        if not 0 < len(content) <= MAX_PARTS:
            raise BadRequest(f"{where} must have 1 to {MAX_PARTS} parts, not {len(content)}", where)
        return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))
    _check_text(content, where)
    return str(content)


def _part_text(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise BadRequest(f"{where}: only parts of type 'text' are served, not {kind!r:.100}", where)
    _check_text(part.get("text"), f"{where}.text")
    return str(part["text"])


def _check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what templates expect; clients send them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) for call in calls):
        raise BadRequest(f"{where} must be a list of objects with a function", where)
    return [{**call, "function": _with_arguments(call["function"], where)} for call in calls]


def _with_arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{where}: arguments are not JSON: {error}", where) from error
    return {**function, "arguments": arguments}


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise BadRequest(f"{where} must be text, not {type(text).__name__}", where)
    if len(text) > MAX_PROMPT_CHARS:
        raise BadRequest(f"{where} has {len(text)} characters; at most {MAX_PROMPT_CHARS}", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can carry it, no tokenizer can take it
        raise BadRequest(f"{where} is not valid Unicode at character {error.start}", where) from error


def _need_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer: send token ids", "prompt")


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadRequest(f"the model's chat template refused the messages: {str(error)[:MAX_ERROR_CHARS]}", "messages") from error
    if len(text) > MAX_PROMPT_CHARS:
        raise BadRequest(f"the rendered messages have {len(text)} characters; at most {MAX_PROMPT_CHARS}", "messages")
    return str(text)


def _tokenise(tokenizer: Any, text: str, param: str, add_special_tokens: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if not ids:
        raise BadRequest("the prompt is empty", param)
    return [int(token) for token in ids]
