"""The bundle: the folder that `export` writes and the runtime reads, and its manifest `bundle.json`.

The manifest is the only contract between export and runtime. Nothing else in the folder is opened before its
SHA-256 has been compared with the manifest; paths are plain relative names, links are refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinyalign_edge.config import WITH_LATENTS, WITH_TOKENS, MemoryKind, from_versioned, parse_json, read_small
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.files import FileEntry, check_files, file_sha256

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
MEMORY_DIR = "memory"

Precision = Literal["int8", "int4", "fp32"]  # of a component, but for the matrices that were given back
Component = Literal["vision", "memory", "decoder"]
Format = Literal["int8", "int8_weight", "int4_weight", "fp32"]  # of a matrix: see `tinyalign_edge.export.product`
CachePrecision = Literal["fp32", "int8"]
Target = Literal["portable", "vnni", "avx2", "arm64"]


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes `pixel_values` (1, 3, height, width) float32; the order is that of the fields."""

    height: int
    width: int
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    resize: Literal["exact", "shortest_edge", "longest_edge", "none"] = "exact"
    resize_to: int = 0  # length of the edge that "shortest_edge" and "longest_edge" name; the latter then squashes
    center_crop: bool = False
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class PictureInTemplate:
    """Where a chat template puts the picture, for models that were trained with it inside the user's message."""

    marker: str  # the special token that stands for the visual tokens
    before: str = ""  # written right before and right after the visual tokens
    after: str = ""
    content: Literal["parts", "text"] = "parts"  # a message's content: a list of parts, or text with the marker in it


@dataclass(frozen=True)
class PromptConfig:
    """How a question becomes token ids: see `tinyalign_edge.prompt`. Without `picture` it comes first."""

    chat_template: str
    prepend_bos: bool
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    picture: PictureInTemplate | None = None


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of the answer loop; decoding is greedy."""

    max_new_tokens: int = 32


@dataclass(frozen=True)
class VisionBlock:
    """Vision encoder, connector and retrieval key in one graph.

    Inputs: `pixel_values` (B, 3, height, width) float32. Outputs: `visual_tokens` (B, N, D) float32; unless `key_dim`
    is 0, `key` (B, key_dim) float32 of unit length, the picture's part of a retrieval key; unless `feature_dim` is 0,
    `features` (B, N, C) float32, which the memory's value encoder reads.
    """

    file: str
    precision: Precision
    visual_tokens: int
    key_dim: int
    inputs: tuple[str, ...] = ("pixel_values",)
    outputs: tuple[str, ...] = ("visual_tokens", "key")
    feature_dim: int = 0  # C


@dataclass(frozen=True)
class DecoderBlock:
    """The language model as two graphs that share their weights file.

    `embed_file`: `input_ids` (B, T) int64 -> `embeddings` (B, T, D) float32.

    `file`: `inputs_embeds` (B, T, D) float32, `seqlens_k` (B,) int32 (keys valid after this call, minus one),
    `total_sequence_length` () int32, `num_logits` () int64, and per layer a key and a value buffer
    (B, kv_heads, S, head_dim), float32 or int8 as `kv` says, of fixed capacity S -> `logits` (B, num_logits, V)
    float32 of the last `num_logits` positions, and the same buffers, which must be bound to the same memory as the
    inputs. With `hidden` there is one more output, `hidden` (B, T, D) float32: the last hidden states, after the final
    norm, of all positions of the pass, which the memory's copy term reads.
    """

    file: str
    embed_file: str
    data_files: tuple[str, ...]
    precision: Precision
    layers: int
    width: int
    kv_heads: int
    head_dim: int  # of the buffers: padded to what the attention operator takes
    vocab_size: int
    max_positions: int
    smoothed: bool = False  # outlier channels of activations are folded into neighbouring weights
    kv: CachePrecision = "fp32"  # of keys and values; the graph holds an int8 cache's scales
    hidden: bool = False  # the graph gives its last hidden states
    graph: Literal["fused", "traced"] = "fused"  # "traced": by torch, for a family without a graph of its own; slower
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"

    @property
    def position_bytes(self) -> int:
        """What a position takes in the cache."""
        return self.layers * 2 * self.kv_heads * self.head_dim * {"fp32": 4, "int8": 1}[self.kv]


@dataclass(frozen=True)
class MemoryBlock:
    """How retrieved entries become memory tokens (M, D); `kind` "none" has neither bank nor graph.

    The graph takes `values` (M, value_dim) float32, `rank` (M,) int64, which entry each row belongs to, the most
    similar first, and `similarity` (M,) float32, and gives `memory_tokens` (M, D) float32. For "tokens" the values
    are the embeddings of an entry's token ids, for "latents" its `latents` rows of `latent_dim` numbers. For "hybrid"
    there are both: `values` (T, D), the embeddings of all entries' token ids, and two more inputs, `latents`
    (M - T, latent_dim) float32, those of all entries, and `order` (M,) int64, in which all latents and after them all
    values are read: entry by entry, its latents and then its text. `rank` and `similarity` are in this order.

    `question_file`, unless `question_dim` is 0, is the graph by which a retrieval key tells what is asked, too: `text`
    (T, D) float32, embeddings of a question's ids -> `question` (question_dim,) float32, of length 1 or 0. A retrieval
    key (key_dim,) has it beside the picture's `key`, with `question_weight`: see `tinyalign_edge.memory.side_by_side`.

    `value_file`, where there are latents, is the graph by which those of new entries are made: `features` (1, N, C)
    float32 of the vision graph and, for "latents" alone, `text` (1, T, D) float32, embeddings of at most `value_tokens`
    ids -> `latents` (1, L, latent_dim) float32.

    `copy_file`, where there are token ids and only together with `DecoderBlock.hidden`, is the graph by which the next
    token may be one of the memory's, of those M memory tokens that have an id: `logits` (A, V) float32 and `states`
    (A, D) float32, the hidden states of A positions, `texts` (M, 2, D) float32, those of the position before each
    memory token and of the token's own, `token_ids` (M,) int64, and `match` (A, M) float32, 1 where the token id before
    a memory token, in the same entry, is the one read at a position, else 0 -> `log_probabilities` (A, V) float32,
    which take the place of the logits. Without memory tokens it is not run. With `copy_end`, each entry of fewer than
    `value_tokens` ids is followed there by one place more: the token `copy_end`, twice the state of the entry's last
    token, which is also the token before it. With `copy_similarity` the graph takes `similarity` (1, M) float32 as
    well, of the entry that each place is of.
    """

    kind: MemoryKind
    k: int = 0
    floor: float = -1.0  # entries less similar than this are left out
    first: bool = False  # memory tokens stand before the visual tokens
    metric: Literal["cosine"] = "cosine"
    key_dim: int = 0
    key_dtype: Literal["int8"] = "int8"
    question_dim: int = 0  # of key_dim
    question_weight: float = 0.0
    value_tokens: int = 0  # the most ids kept of one entry's text, or read of it
    latents: int = 0  # L; 0 for "tokens"
    latent_dim: int = 0
    fingerprint: str = ""  # of the encoder and key projection, and the value encoder of latents
    file: str | None = None
    question_file: str | None = None
    value_file: str | None = None
    copy_file: str | None = None
    copy_end: int | None = None
    copy_similarity: bool = False


@dataclass(frozen=True)
class GivenBack:
    """A matrix in a better format than its component's, because the gate needs it there."""

    component: Component
    node: str
    format: Format
    extra_bytes: int


@dataclass(frozen=True)
class GateResult:
    """What `export` measured on held-out samples before it wrote the bundle: the exported files against torch.

    Attributes:
        passed: every figure is within its limit; if not, the bundle is a degraded one.
        failures: what is not, one sentence a figure.
        answers: samples, each a question with its reference answer.
        tokens: tokens of the references.
        fp32_max_logit_error: of the same graphs in float32.
        mean_kl: of the distributions that predict the references' tokens, in nats, from end to end.
        decoder_mean_kl: the same with the language model alone exported.
        top1_agreement: share of those distributions whose likeliest token is torch's.
        nll_change: of the references' mean loss, relative.
        visual_cosine_min, visual_cosine_mean: over the visual tokens.
        memory_cosine_mean: over the memory tokens; None without a memory.
        answers_equal: share of greedy answers that are torch's, each side with its own retrieval.
        value_cosine_mean: over the latents of new entries; None where entries hold token ids.
    """

    passed: bool
    failures: tuple[str, ...]
    answers: int
    tokens: int
    fp32_max_logit_error: float
    mean_kl: float
    decoder_mean_kl: float
    top1_agreement: float
    nll_change: float
    visual_cosine_min: float
    visual_cosine_mean: float
    memory_cosine_mean: float | None
    answers_equal: float
    value_cosine_mean: float | None = None


@dataclass(frozen=True)
class Manifest:
    """`bundle.json`."""

    schema_version: int
    name: str
    image: ImageConfig
    prompt: PromptConfig
    generation: GenerationConfig
    vision: VisionBlock
    decoder: DecoderBlock
    memory: MemoryBlock
    tokenizer_file: str
    probe_file: str
    target: Target
    given_back: tuple[GivenBack, ...]
    gate: GateResult | None
    licences: dict[str, str]
    tool_versions: dict[str, str]
    files: dict[str, FileEntry] = field(default_factory=dict)


def open_bundle(path: str | Path, *, expect_sha256: str | None = None) -> Manifest:
    """Read the manifest and compare every file outside `memory/` with it, before any parser sees the file.

    Raises:
        InputError: `path` is not a bundle.
        BundleError: damaged, hostile or written by a newer version; or not the bundle of `expect_sha256`.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such bundle folder; make one with 'tinyalign-edge export'")
    if not manifest_path.is_file() or manifest_path.is_symlink():
        raise InputError(f"{folder}: not a bundle (no {MANIFEST}); make one with 'tinyalign-edge export'")
    data = read_small(manifest_path)
    found = hashlib.sha256(data).hexdigest()
    if expect_sha256 is not None and found != expect_sha256.lower():
        raise BundleError(f"{manifest_path}: SHA-256 is {found}, expected {expect_sha256}; fetch the bundle again")
    manifest = from_versioned(Manifest, parse_json(data, manifest_path), manifest_path, newest=SCHEMA_VERSION)
    check_files(folder, manifest.files)
    _refuse_strangers(folder, manifest.files)
    _check_references(manifest, manifest_path)
    _check_values(manifest, manifest_path)
    return manifest


def _refuse_strangers(folder: Path, files: dict[str, FileEntry]) -> None:
    """A graph may name further files of its own accord: there must be none that the manifest does not list."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise BundleError(f"{path}: is a link; bundles hold plain files only")
        if path.is_file() and name not in files and name != MANIFEST and not name.startswith(MEMORY_DIR + "/"):
            raise BundleError(f"{path}: the manifest does not list it; remove it")


def _check_values(manifest: Manifest, where: Path) -> None:
    """Numbers within bounds, so that no later step has to doubt them."""
    image, prompt, decoder, memory = manifest.image, manifest.prompt, manifest.decoder, manifest.memory
    vision, with_latents = manifest.vision, memory.kind in WITH_LATENTS
    seen = ("visual_tokens", *("key",) * bool(vision.key_dim), *("features",) * bool(vision.feature_dim))
    sizes = (decoder.width, decoder.kv_heads, decoder.head_dim, decoder.vocab_size, vision.visual_tokens)
    optional = (vision.key_dim, vision.feature_dim, memory.question_dim, memory.latents, memory.latent_dim)
    templates = (decoder.past_key, decoder.past_value, decoder.present_key, decoder.present_value)
    within = {
        "image size": 0 < image.height <= 8192 and 0 < image.width <= 8192 and 0 <= image.resize_to <= 8192,
        "image.mean and image.std": len(image.mean) == len(image.std) == 3 and 0 not in image.std,
        "image numbers": all(abs(x) < 1e6 for x in (image.rescale, *image.mean, *image.std)),
        "prompt.eos_token_ids": 0 < len(prompt.eos_token_ids) <= 64,
        "prompt.picture.marker": prompt.picture is None or bool(prompt.picture.marker),
        "vision.outputs": vision.outputs == seen,
        "vision.key_dim": memory.kind == "none" or vision.key_dim == memory.key_dim - memory.question_dim,
        "memory.question_file": (memory.question_file is not None) == (memory.question_dim > 0),
        "context size": 0 < prompt.max_context_tokens <= decoder.max_positions <= 1 << 24,
        "generation.max_new_tokens": manifest.generation.max_new_tokens > 0,
        "decoder.layers": 0 < decoder.layers <= 1024,
        "sizes of tensors": min(sizes) > 0 and min(optional) >= 0 and max(sizes + optional) <= 1 << 24,
        "decoder name templates": all(t.count("%") == 1 and "%d" in t for t in templates),
        "memory.k": 0 <= memory.k <= 4096,
        "memory.question_weight": 0 <= memory.question_weight <= 1,
        "memory.value_tokens": 0 <= memory.value_tokens <= decoder.max_positions,
        "memory.value_file": (memory.value_file is not None) == with_latents == (vision.feature_dim > 0),
        "memory.latents": not with_latents or min(memory.latents, memory.latent_dim) > 0,
        "memory.copy_end": memory.copy_end is None or 0 <= memory.copy_end < decoder.vocab_size,
        "memory.copy_file": memory.copy_file is None or (memory.kind in WITH_TOKENS and decoder.hidden),
    }
    for what, good in within.items():
        if not good:
            raise BundleError(f"{where}: {what} is out of bounds; export the bundle again")


def _check_references(manifest: Manifest, where: Path) -> None:
    """Every file that a block names must be one whose hash has been compared."""
    named = [manifest.vision.file, manifest.decoder.file, manifest.decoder.embed_file, *manifest.decoder.data_files]
    named += [manifest.tokenizer_file, manifest.probe_file]
    memory = manifest.memory
    named += [name for name in (memory.file, memory.question_file, memory.value_file, memory.copy_file) if name]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"{where}: names the file {name!r} but gives no hash of it; export the bundle again")


def file_entries(folder: Path, *, skip: str = MEMORY_DIR) -> dict[str, FileEntry]:
    """Size and hash of every file below `folder` but the manifest and the folder `skip`, sorted by name."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.startswith(skip + "/"):
            entries[name] = FileEntry(path.stat().st_size, file_sha256(path))
    return entries
