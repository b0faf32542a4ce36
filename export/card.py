"""A bundle's card: what it is and what was measured, for people, as `README.md` in its folder.

Nothing in it depends on when or how fast it was made: a second export writes the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tinyalign_edge.bundle import MEMORY_DIR, GateResult, Manifest
from tinyalign_edge.export.gate import LIMITS
from tinyalign_edge.export.plan import MAX_LEVELS
from tinyalign_edge.train.settings import TowerRef

CARD = "README.md"


def write_card(folder: Path, manifest: Manifest, towers: Mapping[str, TowerRef]) -> None:
    """Write the card of a bundle whose other files are all in `folder`."""
    parts = (
        f"# {manifest.name}",
        _summary(manifest),
        *_degraded(manifest.gate),
        "## Made of",
        markdown_table(("", "model", "type", "licence"), _towers(towers)),
        "A licence is what a tower's own files state; it is yours to keep.",
        "## Components",
        markdown_table(("component", "precision", "bytes"), _components(folder, manifest)),
        *_smoothed(manifest),
        *_cache(manifest),
        *_given_back(manifest),
        "## Compared with torch",
        *_gate(manifest.gate),
        "## Ask it",
        f'```\ntinyalign-edge ask {manifest.name} photo.jpg "What is in the picture?"\n'
        f"tinyalign-edge verify {manifest.name}\n```",
        "## Made with",
        ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items()) + ".",
    )
    (folder / CARD).write_text("\n\n".join(parts) + "\n", "utf-8")


def _summary(manifest: Manifest) -> str:
    memory = manifest.memory
    reads = {
        "none": "It has no memory.",
        "tokens": f"For each picture it reads {memory.k} entries of a memory bank, as texts.",
        "latents": f"For each picture it reads {memory.k} entries of a memory bank, as {memory.latents} latents each.",
        "hybrid": f"For each picture it reads {memory.k} entries of a memory bank, as texts with {memory.latents} "
        "latents of its picture each.",
    }[memory.kind]
    copies = " Words of these texts can be copied into the answer." if memory.copy_file else ""
    return (
        "A vision-language model as ONNX files for CPUs: it answers a question about a picture of "
        f"{manifest.image.width} x {manifest.image.height} pixels. {reads}{copies} Target: `{manifest.target}`, int8 "
        f"weights within ±{MAX_LEVELS[manifest.target]}."
    )


def _degraded(gate: GateResult | None) -> Iterable[str]:
    if gate is not None and not gate.passed:
        yield f"**Degraded: it failed the comparison with torch** ({'; '.join(gate.failures)})."


def _towers(towers: Mapping[str, TowerRef]) -> list[tuple[str, str, str, str]]:
    return [(what, Path(tower.path).name, tower.model_type, tower.licence) for what, tower in towers.items()]


def _components(folder: Path, manifest: Manifest) -> list[tuple[str, str, str]]:
    decoder, memory = manifest.decoder, manifest.memory
    seen = "vision encoder, connector" + (", key" if manifest.vision.key_dim else "")
    named = {
        (seen, manifest.vision.precision): [manifest.vision.file],
        ("language model", decoder.precision): [decoder.file, decoder.embed_file, *decoder.data_files],
    }
    if memory.file is not None:
        named["memory connector", manifest.vision.precision] = [memory.file]
        if memory.value_file is not None:
            named["value encoder of the memory", "fp32"] = [memory.value_file]
        if memory.copy_file is not None:
            named["copy term of the memory", "fp32"] = [memory.copy_file]
        bank = folder / MEMORY_DIR
        named["memory bank", memory.key_dtype] = [str(p.relative_to(folder)) for p in bank.rglob("*") if p.is_file()]
    return [
        (what, precision, f"{sum((folder / name).stat().st_size for name in names):,}")
        for (what, precision), names in named.items()
    ]


def _smoothed(manifest: Manifest) -> Iterable[str]:
    if manifest.decoder.smoothed:
        yield (
            "Outlier channels of the language model's activations are folded into neighbouring weights (SmoothQuant), "
            "which leaves what it computes as it is and loses less in int8."
        )


def _cache(manifest: Manifest) -> Iterable[str]:
    decoder = manifest.decoder
    if decoder.kv == "int8":
        yield (
            f"Keys and values are kept in int8, {decoder.position_bytes:,} bytes a position: a scale a channel, from "
            "calibration questions."
        )


def _given_back(manifest: Manifest) -> Iterable[str]:
    if not manifest.given_back:
        yield "Every matrix is in its component's precision: none had to be given back."
        return
    yield "In a better format than the rest of their component, because the comparison with torch needs it:"
    rows = [(n.component, f"`{n.node}`", n.format, f"{n.extra_bytes:+,}") for n in manifest.given_back]
    yield markdown_table(("component", "matrix", "format", "bytes"), rows)


def _gate(gate: GateResult | None) -> Iterable[str]:
    if gate is None:
        return
    limits = {name: f"{sign} {limit}" for name, (sign, limit) in LIMITS.items()}
    rows = [
        ("float32 graphs: largest error of a logit", f"{gate.fp32_max_logit_error:.1e}", limits["fp32 logit error"]),
        ("mean KL of next tokens, nats", f"{gate.mean_kl:.5f}", limits["mean KL"]),
        ("of the language model alone", f"{gate.decoder_mean_kl:.5f}", ""),
        ("next token equal", f"{gate.top1_agreement:.2%}", limits["next-token agreement"]),
        ("change of the answers' loss", f"{gate.nll_change:+.3%}", limits["NLL change"]),
        ("cosine of the visual tokens, mean", f"{gate.visual_cosine_mean:.5f}", limits["visual token cosine"]),
        ("least", f"{gate.visual_cosine_min:.5f}", ""),
        ("answers equal", f"{gate.answers_equal:.1%}", "reported"),
    ]
    if gate.memory_cosine_mean is not None:
        rows.insert(
            -1, ("cosine of the memory tokens, mean", f"{gate.memory_cosine_mean:.5f}", limits["memory token cosine"])
        )
    if gate.value_cosine_mean is not None:
        rows.insert(
            -1, ("cosine of new entries' latents, mean", f"{gate.value_cosine_mean:.5f}", limits["value cosine"])
        )
    yield f"{gate.answers} questions, {gate.tokens} tokens of their reference answers."
    yield markdown_table(("", "", "limit"), rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it, without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
