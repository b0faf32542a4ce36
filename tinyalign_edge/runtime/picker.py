"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinyalign_edge.errors import InputError
from tinyalign_edge.runtime.options import Generation, LogitsProcessor

Float = npt.NDArray[np.float32]


class Picker:
    """Picks the tokens of one answer as `Generation` says, one after another.

    Args:
        options: of the answer.
        processors: applied after the repetition penalty.
    """

    def __init__(self, options: Generation, processors: Sequence[LogitsProcessor] = ()) -> None:
        self._options, self._processors = options, processors
        self._random = np.random.default_rng(options.seed)

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self._options.temperature == 0

    def scores(self, ids: Sequence[int], logits: Float) -> Float:
        """Logits (V,) of what follows `ids`, after penalty and processors.

        Raises:
            InputError: a processor returns another shape, or leaves no token.
        """
        penalty = self._options.repetition_penalty
        if penalty != 1 and ids:
            seen = np.unique(ids)
            logits = logits.copy()
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for processor in self._processors:
            logits = _checked(processor, processor(ids, logits), logits.shape)
        return logits

    def pick(self, scores: Float) -> int:
        """The token for `scores` (V,)."""
        if self.greedy:
            return int(scores.argmax())
        tokens, shares = _likely(scores, self._options)
        ends = shares.cumsum()
        return int(tokens[np.searchsorted(ends, self._random.random() * ends[-1], side="right")])


def _checked(processor: LogitsProcessor, found: object, shape: tuple[int, ...]) -> Float:
    try:
        logits = np.asarray(found, np.float32)
        good = logits.shape == shape and bool(np.isfinite(logits.max()))
    except (ValueError, TypeError):  # no numbers at all
        good = False
    if not good:
        raise InputError(f"logits processor {processor!r:.80}: must return {shape} numbers, some of them finite")
    return logits


def is_clear(scores: Float, margin: float) -> bool:
    """Whether the best of `scores` (V,) is above all others by at least `margin`."""
    return int(np.count_nonzero(scores > scores.max() - margin)) == 1


def _likely(scores: Float, options: Generation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, the most likely first, and their shares, which need not add up to 1."""
    tokens = np.flatnonzero(scores > -np.inf)
    if options.top_k is not None and options.top_k < len(tokens):
        tokens = tokens[np.argpartition(-scores[tokens], options.top_k - 1)[: options.top_k]]
    shares = np.exp((scores[tokens].astype(np.float64) - scores[tokens].max()) / options.temperature)
    shares /= shares.sum()
    # what is below both bounds can be in neither set, so that few are left to be sorted
    least = max((1 - options.top_p) / len(tokens), options.min_p * shares.max())
    tokens, shares = tokens[shares >= least], shares[shares >= least]
    order = np.argsort(-shares, kind="stable")
    tokens, shares = tokens[order], shares[order]
    before = shares.cumsum() - shares
    kept = before < options.top_p
    return tokens[kept], shares[kept]
