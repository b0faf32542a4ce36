"""The demo's language model: a small Llama and its tokenizer, pretrained on nothing but text about the world.

It never sees a picture. It learns to answer questions from captions in its context, of which some may tell of
another, similar scene: what retrieval gives it later.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyalign_edge.demo.fit import Progress, fit
from tinyalign_edge.demo.texts import caption, questions
from tinyalign_edge.demo.world import COLOURS, RADII, SHAPES, Scene, make_scene

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }} Answer:"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
# What byte pairs may grow into: the name of an object as a whole ("red circle"), else a word.
NAME = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b"
PIECES = rf" ?{NAME}| ?\w+| ?[^\w\s]+|\s+"
VOCABULARY = 640  # at most: fewer when every word has its token
WIDTH, LAYERS, HEADS, KV_HEADS, MLP_WIDTH, POSITIONS = 128, 3, 4, 2, 256, 256
ROPE_BASE = 100.0  # texts are short: turn faster, to tell near places apart
INIT = 0.08  # standard deviation of fresh weights: at the usual 0.02 so short a run learns no reading
LOOK_BACK = 0.5  # how sharply the first head looks at the token before, from the start
STEPS, BATCH, MUON_RATE = 900, 32, 0.012
TEXT_WEIGHTS = (1, 4, 4)  # of scenes with one, two and three objects: in the first there is little to tell apart
PROSE_WEIGHT = 0.2  # of captions and questions in the loss; the tokens of an answer weigh 1
HARD = ("exists", "colour", "shape", "relation", "beside")  # asked twice as often as the others
TRUE_SHARE = 0.65  # of captions when there are several; the others tell of a similar scene


@dataclass(frozen=True)
class Lesson:
    """A stretch of the run: its share of the steps, questions a text, and the chance of each count of captions."""

    share: float
    turns: int
    captions: dict[int, float]


# Few questions a text at first: the words of others get in the way of learning to look one up.
LESSONS = (Lesson(0.75, 2, {1: 1.0}), Lesson(0.25, 3, {0: 0.1, 1: 0.7, 2: 0.2}))


@dataclass(frozen=True)
class Text:
    """Token ids of one training text and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


def pretrain_language(folder: Path, *, seed: int, progress: Progress = lambda done, total: None) -> None:
    """Write a Llama and its tokenizer in Hugging Face format to `folder`, pretrained from `seed`."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(rng)
    model = LlamaForCausalLM(_config(tokenizer))
    _look_back(model)

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, weights = batch
        logits = model(input_ids=ids).logits[:, :-1]  # (B, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()

    fit(model, _batches(tokenizer, rng), loss, steps=STEPS, muon_rate=MUON_RATE, progress=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Start the first head as one that looks at the token before.

    Looking up an answer needs such a head, and to find it takes longer than the whole run. All embeddings share a
    direction, from which its query and its key are made; the key is turned ahead by one position.
    """
    shared = INIT * torch.randn(WIDTH)
    model.model.embed_tokens.weight += shared
    half = WIDTH // HEADS // 2
    angles = ROPE_BASE ** (-torch.arange(half) / half)  # of one position, a pair of channels each
    direction = LOOK_BACK * shared / shared.norm()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[: 2 * half] = torch.outer(torch.cat([torch.ones(half), torch.zeros(half)]), direction)
    attention.k_proj.weight[: 2 * half] = torch.outer(torch.cat([angles.cos(), angles.sin()]), direction)


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the world's texts."""
    scenes = [make_scene(rng) for _ in range(2000)]
    lines = [caption(scene, rng) for scene in scenes]
    lines += [f"Question: {q.text} Answer: {q.answer}" for scene in scenes for q in questions(scene, rng)]
    bpe = Tokenizer(models.BPE())
    bytes_of_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), bytes_of_pieces])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=MLP_WIDTH,
        max_position_embeddings=POSITIONS,
        rope_theta=ROPE_BASE,
        initializer_range=INIT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`STEPS` batches of texts of similar length: ids (B, T) int64 and weights (B, T) float32, 0 for padding."""
    for lesson in LESSONS:
        texts = [_text(tokenizer, lesson, rng) for _ in range(round(lesson.share * STEPS) * BATCH)]
        texts.sort(key=lambda text: len(text.ids))
        starts = list(range(0, len(texts), BATCH))
        rng.shuffle(starts)
        for start in starts:
            batch = texts[start : start + BATCH]
            ids = [torch.tensor(text.ids[:POSITIONS]) for text in batch]
            weights = [torch.tensor(text.weights[:POSITIONS]) for text in batch]
            yield (
                pad_sequence(ids, batch_first=True, padding_value=float(tokenizer.pad_token_id)),
                pad_sequence(weights, batch_first=True),
            )


def _text(tokenizer: PreTrainedTokenizerFast, lesson: Lesson, rng: random.Random) -> Text:
    """`<s>`, captions in random order, then questions about the scene with their answers."""
    scene = make_scene(rng, TEXT_WEIGHTS)
    pieces = [("<s>", PROSE_WEIGHT)]
    (count,) = rng.choices([*lesson.captions], [*lesson.captions.values()])
    for _ in range(count):
        told = scene if count == 1 or rng.random() < TRUE_SHARE else similar(scene, rng)
        pieces.append((rng.choice(("", " ")) + caption(told, rng), PROSE_WEIGHT))
    asked = questions(scene, rng) + [question for question in questions(scene, rng) if question.kind in HARD]
    for number, question in enumerate(rng.sample(asked, lesson.turns)):
        space = rng.choice(("", " ")) if number == 0 else ""
        pieces.append((f"{space}Question: {question.text} Answer:", PROSE_WEIGHT))
        pieces.append((f" {question.answer}</s>", 1.0))
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    weights = [weight for ids, (_, weight) in zip(encoded, pieces, strict=True) for _ in ids]
    return Text([i for ids in encoded for i in ids], weights)


def similar(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs in one respect: an object's looks, the order, the axis, or a missing object."""
    objects = list(scene.objects)
    change = rng.choice(("looks", "looks", "order", "axis", "fewer")) if len(objects) > 1 else "looks"
    if change == "axis":
        return replace(scene, axis="column" if scene.axis == "row" else "row")
    if change == "order":
        return replace(scene, objects=scene.objects[::-1])
    at = rng.randrange(len(objects))
    if change == "fewer":
        del objects[at]
        return replace(scene, objects=tuple(objects))
    field, values = rng.choice((("size", RADII), ("colour", COLOURS), ("shape", SHAPES)))
    objects[at] = replace(objects[at], **{field: rng.choice([*values])})
    return replace(scene, objects=tuple(objects))
