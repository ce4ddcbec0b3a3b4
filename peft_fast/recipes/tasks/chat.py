"""Conversations: rows of any usual form → messages → text by the tokenizer's template → what of it the assistant says.

What the assistant says of a turn is everything a model would write after the generation prompt, up to and with what
ends the turn. No template is known here: a turn is found by rendering the conversation up to it and with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function": "tool", "tool": "tool", "developer": "developer"}
ROLES |= {"system": "system", "user": "user", "assistant": "assistant"}
FORMS = "text, or messages, or prompt and completion (instruction, input and output)"
# stands in for an answer while it is looked for; private use, so that no text has it and no template trims it
MARK = "\ue000\ue001\ue002"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


class Bad(Exception):
    """A row that cannot be used: its column, what is wrong with it, and the fix."""

    def __init__(self, column: str | None, what: str, fix: str) -> None:
        super().__init__(what)
        self.column, self.what, self.fix = column, what, fix


def form(columns: Iterable[str]) -> str | None:
    """Which of the forms the columns are: messages, prompt or text; None for none of them."""
    columns = set(columns)
    if "messages" in columns:
        return "messages"
    if "completion" in columns and columns & {"prompt", "input"}:
        return "prompt"
    return "text" if "text" in columns else None


def messages(row: Mapping[str, Any], form: str) -> list[dict[str, Any]]:
    """The conversation of a row; one without an answer ends with the user. Raises Bad."""
    if form == "messages":
        return [_message(entry, place) for place, entry in enumerate(_listed(row.get("messages")), 1)]
    asked = [text for name in ("prompt", "input") if (text := _text(row, name)).strip()]
    if not asked:
        raise Bad("prompt", "empty", "fill it, or remove the row")
    found = [{"role": "user", "content": "\n\n".join(asked)}]
    if (system := _text(row, "system")).strip():
        found.insert(0, {"role": "system", "content": system})
    if (answer := _text(row, "completion")).strip():
        found.append({"role": "assistant", "content": answer})
    return found


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], dict):  # a turn as a list of one message
        value = value[-1].get("content")
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise Bad(name, f"{type(value).__name__} instead of a text", "one text a cell")
    return str(value)


def _listed(value: Any) -> list[Any]:
    """The messages of a cell; in a table of texts they are JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Bad("messages", f"no JSON ({error})", 'write it as [{"role": …, "content": …}, …]') from error
    if not isinstance(value, list) or not value:
        shown = "empty" if not value else f"{type(value).__name__} instead of a list of messages"
        raise Bad("messages", shown, 'write it as [{"role": …, "content": …}, …]')
    return value


def _message(entry: Any, place: int) -> dict[str, Any]:
    """One message in the usual form; ShareGPT's is {from, value}."""
    if not isinstance(entry, dict):
        raise Bad("messages", f"message {place} is {entry!r:.40}", 'write it as {"role": …, "content": …}')
    known = {key: value for key, value in entry.items() if value is not None}
    role = known.pop("role", None) or known.pop("from", None)
    if role not in ROLES:
        needed = "system, user, assistant or tool"
        raise Bad("messages", f"message {place} has the role {role!r}", f"roles are {needed}")
    content = known.pop("content", None)
    content = known.pop("value", None) if content is None else content
    if content is None and not known.get("tool_calls"):
        raise Bad("messages", f"message {place} ({role}) has no content", "fill it, or remove the message")
    if ROLES[role] == "assistant" and isinstance(content, str) and not content.strip() and not known.get("tool_calls"):
        raise Bad("messages", f"message {place} ({role}) is empty", "fill it, or remove the message")
    return {"role": ROLES[role], **({} if content is None else {"content": content}), **known}


def question(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to where the assistant has to speak: answers at its end are left out."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise Bad("messages", "nobody but the assistant speaks", "begin with what the user says")
    return list(messages[:end])


def plain_template(tokenizer: Any) -> str:
    """The template of a tokenizer that has none: words for the roles, so that no token is new to the model."""
    starts = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    return ("{{ bos_token }}" if starts else "") + TEMPLATE


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    """The text of a conversation; with ``prompt`` up to where the assistant begins to speak. Raises Bad."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja's errors and what a template's own code raises have no common base
        what = f"the tokenizer's chat template refuses it ({str(error).strip() or type(error).__name__})"
        raise Bad(
            "messages", what, "write the roles in the order it takes, or pass another with chat_template"
        ) from error


def spans(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the (start, end) in it of what the assistant says; ``weight: 0`` is not learnt.

    Raises Bad where the template does not show the place of an answer.
    """
    whole = render(tokenizer, messages)
    turns = [i for i, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight", 1) != 0]
    return whole, [_turn(tokenizer, messages, i, whole) for i in turns]


def _turn(tokenizer: Any, messages: Sequence[dict[str, Any]], i: int, whole: str) -> tuple[int, int]:
    """The place in ``whole`` of what the assistant says in message i."""
    content = messages[i].get("content")
    said = content.strip() if isinstance(content, str) else ""
    upto = whole if i == len(messages) - 1 else render(tokenizer, messages[: i + 1])
    # a conversation that the assistant begins has no prompt
    prompt = render(tokenizer, messages[:i], prompt=True) if i else None
    start = len(prompt) if prompt is not None and upto.startswith(prompt) and whole.startswith(prompt) else None
    if start is not None and said and (at := upto.find(said, start)) >= 0 and whole.startswith(said, at):
        end = at + len(said)
        return start, end + len(_ending(tokenizer, upto[end:], whole[end:]))
    if start is not None and not said and whole.startswith(upto):  # tool calls, or content in parts
        return start, len(upto.rstrip())
    return _marked(tokenizer, messages, i, whole, said, start)


def _marked(
    tokenizer: Any, messages: Sequence[dict[str, Any]], i: int, whole: str, said: str, start: int | None
) -> tuple[int, int]:
    """The same where the template treats a last turn unlike others: by what changes when the answer does."""

    def marked(upto: int) -> tuple[str, str]:
        text = render(tokenizer, [*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 : upto]])
        before, _, after = text.partition(MARK)
        return (before, after) if text.count(MARK) == 1 else ("", MARK)

    before, after = marked(len(messages))
    end = len(whole) - len(after)
    here = whole[len(before) : end].strip()
    if not (whole.startswith(before) and whole.endswith(after) and here and here in said):
        what = f"the tokenizer's chat template does not show message {i + 1}, the assistant's, as it is written"
        raise Bad("messages", what, "pass another template with chat_template, or learn every token with loss_on: all")
    begins = start if start is not None and start <= len(before) else len(before)
    return begins, end + len(_ending(tokenizer, marked(i + 1)[1], after))


def _ending(tokenizer: Any, tail: str, rest: str) -> str:
    """What ends a turn: of ``tail``, which follows an answer that is the last, what also follows it here."""
    taken = ""
    for piece in control(tokenizer).split(tail):
        if not rest.startswith(taken + piece):
            break
        taken += piece
    # a line break after the end token is not the assistant's any more; where there is no such token it is the end
    return taken.rstrip() or taken


def control(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokenizer's special and added tokens, the longest first; as a group, so that split keeps them."""
    names = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


def stops(tokenizer: Any) -> list[int]:
    """The tokens at which an answer is over: the end of text, and what ends a turn in the template."""
    found = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, ((_, end),) = spans(tokenizer, sample)
        except Bad:
            return found
        ending = text[text.rfind("b", 0, end) + 1 : end]
        found += [tokenizer.convert_tokens_to_ids(name) for name in control(tokenizer).findall(ending)]
    return list(dict.fromkeys(found))


def tokens(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], special: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Of each text its token ids and which of them lie in its ``spans``; ``special``: with the tokenizer's frame."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_tokens_by_prefix(tokenizer, text, inside, special) for text, inside in zip(texts, spans, strict=True)]
    made = tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return [
        (list(ids), [any(a < end and start < b for start, end in inside) for a, b in places])
        for ids, places, inside in zip(made["input_ids"], made["offset_mapping"], spans, strict=True)
    ]


def _tokens_by_prefix(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], special: bool
) -> tuple[list[int], list[bool]]:
    """For tokenizers in Python, which do not say where a token lies: how many tokens a prefix of the text shares."""

    def tokenized(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    ids = tokenized(text)

    def shared(end: int) -> int:
        part = tokenized(text[:end])
        return next((i for i, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))

    inside = [False] * len(ids)
    for start, end in spans:
        first, last = shared(start) if start else 0, shared(end) if end < len(text) else len(ids)
        inside[first:last] = [True] * (last - first)
    return ids, inside
