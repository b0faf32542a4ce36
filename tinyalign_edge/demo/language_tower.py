"""The demo's language model: a small Llama and its tokenizer, pretrained on nothing but text about the world.

It never sees a picture. It learns to answer questions from captions in its context, of which some may tell of
another, similar scene: what retrieval gives it later.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyalign_edge.demo.texts import caption, questions
from tinyalign_edge.demo.world import COLOURS, RADII, SHAPES, Scene, make_scene

Progress = Callable[[int, int], None]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }} Answer:"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
VOCABULARY = 512  # at most: fewer when every word has its token
WIDTH, LAYERS, HEADS, KV_HEADS, MLP_WIDTH, POSITIONS = 128, 4, 4, 2, 384, 256
STEPS, BATCH, LEARNING_RATE = 300, 32, 1.5e-3
INIT = 0.08  # standard deviation of fresh weights: at the usual 0.02 so short a run learns no reading
PROSE_WEIGHT = 0.1  # of captions and questions in the loss; the tokens of an answer weigh 1
CAPTION_COUNTS = {0: 0.1, 1: 0.4, 2: 0.15, 3: 0.15, 4: 0.2}  # share of texts by captions before the questions
TRUE_SHARE = 0.65  # of captions when there are several; the others tell of a similar scene


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
    model = LlamaForCausalLM(_config(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step, (ids, weights) in enumerate(_batches(tokenizer, rng), start=1):
        logits = model(input_ids=ids).logits[:, :-1]  # (B, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, STEPS)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the world's texts."""
    scenes = [make_scene(rng) for _ in range(2000)]
    lines = [caption(scene, rng) for scene in scenes]
    lines += [f"Question: {q.text} Answer: {q.answer}" for scene in scenes for q in questions(scene, rng)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
        initializer_range=INIT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`STEPS` batches of texts of similar length: ids (B, T) int64 and weights (B, T) float32, 0 for padding."""
    texts = [_text(tokenizer, rng) for _ in range(STEPS * BATCH)]
    texts.sort(key=lambda text: len(text.ids))
    starts = list(range(0, len(texts), BATCH))
    rng.shuffle(starts)
    for start in starts:
        batch = texts[start : start + BATCH]
        length = min(max(len(text.ids) for text in batch), POSITIONS)
        ids = torch.full((BATCH, length), tokenizer.pad_token_id)
        weights = torch.zeros(BATCH, length)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = torch.tensor(text.ids[:length])
            weights[row, : len(text.ids)] = torch.tensor(text.weights[:length])
        yield ids, weights


def _text(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Text:
    """`<s>`, captions in random order, then the questions about the scene with their answers."""
    scene = make_scene(rng)
    pieces = [("<s>", PROSE_WEIGHT)]
    (count,) = rng.choices([*CAPTION_COUNTS], [*CAPTION_COUNTS.values()])
    for _ in range(count):
        told = scene if count == 1 or rng.random() < TRUE_SHARE else similar(scene, rng)
        pieces.append((rng.choice(("", " ")) + caption(told, rng), PROSE_WEIGHT))
    for number, question in enumerate(questions(scene, rng)):
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
