"""How a row is written as text: recognised columns, prompt templates, chat templates, and where the answer is."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_da_core.errors import DataError
from lora_da_core.sources import reason

_RECOGNISED = (
    "messages",
    "prompt + completion",
    "question + answer",
    "instruction (+ input) + output",
    "text",
)


@dataclass(frozen=True)
class Passage:
    """A text, and where in it the answer begins and ends."""

    text: str
    start: int
    end: int


class RowFormat(Protocol):
    """How a row is written as text."""

    @property
    def note(self) -> str:
        """What was assumed, as a sentence."""

    @property
    def writes_special_tokens(self) -> bool:
        """Whether the text spells out its special tokens, the end of the answer among them."""

    def passage(self, row: Mapping[str, Any], index: int) -> Passage | None:
        """The text of a row; None where there is no answer in it.

        Raises:
            DataError: The row, number `index`, does not fit the format.
        """


@dataclass(frozen=True)
class Template:
    """A format string in parts: (literal before, column) for every field, and what follows the last."""

    parts: tuple[tuple[str, str], ...]
    tail: str
    note: str
    optional: tuple[str, ...] = ()
    writes_special_tokens: bool = False

    def passage(self, row: Mapping[str, Any], index: int) -> Passage | None:
        """The text; None where a column it needs, or the answer, is empty."""
        text, start = "", 0
        for literal, column in self.parts:
            value = _as_text(row.get(column), column, index)
            if not value.strip():
                if column in self.optional:
                    continue
                return None
            text += literal
            start = len(text)
            text += value
        return Passage(text + self.tail, start, len(text))


@dataclass(frozen=True)
class Chat:
    """Messages written by the tokenizer's chat template; the last one, the assistant's, is the answer."""

    tokenizer: Any
    columns: tuple[str, ...]
    note: str
    writes_special_tokens: bool = True

    def passage(self, row: Mapping[str, Any], index: int) -> Passage | None:
        """The conversation; None where the row holds none."""
        messages = [message for column in self.columns for message in row.get(column) or ()]
        if not messages:
            return None
        _check_messages(messages, index)
        answer = messages[-1]["content"]
        if not answer.strip():
            return None
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            before = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like on roles they do not know
            said = reason(error)
            if any(str(message["content"]).strip() in said for message in messages):
                said = f"{type(error).__name__}, which quotes them."  # errors hold no training text
            raise DataError(f"row {index}: the chat template refuses the messages: {said}") from None
        # A template may open the answer differently when it is already there (reasoning marks, for one).
        start = len(before) if text.startswith(before) else text.rfind(answer.strip())
        if start < 0:
            raise DataError(f"row {index}: the chat template does not reproduce the assistant's last message.")
        return Passage(text, start, len(text.rstrip()))


def _check_messages(messages: Sequence[Any], index: int) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise DataError(f"row {index}: a message must hold 'role' and 'content', but one is or holds {found}.")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise DataError(f"row {index}: the content of a message must be text, not of type {kind}.")
    role = messages[-1]["role"]
    if role != "assistant":
        raise DataError(
            f"row {index}: the last message is from '{role}'; it must be the assistant's, for it holds the labels."
        )


def _as_text(value: object, column: str, index: int) -> str:
    if value is None or value != value:  # a missing number reads as NaN
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise DataError(f"row {index}: column '{column}' must hold text or numbers, but holds {type(value).__name__}.")


def row_format(row: Mapping[str, Any], tokenizer: Any, template: str | None = None) -> RowFormat:
    r"""The format of rows like this one.

    Args:
        row: A row with all the columns.
        tokenizer: Its chat template writes conversations.
        template: A format string with column names in braces, the last of them the answer; line breaks and tabs
            may be written as shells pass them, `\n` and `\t`. None goes by the columns.

    Raises:
        DataError: The template is malformed or names no column, the columns are not recognised, or there are
            conversations but no chat template.
    """
    if template is None:
        return _recognise(row, tokenizer)
    written = re.sub(r"\\([nt])", lambda match: {"n": "\n", "t": "\t"}[match[1]], template)
    return _parse(written, set(row))


def _recognise(row: Mapping[str, Any], tokenizer: Any) -> RowFormat:
    """The format that the columns suggest."""
    columns = set(row)
    if "messages" in columns:
        return _chat(tokenizer, ("messages",))
    if {"prompt", "completion"} <= columns:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            return _chat(tokenizer, ("prompt", "completion"))
        return _parse("{prompt}{completion}", columns)
    if {"question", "answer"} <= columns:
        return _parse("Q: {question}\nA: {answer}", columns)
    if {"instruction", "output"} <= columns:
        middle = "\nInput: {input}" if "input" in columns else ""
        return _parse(f"Instruction: {{instruction}}{middle}\nOutput: {{output}}", columns, optional=("input",))
    if "text" in columns:
        return Template((("", "text"),), "", "column text: every token is a label.")
    raise DataError(
        f"the columns {', '.join(sorted(map(repr, columns)))} are not recognised. Recognised are: "
        f"{'; '.join(_RECOGNISED)}. Otherwise give a prompt template with the column names in braces, "
        r"for example 'Q: {question}\nA: {answer}'."
    )


def _chat(tokenizer: Any, columns: tuple[str, ...]) -> Chat:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"column {'/'.join(columns)} holds conversations, but the tokenizer has no chat template. Take an "
            "instruction-tuned model, or give a prompt template and columns of plain text."
        )
    note = f"column {'/'.join(columns)}: the model's chat template, labels cover the assistant's last message."
    return Chat(tokenizer, columns, note)


def _parse(template: str, columns: set[str], *, optional: tuple[str, ...] = ()) -> Template:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"prompt template {template!r} is malformed: {error}. Double a brace that is meant.") from error
    parts: list[tuple[str, str]] = []
    tail = ""
    for literal, column, specification, conversion in parsed:
        tail += literal
        if column is None:
            continue
        if specification or conversion:
            raise DataError(f"prompt template {template!r}: '{{{column}}}' must hold a column's name and no more.")
        if column not in columns:
            close = difflib.get_close_matches(column, sorted(columns), n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise DataError(
                f"prompt template {template!r}: there is no column '{column}'.{hint} "
                f"Columns: {', '.join(sorted(columns))}."
            )
        parts.append((tail, column))
        tail = ""
    if not parts:
        raise DataError(f"prompt template {template!r} names no column; write their names in braces.")
    names = "/".join(column for _, column in parts)
    note = f"columns {names}: template {template!r}, labels cover '{parts[-1][1]}'."
    return Template(tuple(parts), tail, note, optional)
