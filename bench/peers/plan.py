"""What is measured: engines and their environments, phases, and what one measurement costs about."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyalign_edge.bench.peers.shapes import ENCODERS, LANGUAGE, EncoderShape, LanguageShape

OURS = "tinyalign-edge"
GENAI = "onnxruntime-genai"
Kind = Literal["language", "encoder"]

DECODE_TOKENS = 64
PASS_TOKENS = (1, 2, 4, 8, 16)
PASS_CONTEXT = 256
PASS_REPEATS = 8  # in one measurement: a pass is short
MEASURED = tuple(name for name in (*LANGUAGE, *ENCODERS) if not name.startswith("smoke"))


@dataclass(frozen=True)
class Engine:
    """An engine at one precision. `module` is its file in `engines/`, `environment` the folder of its own packages."""

    name: str
    precision: str
    module: str
    environment: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    def python(self, root: Path) -> Path:
        """The interpreter below `root` that runs this engine."""
        return root / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


@dataclass(frozen=True)
class Phase:
    """One kind of measurement. `tokens` are counted a second: images for "encode"; "verify" gives seconds a pass."""

    name: Literal["prefill", "decode", "encode", "verify"]
    tokens: int = 1
    context: int = 0

    def request(self) -> dict[str, Any]:
        """What a worker is asked."""
        match self.name:
            case "prefill":
                return {"do": "prefill", "tokens": self.tokens}
            case "decode":
                return {"do": "decode", "tokens": self.tokens, "context": self.context}
            case "verify":
                return {"do": "verify", "tokens": self.tokens, "context": self.context, "repeats": PASS_REPEATS}
            case "encode":
                return {"do": "encode", "images": self.tokens}


@dataclass(frozen=True)
class Part:
    """What is measured interleaved and stored together: one model with one number of threads."""

    model: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.threads}"

    @property
    def kind(self) -> Kind:
        return "language" if self.model in LANGUAGE else "encoder"

    @property
    def shape(self) -> LanguageShape | EncoderShape:
        return LANGUAGE[self.model] if self.kind == "language" else ENCODERS[self.model]

    @property
    def rounds(self) -> int:
        return self.shape.rounds[self.threads]

    @property
    def resident(self) -> bool:
        """All engines are loaded at the same time."""
        return not isinstance(self.shape, LanguageShape) or self.shape.resident

    @property
    def phases(self) -> tuple[Phase, ...]:
        if self.kind == "encoder":
            return (Phase("encode"),)
        verify = [Phase("verify", tokens, PASS_CONTEXT) for tokens in PASS_TOKENS]
        return (
            *(Phase("prefill", tokens) for tokens in (64, 256, 768)),
            *(Phase("decode", DECODE_TOKENS, context) for context in (256, 1024)),
            *verify,
        )

    @property
    def engines(self) -> tuple[Engine, ...]:
        return LANGUAGE_ENGINES if self.kind == "language" else ENCODER_ENGINES


LANGUAGE_ENGINES = (
    Engine(OURS, "int8", "edge"),
    Engine(OURS, "int4", "edge"),
    Engine(OURS, "fp32", "edge"),
    Engine(GENAI, "int8", "genai", "venv-genai"),
    Engine(GENAI, "int8-last", "genai", "venv-genai"),
    Engine(GENAI, "int4", "genai", "venv-genai"),
    Engine("llama.cpp", "q8_0", "llama_cpp", "venv-llama"),
    Engine("llama.cpp", "q4_0", "llama_cpp", "venv-llama"),
    Engine("optimum", "fp32", "optimum"),
    Engine("optimum", "int8", "optimum"),
    Engine("torch", "fp32", "torch_eager"),
    Engine("torch", "bf16", "torch_eager"),
)
ENCODER_ENGINES = (
    Engine(OURS, "int8", "edge_encoder"),
    Engine(OURS, "fp32", "edge_encoder"),
    Engine("optimum", "fp32", "optimum_encoder"),
    Engine("optimum", "int8", "optimum_encoder"),
    Engine("torch", "fp32", "torch_encoder"),
    Engine("torch", "bf16", "torch_encoder"),
)
VERIFIERS = (LANGUAGE_ENGINES[0].label, f"{GENAI} int8")  # whose passes over a few tokens are timed


def measures(engine: Engine, phase: Phase) -> bool:
    """Whether this engine takes part in this phase."""
    return phase.name != "verify" or engine.label in VERIFIERS


def parts(models: list[str], threads: list[int]) -> list[Part]:
    """The parts of the models, in the order in which they are measured."""
    return [
        Part(model, n)
        for model in models
        for n in sorted((LANGUAGE[model] if model in LANGUAGE else ENCODERS[model]).rounds, reverse=True)
        if n in threads
    ]
