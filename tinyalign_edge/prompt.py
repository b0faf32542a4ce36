"""Questions to token ids: the chat template, the place of the picture, and back to text.

The sequence the language model reads is `before | memory tokens | visual tokens | after | answer`: `before` is the
beginning-of-text token where the model has one, `after` the rendered chat template. Picture and memories stand first,
as a text would that the question is about, and not inside the user's message: the small frozen language models tried
read them better there, and everything before `after` is the same for every question.

A vision-language model that was trained as a whole has the picture where its own chat template puts it
(`PromptConfig.picture`); there `before` and `after` are the parts of the rendered template around it.

In a conversation of several turns, pictures of the first one stand where that of a single question does; a picture
that comes later stands at the beginning of the user's message that it comes with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tinyalign_edge.bundle import PictureInTemplate, PromptConfig
from tinyalign_edge.data import IMAGE, Turn
from tinyalign_edge.errors import BundleError, InputError, UnsupportedError

DEFAULT_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }} Answer:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


LATER_PICTURE = "\ufffc"  # stands for a picture of a later turn while a template is rendered
ASKED = 64  # token ids of a question that a key is made of
ANY_QUESTION = "aB\ue000"  # stands for a question; its letters show whether a template changes case


@dataclass(frozen=True)
class Said:
    """One turn of a conversation: so many pictures, a question and, once it is given, its answer."""

    question: str
    answer: str | None = None
    pictures: int = 1


@dataclass(frozen=True)
class PromptIds:
    """Token ids of one question: `before` the picture and `after` it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class PromptLayout:
    """A single question as plain texts, for programs without a template engine; `docs/embedding.md` says how to use it.

    Attributes:
        start: encoded by itself, before all else.
        before: encoded as one text with the question and `after`.
        after: up to where the answer begins.
        picture_marker: the token in whose place the picture stands; None: it stands right behind `start`.
    """

    start: str
    before: str
    after: str
    picture_marker: str | None


class Prompt:
    """A chat template and a tokenizer."""

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        extensions = (loopcontrols, _GenerationBlock)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(config.chat_template)
        except jinja2.TemplateError as error:
            raise BundleError(f"chat template: not valid ({error})") from None
        self._marker_id = tokenizer.token_to_id(config.picture.marker) if config.picture else None
        if config.picture and self._marker_id is None:
            raise BundleError(f"chat template: the tokenizer has no token {config.picture.marker!r} for the picture")

    def question(self, question: str) -> PromptIds:
        """Token ids of a question about a picture.

        Raises:
            InputError: the question is empty.
        """
        before, after = self.conversation([Said(question)])
        return PromptIds(before, after)

    def conversation(self, turns: Sequence[Said]) -> list[tuple[int, ...]]:
        """Token ids of turns of which the last awaits its answer: before, between and after all their pictures.

        Raises:
            InputError: a question is empty.
        """
        (start, text), pictures = self._texts(turns), sum(turn.pictures for turn in turns)
        before, first = self._encode(start), turns[0].pictures
        if self.config.picture:
            return self._around_pictures(before, text, self.config.picture, pictures)
        parts = [self._encode(part) for part in text.split(LATER_PICTURE)]
        parts = [before, *[()] * (first - 1), *parts] if first else [before + parts[0], *parts[1:]]
        if len(parts) != pictures + 1:
            raise BundleError(
                f"chat template: writes {len(parts) - 1} of {pictures} pictures; use one that writes each message once"
            )
        return parts

    def layout(self) -> PromptLayout:
        """What stands around a single question.

        Raises:
            UnsupportedError: the template changes the question, so that no fixed texts stand around it.
        """
        start, text = self._texts([Said(ANY_QUESTION)])
        before, question, after = text.partition(ANY_QUESTION)
        if not question or ANY_QUESTION in after:
            raise UnsupportedError("chat template: it does not write the question once, as it is; use another template")
        return PromptLayout(start, before, after, self.config.picture.marker if self.config.picture else None)

    def answer(self, question: str, answer: str) -> tuple[int, ...]:
        """Token ids of the answer as they follow `question(question).after`, closed by the end-of-answer token."""
        prompt, full = self._render([Said(question)]), self._render([Said(question, answer)])
        if not full.startswith(prompt):
            raise BundleError("chat template: the answer does not follow the generation prompt; use another template")
        ids = self._encode(full[len(prompt) :])
        for position, token in enumerate(ids):
            if token in self.config.eos_token_ids:
                return ids[: position + 1]
        return (*ids, self.config.eos_token_ids[0])

    @cached_property
    def least_tokens(self) -> int:
        """The tokens of the shortest question with the shortest answer: what the template itself takes."""
        asked = self.question("?")
        return len(asked.before) + len(asked.after) + len(self.answer("?", "a"))

    def asked_ids(self, question: str) -> tuple[int, ...]:
        """At most `ASKED` token ids of a question, as a key is made of them."""
        return self.memory_ids([Turn("", question)], ASKED)

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

    def closed(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, with the token that ends an answer."""
        return (*self._encode(text), self.config.eos_token_ids[0])

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, as `stream` gives it piece by piece."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def stream(self) -> DecodeStream:
        """A decoder of one answer: `step(tokenizer, id)` gives the text that the id completes, or None."""
        return DecodeStream(skip_special_tokens=True)

    def _texts(self, turns: Sequence[Said]) -> tuple[str, str]:
        """What is encoded: the beginning by itself, and all that follows it."""
        text, bos, picture = self._render(turns), self.config.bos_token, self.config.picture
        starts = bool(bos) and text.startswith(bos)
        if picture:
            text = text.replace(picture.marker, picture.before + picture.marker + picture.after)
            return bos if self.config.prepend_bos and not starts else "", text
        return bos if starts or self.config.prepend_bos else "", text.removeprefix(bos) if starts else text

    def _around_pictures(
        self, start: tuple[int, ...], text: str, picture: PictureInTemplate, pictures: int
    ) -> list[tuple[int, ...]]:
        """The ids of a rendered template around its pictures; one text, since neighbours share tokens."""
        ids = self._encode(text)
        places = [place for place, token in enumerate(ids) if token == self._marker_id]
        if len(places) != pictures:
            raise BundleError(
                f"chat template: writes {picture.marker!r} {len(places)} times for "
                f"{'one picture' if pictures == 1 else f'{pictures} pictures'}; "
                "use a template that writes it once for each"
            )
        first, *rest = (ids[a + 1 : b] for a, b in pairwise([-1, *places, len(ids)]))
        return [start + first, *rest]

    def _render(self, turns: Sequence[Said]) -> str:
        turns = [replace(turn, question=self._clean(turn.question)) for turn in turns]
        turns = [turn if turn.answer is None else replace(turn, answer=self._clean(turn.answer)) for turn in turns]
        if not all(turn.question for turn in turns):
            raise InputError("question: it is empty; ask something")
        try:
            return self._template.render(
                messages=chat_messages(turns, self.config.picture),
                add_generation_prompt=turns[-1].answer is None,
                bos_token=self.config.bos_token,
                eos_token=self.config.eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"chat template: it fails on a question ({error})") from None

    def _clean(self, text: str) -> str:
        """A message without what would stand for a picture."""
        if not isinstance(text, str):
            raise InputError(f"question: {text!r:.80} is not a text; ask with a str")
        picture = self.config.picture
        for marker in (IMAGE, picture.marker if picture else LATER_PICTURE):
            text = text.replace(marker, " ")
        return text.strip()

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError:  # lone surrogates, which no UTF-8 has
            raise InputError(f"text {text!r:.80}: is not valid Unicode; decode it as UTF-8") from None


def chat_messages(turns: Sequence[Said], picture: PictureInTemplate | None) -> list[dict[str, Any]]:
    """What a chat template is given: the user's messages and the assistant's answers so far."""
    messages = []
    for i, turn in enumerate(turns):
        question: Any = turn.question
        answer: Any = turn.answer
        if picture is None and i > 0:
            question = LATER_PICTURE * turn.pictures + question
        elif picture and picture.content == "text":
            question = f"{picture.marker}\n" * turn.pictures + question
        elif picture:
            question = [*[{"type": "image"}] * turn.pictures, {"type": "text", "text": question}]
            answer = [{"type": "text", "text": answer}]
        messages.append({"role": "user", "content": question})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's words for training, changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
