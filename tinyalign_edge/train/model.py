"""Frozen towers and trained connectors as one module: packed batches in, loss or answers out.

One row of a batch is `before | memory tokens | visual tokens | turn 0 | turn 1 | ...`, or the visual tokens first
(`MemorySettings.first`). Every turn attends to the part before the turns and to itself, never to another turn, and its
positions begin where that part ends: each question is trained exactly as it is asked alone, for the price of one pass.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.train.connector import (
    NEARLY_CLOSED,
    OPEN,
    Connector,
    KeyProjection,
    MemoryConnector,
    Patches,
    PictureEncoder,
    ValueEncoder,
)
from tinyalign_edge.train.copying import CopyHead, Texts, label_losses, memory_texts, mix
from tinyalign_edge.train.paper import FusedKey, RandomPerceiver, SideBySideConnector
from tinyalign_edge.train.question_key import QuestionKey
from tinyalign_edge.train.reconstruct import Vocabulary, sum_over_answers, text_losses, vocabulary_of
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings

SHARED = 0  # block number of the part before the turns; turn t has block t + 1, padding -1
PADDING = -1
IGNORED = -100
KEYS = ("key.", "question_key.", "fused_key.")  # names of weights that keys are made with begin so
SLIDING = "sliding_attention"  # transformers' name of layers with a window


class MemoryInputs(TypedDict):
    """Values of all entries that the rows of a batch retrieved, one after another (M tokens in all)."""

    rank: Tensor  # (M,) int64
    similarity: Tensor  # (M,) float32
    token_ids: NotRequired[Tensor]  # (M,) int64; "hybrid": fewer, of the texts alone; "latents": (E, T), padded
    token_mask: NotRequired[Tensor]  # "latents" in training: (E, T) bool, true where `token_ids` are not padding
    features: NotRequired[Tensor]  # with latents, in training: (E, N, C) float32
    latents: NotRequired[Tensor]  # from a bank: (E * L, latent_dim) float32; "paper": (M, K * latent_dim)
    order: NotRequired[Tensor]  # "hybrid": (M,) int64, in which all latents and then all token ids are read


class AlignModel(nn.Module):
    """A language model, frozen or not, and the parts that always train."""

    accepts_loss_kwargs = True  # for the Trainer: it gives `forward` the answer tokens of a whole step
    reconstruct = 0.0  # weight of the own loss of latents in `forward`
    _kept_vocabulary: Vocabulary | None = None

    def __init__(
        self,
        language: Any,
        connector: ConnectorSettings,
        memory: MemorySettings,
        *,
        projector: nn.Module | None = None,  # a whole model's own, in place of a connector that is trained
        dropout: float = 0.0,  # of what the connector reads
    ) -> None:
        super().__init__()
        embeddings = language.get_input_embeddings().weight.detach()
        self.language = language
        self.memory_settings = memory
        self.pool = Patches(connector)
        rms = float(embeddings.float().pow(2).mean().sqrt())
        self.connector = projector or Connector(connector, rms, dropout=dropout)
        regions_dim = connector.feature_dim * memory.key_grid**2
        self.key = KeyProjection(connector, memory.key_grid, min(memory.key_dim - memory.question_dim, regions_dim))
        self.question_key = QuestionKey(connector.width, memory.question_dim) if memory.question_dim else None
        self.fused_key = FusedKey(self.connector) if memory.key == "fused" else None
        self.memory_connector: MemoryConnector | SideBySideConnector | None = None
        self.value_encoder: ValueEncoder | PictureEncoder | RandomPerceiver | None = None
        if memory.kind == "paper":
            self.memory_connector = SideBySideConnector(memory, connector.width)
            self.value_encoder = RandomPerceiver(memory, connector.input_dim, connector.width)
        elif memory.kind != "none":
            self.memory_connector = MemoryConnector(memory, embeddings, opening=NEARLY_CLOSED if projector else OPEN)
            if memory.kind == "latents":
                self.value_encoder = ValueEncoder(memory, connector.input_dim, embeddings)
            elif memory.kind == "hybrid":
                self.value_encoder = PictureEncoder(memory, connector.input_dim)
        self.copy_head = CopyHead(connector.width, memory.copy_dim) if memory.copy_dim else None

    def train(self, mode: bool = True) -> AlignModel:
        """A language model or connector that does not train has no dropout either."""
        super().train(mode)
        for part in (self.language, self.connector):
            if not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        return self

    def freeze_values(self) -> None:
        """From now on the value encoder stays as it is."""
        assert self.value_encoder is not None
        self.value_encoder.requires_grad_(False)

    def turn_values(self) -> None:
        """Turn what latents begin as away from the embeddings: other directions at random, of the same length, in what
        compresses a text and in what brings latents back to the language model's width."""
        assert isinstance(self.value_encoder, ValueEncoder) and isinstance(self.memory_connector, MemoryConnector)
        assert self.memory_connector.expand is not None
        nn.init.orthogonal_(self.value_encoder.compress)
        nn.init.orthogonal_(self.memory_connector.expand.weight)

    def freeze_all_but_copying(self) -> None:
        """From now on the copy term alone trains."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(name.startswith("copy_head."))

    def own_state(self) -> dict[str, Tensor]:
        """The state of everything but the language model: what a checkpoint keeps."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("language.")}

    def key_state(self) -> dict[str, Tensor]:
        """The part of `own_state` that keys are made with; it is not trained."""
        return {name: value for name, value in self.own_state().items() if name.startswith(KEYS)}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Undo `own_state`; raises RuntimeError where names or shapes differ."""
        language = {name: value for name, value in self.state_dict().items() if name.startswith("language.")}
        self.load_state_dict({**language, **state}, strict=True)

    def trained_state(self) -> dict[str, Tensor]:
        """What an interrupted run needs: `own_state` and the weights of the language model that train."""
        tuned = {
            name: weight.detach()
            for name, weight in self.named_parameters()
            if weight.requires_grad and name.startswith("language.")
        }
        return self.own_state() | tuned

    def values(self, memory: MemoryInputs) -> Tensor:
        """The entries' values as the memory connector reads them: (M, D) embeddings or (M, latent_dim) latents."""
        kind = self.memory_settings.kind
        if kind not in WITH_TOKENS:
            return self._latents(memory)
        text: Tensor = self.language.get_input_embeddings()(memory["token_ids"])
        if kind == "tokens":
            return text
        assert isinstance(self.memory_connector, MemoryConnector)
        return self.memory_connector.joined(self._latents(memory), text, memory["order"])

    def _latents(self, memory: MemoryInputs) -> Tensor:
        """The latents of all entries, (E * L, latent_dim), made unless a bank has them."""
        if "latents" in memory:
            return memory["latents"]
        return self.latents(memory["features"], memory["token_ids"], memory.get("token_mask")).flatten(0, 1)

    def latents(self, features: Tensor, token_ids: Tensor, token_mask: Tensor | None) -> Tensor:
        """The value encoder's latents (E, L, latent_dim) of features (E, N, C) and, unless a hybrid entry has the text
        beside them, texts (E, T)."""
        assert self.value_encoder is not None
        if isinstance(self.value_encoder, PictureEncoder):
            seen: Tensor = self.value_encoder(features)
            return seen
        text = self.language.get_input_embeddings()(token_ids).float()
        out: Tensor = self.value_encoder(features, text, token_mask)
        return out

    def memory_tokens(self, memory: MemoryInputs) -> Tensor:
        """The memory tokens (M, D) of all entries."""
        assert self.memory_connector is not None
        tokens: Tensor = self.memory_connector(self.values(memory), memory["rank"], memory["similarity"])
        return tokens

    def inputs_embeds(self, input_ids: Tensor, visual_mask: Tensor, visual: Tensor, memory_mask: Tensor,
                      memory: MemoryInputs | None) -> Tensor:  # fmt: skip
        """Embeddings (B, S, D) with visual tokens (V, D) and memory tokens put where the masks say, in their order."""
        embeds: Tensor = self.language.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(visual_mask[..., None], visual.to(embeds.dtype))
        if self.memory_connector is not None and memory is not None and memory["rank"].numel():
            embeds = embeds.masked_scatter(memory_mask[..., None], self.memory_tokens(memory).to(embeds.dtype))
        return embeds

    def logits(self, embeds: Tensor, position_ids: Tensor, block: Tensor, wanted: Tensor, *, input_ids: Tensor,
               memory_mask: Tensor, memory: MemoryInputs | None) -> Tensor:  # fmt: skip
        """Logits (W, V) at the positions where `wanted` (B, S) is true; with a copy term, log probabilities."""
        hidden = self.hidden(embeds, position_ids, block)
        logits, copies = self._next(hidden, wanted, input_ids, memory_mask, memory)
        return logits if copies is None else mix(logits, *copies)

    def _next(self, hidden: Tensor, wanted: Tensor, input_ids: Tensor, memory_mask: Tensor,
              memory: MemoryInputs | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """What `logits` mixes: the vocabulary's logits (W, V), and with a copy term the shares (W, 1 + M) of vocabulary
        and memory tokens with the ids (W, M) of these."""
        logits = self.vocabulary_logits(hidden[wanted])
        if self.copy_head is None or memory is None:
            return logits, None
        texts = self.texts(hidden, memory_mask, memory)
        shares = self.copy_head.shares(hidden, input_ids, texts)[wanted]
        return logits, (shares, texts.token_ids[wanted.nonzero()[:, 0]])

    def texts(self, hidden: Tensor, memory_mask: Tensor, memory: MemoryInputs) -> Texts:
        """What can be copied, given the hidden states (B, S, D) of whole rows."""
        settings, rank, similarity = self.memory_settings, memory["rank"], memory["similarity"]
        if "order" in memory:  # of hybrid entries only the token ids, which follow all latents
            words = memory["order"] >= len(rank) - len(memory["token_ids"])
            rank, similarity = rank[words], similarity[words]
            memory_mask = memory_mask.masked_scatter(memory_mask, words)
        return memory_texts(hidden, memory_mask, memory["token_ids"], rank, similarity,
                            end=settings.copy_end, limit=settings.value_tokens)  # fmt: skip

    def hidden(self, embeds: Tensor, position_ids: Tensor, block: Tensor) -> Tensor:
        """The language model's last hidden states (B, S, D)."""
        config = self.language.config
        hidden: Tensor = getattr(self.language, body_name(self.language))(
            inputs_embeds=embeds,
            attention_mask=attention_masks(config, block, position_ids, embeds.dtype),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """The language model's logits (..., V) for last hidden states (..., D)."""
        config = self.language.config
        logits: Tensor = self.language.get_output_embeddings()(hidden).float()
        logits = logits / getattr(config, "logits_scaling", 1.0)  # what follows lm_head in the families that have it
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def answer_logits(self, **batch: Any) -> Tensor:
        """Logits (W, V) at the positions of a batch that predict an answer's token, in row-major order.

        A label stands at the position that predicts it; other positions hold `IGNORED`.
        """
        logits, copies = self._answers(**batch)
        return logits if copies is None else mix(logits, *copies)

    def answer_losses(self, *, labels: Tensor, **batch: Any) -> Tensor:
        """Negative log-likelihood of every answer token of a batch, in nats: (W,), as `answer_logits`."""
        logits, copies = self._answers(labels=labels, **batch)
        tokens = labels[labels != IGNORED]
        if copies is None:
            return nn.functional.cross_entropy(logits, tokens, reduction="none")
        return label_losses(logits, *copies, tokens)

    def _answers(self, *, input_ids: Tensor, position_ids: Tensor, block: Tensor, labels: Tensor,
                 visual_mask: Tensor, memory_mask: Tensor, features: Tensor,
                 memory: MemoryInputs | None = None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """`_next` at the positions of a batch that predict an answer's token."""
        embeds = self.inputs_embeds(input_ids, visual_mask, self.connector(features), memory_mask, memory)
        hidden = self.hidden(embeds, position_ids, block)
        return self._next(hidden, labels != IGNORED, input_ids, memory_mask, memory)

    def own_losses(self, memory: MemoryInputs, memory_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean own loss of each row's latents, summed over all answer tokens of a batch.

        The memory tokens are made anew for it: that is little beside the language model's pass.
        """
        size = self.memory_settings.latents
        tokens = self.memory_tokens(memory).unflatten(0, (-1, size))  # (E, L, D)
        losses, entries = text_losses(tokens, memory["token_ids"], memory["token_mask"], self._vocabulary())
        row_of = torch.arange(len(labels), device=labels.device).repeat_interleave(memory_mask.sum(dim=1) // size)
        return sum_over_answers(losses, row_of[entries], (labels != IGNORED).sum(dim=1))

    def _vocabulary(self) -> Vocabulary:
        """The language model's input embeddings as `text_losses` reads them, kept while they do not train."""
        embeddings = self.language.get_input_embeddings()
        weight: Tensor = embeddings.weight
        kept = self._kept_vocabulary
        if kept is not None and not weight.requires_grad and kept.mean.device == weight.device:
            return kept
        with torch.inference_mode(False), torch.no_grad():  # whoever asks first, a pass backwards may follow
            made = vocabulary_of(embeddings(torch.arange(len(weight), device=weight.device)))  # as read: some scale
        self._kept_vocabulary = None if weight.requires_grad else made
        return made

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Any) -> dict[str, Tensor]:
        """Mean loss over the answer tokens of a batch, or its part of the mean over all tokens of a step.

        With `reconstruct`, each answer token's loss is that of its row's memory more, times that weight; that part
        stands apart, too, as it is before it is weighed.
        """
        losses = self.answer_losses(**batch)
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss, own = losses.sum() / count, losses.new_zeros(())
        if self.reconstruct and batch["memory"] is not None:
            own = self.own_losses(batch["memory"], batch["memory_mask"], batch["labels"]) / count
            loss = loss + self.reconstruct * own
        if not loss.requires_grad:  # nobody in the batch has a memory, and nothing else trains
            loss = loss + 0 * next(weight for weight in self.parameters() if weight.requires_grad).sum()
        return {"loss": loss, "own_loss": own.detach()}


def body_name(language: Any) -> str:
    """The attribute of a causal language model that is the model without its head."""
    prefix = str(language.base_model_prefix)
    return prefix if hasattr(language, prefix) else "model"  # Gemma 3's class names a prefix that it does not have


def attention_masks(config: Any, block: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive masks (B, 1, S, S), by kind of layer where the language model has layers with a sliding window.

    transformers applies the window to no mask that it is given, so it is in the mask, counted in positions.
    """
    full = attention_bias(block, dtype)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not window:
        return full
    far = position_ids[:, None, :] <= position_ids[:, :, None] - window  # (B, S, S)
    near = full.masked_fill(far[:, None], torch.finfo(dtype).min)
    kinds = getattr(config, "layer_types", None)
    if kinds and SLIDING in kinds:
        return {"full_attention": full, SLIDING: near}
    return full if kinds else near


def attention_bias(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, S, S): causal, own block and the shared one only, no padding."""
    size = block.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=block.device).tril()
    seen = (block[:, None, :] == SHARED) | (block[:, None, :] == block[:, :, None])
    allowed = causal & seen & (block[:, None, :] != PADDING)
    allowed = allowed | torch.eye(size, dtype=torch.bool, device=block.device)  # no row is empty
    bias = torch.zeros(allowed.shape, dtype=dtype, device=block.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
