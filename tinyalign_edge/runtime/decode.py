"""The loop that generates tokens: one a pass, or several where a draft was right."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from itertools import zip_longest

from tinyalign_edge.runtime.context import Context, Float
from tinyalign_edge.runtime.drafts import Drafts
from tinyalign_edge.runtime.picker import Picker, is_clear

SURE = 1.0  # nats between the best and the second best logit, above which another scale of activations changes nothing


class Decoding:
    """Tokens of one answer as they are picked; iterate once.

    A draft is verified in one pass: each of its tokens is compared with the one that the model picks in its place. For
    greedy answers that gives the tokens of plain decoding; for drawn ones, the same draw decides, which is the
    acceptance rule of speculative sampling for a draft that is certain of its tokens (Leviathan et al., 2023,
    arXiv 2211.17192): a drafted token is kept with its probability, and otherwise replaced by a draw from the others.

    Args:
        context: has read the prompt.
        logits: (V,) after it.
        picker: of this answer.
        ends: tokens that end an answer.
        limit: tokens at most.
        drafts: None: one token a pass.
        exact: the rows of a pass do not depend on each other. Where they do (int8 activations have one scale a pass), a
            draft changes logits a little, those of later tokens too. A token that is not `SURE` is then picked from
            what plain decoding computes: the tokens since the first draft are computed again one by one. So answers
            are those of plain decoding unless a draft moves a difference of logits by more than `SURE`. Drawn answers
            keep to the distribution of the pass that they are drawn from.

    Attributes:
        ids: tokens so far, without one that ended the answer.
        ended: one has.
        passes: after the prompt was read.
        decoding_ms: time that they took.
    """

    def __init__(
        self,
        context: Context,
        logits: Float,
        picker: Picker,
        *,
        ends: Collection[int],
        limit: int,
        drafts: Drafts | None = None,
        exact: bool = True,
    ) -> None:
        self._context, self._first, self._picker = context, logits, picker
        self._ends, self._limit, self._drafts, self._exact = ends, limit, drafts, exact
        self._prompt = self._plain_to = len(context)  # positions up to which all is as plain decoding computes it
        self.ids: list[int] = []
        self.ended = False
        self.passes, self.decoding_ms = 0, 0.0

    def __iter__(self) -> Iterator[int]:
        """The tokens in `ids`, each when it is there."""
        ready = [self._picker.pick(self._picker.scores([], self._first))]
        while True:
            for token in ready:
                if token in self._ends:
                    self.ended = True
                    return
                self.ids.append(token)
                yield token
            if len(self.ids) == self._limit:
                return
            started = time.perf_counter()
            ready = self._next()
            self.decoding_ms += (time.perf_counter() - started) * 1000

    def _next(self) -> list[int]:
        """The tokens of the next pass, at least one, at most up to one that ends the answer."""
        doubtful, passes = False, self.passes
        draft = self._drafts.propose(self.ids, self._limit - len(self.ids) - 1) if self._drafts else []
        given, found = [self.ids[-1], *draft], list[int]()
        start = len(self._context)
        rows = self._append(given, len(given))
        if self._exact or (not draft and self._plain_to == start):
            self._plain_to = len(self._context)
        try:
            for i, (row, drafted) in enumerate(zip_longest(rows, draft)):
                ids = self.ids + found
                scores = self._picker.scores(ids, row)
                doubtful = self._picker.greedy and self._plain_to <= start + i and not is_clear(scores, SURE)
                if doubtful:
                    scores = self._picker.scores(ids, self._again(ids))
                found.append(self._picker.pick(scores))
                if doubtful or found[-1] != drafted or drafted in self._ends:
                    break
        finally:
            self._context.truncate(start + max(len(found), 1))
        if self._drafts and (draft or doubtful):
            right = sum(1 for a, b in zip(found, draft, strict=False) if a == b)
            self._drafts.learn(len(draft), right, saved=len(found) - (self.passes - passes))
        return found

    def _again(self, ids: list[int]) -> Float:
        """Compute what drafts have touched as plain decoding does; returns what follows `ids`, (V,)."""
        self._context.truncate(self._plain_to)
        for token in ids[self._plain_to - self._prompt :]:
            row = self._append([token], 1)
        self._plain_to = len(self._context)
        return row.squeeze(0)

    def _append(self, ids: list[int], num_logits: int) -> Float:
        self.passes += 1
        return self._context.append(ids, num_logits)
