"""Questions to token ids: the chat template, the place of the picture, and back to text.

The sequence the language model reads is `before | visual tokens | memory tokens | after | answer`: `before` is the
beginning-of-text token where the model has one, `after` the rendered chat template. Picture and memories stand first,
as a text would that the question is about, and not inside the user's message: the small frozen language models tried
read them better there, and everything before `after` is the same for every question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tinyalign_edge.bundle import PromptConfig
from tinyalign_edge.data import IMAGE, Turn
from tinyalign_edge.errors import BundleError, InputError

DEFAULT_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }} Answer:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class PromptIds:
    """Token ids of one question: `before` the picture and `after` it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Prompt:
    """A chat template and a tokenizer."""

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(config.chat_template)
        except jinja2.TemplateError as error:
            raise BundleError(f"chat template: not valid ({error})") from None

    def question(self, question: str) -> PromptIds:
        """Token ids of a question about a picture.

        Raises:
            InputError: the question is empty.
        """
        after, bos = self._render(question), self.config.bos_token
        starts = bool(bos) and after.startswith(bos)
        before = bos if starts or self.config.prepend_bos else ""
        return PromptIds(self._encode(before), self._encode(after.removeprefix(bos) if starts else after))

    def answer(self, question: str, answer: str) -> tuple[int, ...]:
        """Token ids of the answer as they follow `question(question).after`, closed by the end-of-answer token."""
        prompt, full = self._render(question), self._render(question, answer)
        if not full.startswith(prompt):
            raise BundleError("chat template: the answer does not follow the generation prompt; use another template")
        ids = self._encode(full[len(prompt) :])
        for position, token in enumerate(ids):
            if token in self.config.eos_token_ids:
                return ids[: position + 1]
        return (*ids, self.config.eos_token_ids[0])

    def memory_ids(self, turns: Sequence[Turn], limit: int) -> tuple[int, ...]:
        """At most `limit` token ids of a memory entry: questions, where there are any, with their answers.

        Of the first turn the question is cut before the answer; a later turn is there as a whole or not at all.
        """
        kept: tuple[int, ...] = ()
        for turn in turns:
            question, answer = (self._encode(f" {text}" if text else "") for text in (turn.question, turn.answer))
            if not kept:
                answer = answer[:limit]
                kept = question[: limit - len(answer)] + answer
            elif len(kept) + len(question) + len(answer) <= limit:
                kept += question + answer
        return kept

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, as `stream` gives it piece by piece."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def stream(self) -> DecodeStream:
        """A decoder of one answer: `step(tokenizer, id)` gives the text that the id completes, or None."""
        return DecodeStream(skip_special_tokens=True)

    def _render(self, question: str, answer: str | None = None) -> str:
        question = question.replace(IMAGE, " ").strip()
        if not question:
            raise InputError("question: it is empty; ask something")
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer.strip()})
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=answer is None,
                bos_token=self.config.bos_token,
                eos_token=self.config.eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"chat template: it fails on a question ({error})") from None

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a `tokenizer.json`.

    Raises:
        BundleError: it is missing or not a tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BundleError(f"{path}: not a tokenizer file ({error})") from None


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
