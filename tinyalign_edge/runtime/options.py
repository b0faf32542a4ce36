"""What one may ask for with an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError

Float = npt.NDArray[np.float32]
LogitsProcessor = Callable[[Sequence[int], Float], Float]

MAX_TEXTS = 256
SEVERAL = ("stop", "choices", "processors")  # a single one is taken for a list of one


@dataclass(frozen=True)
class Generation:
    """How an answer is generated. The default is greedy: the most likely token each time.

    The order is: repetition penalty, `processors`, the constraint, temperature, `top_k`, `top_p`, `min_p`, draw.

    Attributes:
        max_new_tokens: None: the bundle's.
        temperature: divides the logits before a token is drawn; 0 takes the most likely token, and the four
            options below have no effect.
        top_k: draw from so many of the most likely tokens only.
        top_p: draw from the most likely tokens that together have this probability (Holtzman et al., 2020,
            arXiv 1904.09751).
        min_p: draw from tokens at least this probable relative to the most likely one (Nguyen et al., 2024,
            arXiv 2407.01082).
        seed: the same seed gives the same text; None: another one each time.
        repetition_penalty: logits of tokens that the answer already has are divided by it where positive and
            multiplied where negative (Keskar et al., 2019, arXiv 1909.05858). 1: none.
        stop: texts that end the answer; neither they nor what follows is part of it.
        choices: answer with one of these texts, the one whose tokens, the end included, have the highest mean
            log-likelihood. The mean keeps long texts from losing for their length alone. What is about drawing,
            stopping and processing has no effect then. An answer that ends before all were read is empty.
        regex: the answer matches it as a whole. Needs the extra `constrain`.
        json_schema: the answer is JSON of this schema, a dict or its text. Needs the extra `constrain`.
        processors: each takes the answer's token ids so far and the logits (V,) float32 of the next one, and
            returns logits of the same shape. They may be called twice for one token, and for tokens that a stop
            text then cuts off.
        timeout_s: seconds from the call, after which the answer ends with what there is. A pass that has begun, and
            work on pictures, is finished first.
        drafts: guess tokens from the memories and the question and verify several in one pass. No effect with a `seed`
            on int8 bundles that draw: drafts change their logits a little, so the text would not be the same.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    choices: Sequence[str] = ()
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    processors: Sequence[LogitsProcessor] = ()
    timeout_s: float | None = None
    drafts: bool = True

    def __post_init__(self) -> None:
        for name in SEVERAL:
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) or callable(value) else tuple(value))
        bounds = {
            "max_new_tokens": (_whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_k": (_whole(self.top_k, 1), "a whole number of at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "seed": (_whole(self.seed, 0), "a whole number of at least 0"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            "timeout_s": (self.timeout_s is None or self.timeout_s > 0, "above 0"),
            "stop": (_texts(self.stop), f"at most {MAX_TEXTS} texts, none empty"),
            "choices": (_texts(self.choices), f"at most {MAX_TEXTS} texts, none empty"),
            "processors": (all(map(callable, self.processors)), "callables"),
        }
        for name, (good, wanted) in bounds.items():
            if not good:
                raise InputError(f"{name} {getattr(self, name)!r}: must be {wanted}")
        if sum(map(bool, (self.choices, self.regex is not None, self.json_schema is not None))) > 1:
            raise InputError("choices, regex, json_schema: give one of them")


def _whole(value: int | None, least: int) -> bool:
    return value is None or (isinstance(value, int) and value >= least)


def _texts(values: Sequence[str]) -> bool:
    return len(values) <= MAX_TEXTS and all(isinstance(value, str) and value for value in values)


def with_changes(options: Generation | None, changes: Mapping[str, Any]) -> Generation:
    """`options`, or the defaults, with some fields changed.

    Raises:
        InputError: an unknown option, or a value out of bounds.
    """
    known = [field.name for field in dataclasses.fields(Generation)]
    for name in changes:
        if name not in known:
            raise InputError(f"option {name!r}: unknown; known: {', '.join(known)}")
    try:
        return dataclasses.replace(options or Generation(), **changes)
    except TypeError as error:  # a value of another type, met by a comparison
        raise InputError(f"options {dict(changes)!r:.200}: a value is of the wrong type ({error})") from None
