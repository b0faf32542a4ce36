"""A checkpoint folder: `config.json`, `model.safetensors` (all that was trained), the tokenizer, the bank, samples.

config.json         CheckpointConfig
model.safetensors   connector, key projection, memory connector, value encoder
tokenizer.json      the language model's
memory/             the bank (not with `--memory none`)
metrics.jsonl       one line an evaluation: step, held-out loss, training loss, tokens a second
language/           the trained language model, adapters merged, in Hugging Face format (after stage "instruct")
curves.png          losses against steps
samples/            held-out and calibration pictures with their questions, for the exporter's gate
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tinyalign_edge.config import from_versioned, read_json, write_json
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory import Bank
from tinyalign_edge.prompt import Prompt, load_tokenizer
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.settings import CONFIG, SCHEMA_VERSION, CheckpointConfig, TowerRef
from tinyalign_edge.train.towers import LanguageTower, VisionTower, load_language, load_vision
from tinyalign_edge.train.vlm import load_vlm

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
MEMORY = "memory"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
CURVES = "curves.png"
LANGUAGE_FOLDER = "language"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint with its towers."""

    folder: Path
    config: CheckpointConfig
    vision: VisionTower
    language: LanguageTower
    model: AlignModel
    prompt: Prompt
    bank: Bank | None


def is_checkpoint(path: Path) -> bool:
    """Whether the folder holds a finished checkpoint."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def save_checkpoint(folder: Path, config: CheckpointConfig, model: AlignModel, tokenizer_json: str) -> None:
    """Write configuration, weights and tokenizer; the caller adds bank, samples and metrics."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.own_state().items()}
    save_file(state, folder / WEIGHTS)
    (folder / TOKENIZER).write_text(tokenizer_json, "utf-8")
    write_json(folder / f".{CONFIG}", config)
    (folder / f".{CONFIG}").replace(folder / CONFIG)  # last, and at once: it says that the checkpoint is whole


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and load the towers it names.

    Raises:
        InputError: not a checkpoint, or a tower cannot be loaded.
        BundleError: written by a newer version, damaged, or a tower is not the one it was trained with.
    """
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder}: not a checkpoint (no {CONFIG} with {WEIGHTS}); make one with 'tinyalign-edge train'"
        )
    config = _read_config(folder / CONFIG)
    vision, language, projector = _towers(folder, config)
    _same_tower(config.vision, vision.ref)
    _same_tower(config.language, language.ref)
    model = AlignModel(language.model, config.connector, config.memory, projector=projector)
    try:
        model.load_own_state(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise BundleError(f"{folder / WEIGHTS}: damaged or not of this config ({str(error).splitlines()[0]})") from None
    model.eval()
    prompt = Prompt(config.prompt, load_tokenizer(folder / TOKENIZER))
    bank = Bank(folder / MEMORY) if config.memory.kind != "none" else None
    return Checkpoint(folder, config, vision, language, model, prompt, bank)


def _towers(folder: Path, config: CheckpointConfig) -> tuple[VisionTower, LanguageTower, nn.Module | None]:
    own = config.language.path == LANGUAGE_FOLDER
    if config.whole:
        whole = load_vlm(Path(config.vision.path), template=config.prompt.chat_template)
        language = load_language(str(folder / LANGUAGE_FOLDER)) if own else whole.language
        return whole.vision, language, whole.projector
    vision = load_vision(config.vision.path, image=config.image)
    return vision, load_language(str(folder / LANGUAGE_FOLDER) if own else config.language.path), None


def _read_config(path: Path) -> CheckpointConfig:
    """Read a `config.json`; schema version 1 named one data file, by its path alone.

    Raises:
        InputError: it is none of ours.
        BundleError: as `from_versioned`.
    """
    data = read_json(path)
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError(f"{path.parent}: not a checkpoint (its {path.name} is of something else)")
    training = data.get("training")
    if isinstance(training, dict) and isinstance(training.get("data"), str):
        training["data"] = [{"path": training["data"], "sha256": ""}]
    return from_versioned(CheckpointConfig, data, path, newest=SCHEMA_VERSION)


def _same_tower(expected: TowerRef, found: TowerRef) -> None:
    if expected.sha256 != found.sha256:
        raise BundleError(
            f"{expected.path}: its weights changed since training (SHA-256 {found.sha256[:12]}, was "
            f"{expected.sha256[:12]}); restore them or train again"
        )
