"""What is measured: a picture, a question and an answer of stated sizes."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from tinyalign_edge.errors import InputError
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.runtime.probe import QUESTION
from tinyalign_edge.runtime.sight import EncodedImage

Float = npt.NDArray[np.float32]

WIDTH, HEIGHT, QUALITY = 640, 480, 90  # of the picture: a JPEG, as cameras and messengers send them
COARSE, GRAIN = 16, 6.0  # pixels between its random colours, and the deviation of its noise, of 255
FILLERS = (" a", " in", " the", " x", ".", "?", "x", "e", "1")  # of which one adds a single token to a question


@dataclass(frozen=True)
class Work:
    """The sizes of what is measured; None leaves a size to the bundle.

    Attributes:
        visual_tokens: that the language model reads of a picture: the picture's own, repeated or cut off. The vision
            graph always computes the bundle's.
        prompt_tokens: of the chat template with the question; None: the probe's question as it is.
        new_tokens: of every answer; the tokens that would end one are ruled out.
        contexts: positions before the first of the tokens that "per_token" is measured on; none: the answer's own.
        repetitions: of everything but loading, spread over `BLOCKS` processes.
        warmup: repetitions of every process that do not count.
    """

    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int = 32
    contexts: tuple[int, ...] = ()
    repetitions: int = 20
    warmup: int = 2

    def __post_init__(self) -> None:
        sizes = (self.visual_tokens, self.prompt_tokens, self.new_tokens, self.repetitions, *self.contexts)
        names = ("--visual-tokens", "--prompt-tokens", "--new-tokens", "--repetitions", *["--context"] * len(sizes))
        for name, size in zip(names, sizes, strict=False):
            least = 2 if name == "--new-tokens" else 1  # the first token is prefill's
            if size is not None and not least <= size <= 1 << 24:
                raise InputError(f"{name} {size}: must be at least {least}")
        if not 0 <= self.warmup <= 1000:
            raise InputError(f"--warmup {self.warmup}: must be 0 to 1000")
        if len(set(self.contexts)) < len(self.contexts):
            raise InputError("--context: a length is named twice; name each once")


def picture() -> bytes:
    """A JPEG of smooth colours and grain, always the same; its bytes are about those of a photograph."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (HEIGHT // COARSE, WIDTH // COARSE, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, GRAIN, (HEIGHT, WIDTH, 1))
    image, file = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)), io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def question_of(prompt: Prompt, tokens: int | None) -> str:
    """A question that makes a prompt of exactly so many token ids; None: the probe's.

    Raises:
        InputError: there is none: the template alone is longer, or no known text adds a single token.
    """
    if tokens is None:
        return QUESTION
    question = "a"
    count = prompt_length(prompt, question)
    if count > tokens:
        raise InputError(f"--prompt-tokens {tokens}: chat template and shortest question take {count}; ask for more")
    while count < tokens:
        longer = (question + filler for filler in FILLERS)
        found = next((text for text in longer if prompt_length(prompt, text) == count + 1), None)
        if found is None:
            raise InputError(f"--prompt-tokens {tokens}: this tokenizer makes no question of it; try {count}")
        question, count = found, count + 1
    return question


def prompt_length(prompt: Prompt, question: str) -> int:
    """Token ids of the chat template with a question."""
    ids = prompt.question(question)
    return len(ids.before) + len(ids.after)


def reshaped(image: EncodedImage, visual_tokens: int | None) -> EncodedImage:
    """`image` with so many visual tokens, its own repeated or cut off; None: as it is."""
    if visual_tokens is None:
        return image
    return replace(image, visual_tokens=np.resize(image.visual_tokens, (visual_tokens, image.visual_tokens.shape[1])))


def never_ending(ends: Collection[int]) -> Callable[[Sequence[int], Float], Float]:
    """A logits processor that rules out the tokens that end an answer."""
    ruled_out = sorted(ends)

    def process(_: Sequence[int], logits: Float) -> Float:
        logits = logits.copy()
        logits[ruled_out] = -np.inf
        return logits

    return process
