"""What the command line shows people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyalign_edge.bundle import MEMORY_DIR, Manifest
from tinyalign_edge.emi import Emi
from tinyalign_edge.evaluate import Scores
from tinyalign_edge.memory import BankStats, Entry
from tinyalign_edge.runtime.answer import Answer
from tinyalign_edge.runtime.build import Built
from tinyalign_edge.runtime.memory import open_bank
from tinyalign_edge.runtime.probe import ProbeResult
from tinyalign_edge.runtime.verify import Verified


def answer_json(answer: Answer) -> dict[str, Any]:
    """The object that `ask --json` prints."""
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": {stage: round(value, 3) for stage, value in answer.timings_ms.items()},
        "memories": [
            {"text": m.text, "source": m.source, "similarity": round(m.similarity, 4)} for m in answer.memories
        ],
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry without its value, as the `memory` commands print it."""
    shown = {name: getattr(entry, name) for name in ("id", "text", "question", "source", "time")}
    return {**shown, "similarity": round(entry.similarity, 4)}


def print_entries(entries: Sequence[Entry]) -> None:
    """What `memory search` shows."""
    if not entries:
        print("nothing at or above the similarity at which the memory speaks")
    for e in entries:
        origin = ", ".join(part for part in (e.source, e.time) if part)
        print(f"{e.id:>6}  {e.similarity:.3f}  {e.text}" + (f"  ({origin})" if origin else ""))


def print_bank(stats: BankStats) -> None:
    """What `memory stats` shows."""
    print_table(
        [
            ("entries", f"{stats.entries} of {stats.kind}, keys of {stats.key_dim}"),
            ("key and value", f"{stats.entry_bytes:.0f} bytes an entry"),
            ("texts", megabytes(stats.record_bytes)),
            ("thumbnails", megabytes(stats.thumbnail_bytes)),
            ("files", f"{megabytes(stats.total_bytes)} in {stats.segments} segments"),
            ("journal", f"{stats.journal_entries} entries"),
            (
                "graph",
                f"{megabytes(stats.graph_bytes)} over {stats.graph_entries} entries" if stats.graph_entries else "none",
            ),
            ("generation", f"{stats.generation}"),
        ]
    )


def print_built(built: Built) -> None:
    """What `memory build` shows."""
    if not built.complete:
        print(f"shards: {built.shards_done} of {built.shards} are done; who finishes the last one joins them")
        return
    joined = built.duplicates is not None  # else by another process, which has said what became of the rows
    rows = [
        ("rows", f"{built.rows} in {built.shards} shards" + (f", {built.skipped} bad ones skipped" if joined else "")),
        *([("text alone", f"{built.without_picture} rows, which are no entries")] if joined else []),
        (
            "entries",
            f"{built.entries}" + (f", {built.duplicates} duplicates merged" if joined else ", joined elsewhere"),
        ),
        ("files", f"{megabytes(built.bytes)}, and a graph of {megabytes(built.graph_bytes)}"),
    ]
    rows += [("held back", f"{built.held_back} rows, to measure the loss on")] if built.held_back else []
    rows += [
        (
            f"{megabytes(p.budget_bytes)}",
            f"{p.entries} entries, {megabytes(p.bytes)}, {p.nll_per_token:.4f} nats a token",
        )
        for p in built.points
    ]
    print_table(rows)


def print_table(rows: Iterable[tuple[str, str]], title: str = "") -> None:
    """Two columns: what, and its value."""
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    Console().print(table)


def print_scores(scores: Scores) -> None:
    """The result of `eval`."""
    print_table(
        [
            ("questions", f"{scores.n}"),
            ("exact match", f"{scores.exact_match:.1%} ± {scores.exact_match_ci95:.1%} (95 %)"),
            ("token F1", f"{scores.token_f1:.1%}"),
            ("loss of the reference", f"{scores.nll_per_token:.4f} nats a token"),
        ]
    )


def print_emi(emi: Emi) -> None:
    """The result of `eval --emi`."""
    rows = [
        ("answer tokens", f"{emi.tokens} of {emi.n} questions"),
        ("the picture tells", f"{emi.image:+.4f} nats a token"),
    ]
    if emi.memory is not None and emi.shuffled_memory is not None:
        rows.append(("the memory adds", f"{emi.memory:+.4f} nats a token"))
        rows.append(("another picture's adds", f"{emi.shuffled_memory:+.4f} nats a token"))
    print_table(rows)


def print_gate(manifest: Manifest) -> None:
    """The result of `export`."""
    gate, given_back = manifest.gate, manifest.given_back
    if gate is None:
        return
    rows = [
        ("target", manifest.target),
        ("questions", f"{gate.answers} ({gate.tokens} tokens)"),
        ("fp32 logits", f"within {gate.fp32_max_logit_error:.1e} of torch"),
        ("mean KL", f"{gate.mean_kl:.5f} nats (language model alone {gate.decoder_mean_kl:.5f})"),
        ("next token", f"{gate.top1_agreement:.2%} equal"),
        ("loss", f"{gate.nll_change:+.3%}"),
        ("visual tokens", f"cosine {gate.visual_cosine_mean:.5f} (least {gate.visual_cosine_min:.5f})"),
        ("answers", f"{gate.answers_equal:.1%} equal to torch's"),
    ]
    rows += [(f"given back in {n.component}", f"{n.node} in {n.format}, {n.extra_bytes:+,} bytes") for n in given_back]
    rows += [("NOT PASSED", failure) for failure in gate.failures]
    print_table(rows, title=f"{manifest.decoder.precision} compared with torch")


def print_verified(verified: Verified) -> None:
    """The result of `verify`."""
    print_table(
        [
            ("files", f"{verified.files} as the manifest says, {megabytes(verified.bytes)}"),
            ("memory", f"{verified.memory_entries} entries"),
            ("probe", f"{ProbeResult(verified.probe_key_cosine, verified.probe_logits_cosine)}"),
            ("bundle.json", f"SHA-256 {verified.manifest_sha256}"),
        ],
        title="The bundle is whole and this machine computes what the exporter saw",
    )


def print_bundle(folder: Path, manifest: Manifest) -> None:
    """What `inspect` shows: components and files."""
    decoder, image, memory = manifest.decoder, manifest.image, manifest.memory
    print_table(
        [
            ("name", f"{manifest.name} (schema {manifest.schema_version})"),
            ("picture", f"{image.width} x {image.height}, {image.resample}, {image.resize}"),
            ("vision", f"{manifest.vision.precision}, {manifest.vision.visual_tokens} visual tokens"),
            (
                "language model",
                f"{decoder.precision}, {decoder.layers} layers of {decoder.width}, vocabulary {decoder.vocab_size}, "
                f"context {decoder.max_positions}",
            ),
            ("cache", f"{decoder.kv}, {decoder.position_bytes:,} bytes a position"),
            ("memory", _memory_line(folder, manifest)),
            ("target", manifest.target),
            ("gate", _gate_line(manifest)),
            ("licences", ", ".join(f"{part}: {name}" for part, name in manifest.licences.items())),
            ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items())),
        ]
    )
    files = Table(title="Files", title_justify="left", box=None, pad_edge=False)
    files.add_column("name")
    files.add_column("size", justify="right")
    files.add_column("SHA-256")
    for name, entry in manifest.files.items():
        files.add_row(Text(name), megabytes(entry.bytes), entry.sha256[:16])
    if memory.kind != "none":
        files.add_row(f"{MEMORY_DIR}/", megabytes(folder_bytes(folder / MEMORY_DIR)), "its own manifest")
    Console().print(files)


def _gate_line(manifest: Manifest) -> str:
    if manifest.gate is None:
        return "not compared with torch"
    given_back = f"{len(manifest.given_back)} matrices given back"
    failed = "; ".join(manifest.gate.failures)
    return f"passed, {given_back}" if manifest.gate.passed else f"NOT PASSED: {failed}, {given_back}"


def _memory_line(folder: Path, manifest: Manifest) -> str:
    memory = manifest.memory
    if memory.kind == "none":
        return "none"
    size = f"{len(open_bank(folder, manifest))} entries of {memory.kind}, keys of {memory.key_dim}"
    copies = ", words can be copied" if memory.copy_file else ""
    return f"{size}, {memory.k} read a picture, floor {memory.floor:.3f}{copies}"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"
