"""Answers that match a regular expression or a JSON schema, by llguidance (the extra `constrain`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tinyalign_edge.errors import InputError, MissingExtraError, first_line
from tinyalign_edge.runtime.options import Generation, LogitsProcessor

Float = npt.NDArray[np.float32]


class Constraints:
    """Makes the logits processor of an answer that is constrained; reads the vocabulary when it is first needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, ends

    def of(self, options: Generation) -> tuple[LogitsProcessor, ...]:
        """The processor for `options`; none where they constrain nothing.

        Raises:
            InputError: not a regular expression or JSON schema that llguidance knows.
            MissingExtraError: llguidance is not installed.
        """
        if options.regex is None and options.json_schema is None:
            return ()
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise MissingExtraError(
                "regex and json_schema need llguidance: pip install 'tinyalign-edge[constrain]'"
            ) from None
        try:
            if options.regex is not None:
                grammar = LLMatcher.grammar_from_regex(options.regex)
            else:
                schema: Any = options.json_schema
                text = schema if isinstance(schema, str) else json.dumps(schema)
                grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
            fault = matcher.get_error()
        except (ValueError, TypeError) as error:
            fault = first_line(error)
        if fault:
            raise InputError(f"{'regex' if options.json_schema is None else 'json_schema'}: not understood ({fault})")
        return (_Constraint(matcher),)

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=list(self._ends))


class _Constraint:
    """Leaves the tokens that may come next."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._read = matcher, 0

    def __call__(self, ids: Sequence[int], logits: Float) -> Float:
        self._matcher.consume_tokens(list(ids[self._read :]))
        self._read = len(ids)
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0  # (V,)
        return np.where(allowed, logits, np.float32(-np.inf))
