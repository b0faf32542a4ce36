"""`tinyalign-edge memory`: look into a bundle's memory, teach it, make it forget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyalign_edge.errors import InputError

if TYPE_CHECKING:
    from tinyalign_edge.runtime.memory import Memory

app = typer.Typer(help="Look into a bundle's memory, teach it, make it forget.")

Bundle = Annotated[Path, typer.Argument(help="A folder that 'export' wrote.")]
Picture = Annotated[Path, typer.Argument(help="A picture.")]
MemoryDir = Annotated[
    Path | None, typer.Option(help="A writable folder for the memory; a new one begins as a copy of the bundle's.")
]
Neighbours = Annotated[int | None, typer.Option("-k", "--neighbours", help="How many (default: as the model reads).")]
MAX_BUDGET_MB = 1e6
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def add(
    bundle: Bundle,
    image: Picture,
    text: Annotated[str, typer.Argument(help="What is to be known about the picture.")],
    question: Annotated[str, typer.Option(help="What the text answers, where that is searched by.")] = "",
    source: Annotated[str | None, typer.Option(help="Where it comes from (default: the picture's path).")] = None,
    thumbnail: Annotated[bool, typer.Option("--thumbnail", help="Keep a small picture, for people.")] = False,
    memory_dir: MemoryDir = None,
    as_json: Json = False,
) -> None:
    """Remember a text with a picture."""
    from tinyalign_edge.report import entry_json

    with _memory_of(bundle, memory_dir) as memory:
        source = str(image) if source is None else source
        entry = memory.add(image, text, question=question, source=source, thumbnail=thumbnail)
    shown = {name: value for name, value in entry_json(entry).items() if name != "similarity"}
    _show(as_json, shown, f"remembered as entry {entry.id}")


@app.command()
def search(
    bundle: Bundle,
    image: Picture,
    neighbours: Neighbours = None,
    question: Annotated[str, typer.Option(help="What is asked, where that is searched by.")] = "",
    sheet: Annotated[Path | None, typer.Option(help="A PNG to write: thumbnails and texts of what was found.")] = None,
    memory_dir: MemoryDir = None,
    as_json: Json = False,
) -> None:
    """Show what the memory holds of pictures like this one."""
    from tinyalign_edge.report import entry_json, print_entries

    with _memory_of(bundle, memory_dir) as memory:
        found = memory.search(image, neighbours, question=question)
    if sheet is not None:
        from tinyalign_edge.sheet import write_sheet

        write_sheet(found, sheet)
    if as_json:
        print(json.dumps({"memories": [entry_json(entry) for entry in found]}, ensure_ascii=False))
    else:
        print_entries(found)


@app.command()
def forget(
    bundle: Bundle,
    id: Annotated[int | None, typer.Option(help="The entry's id, as 'search' shows it.")] = None,
    source: Annotated[str | None, typer.Option(help="All entries of this source.")] = None,
    text: Annotated[
        str | None, typer.Option(help="All entries of exactly this text, white space around it apart.")
    ] = None,
    memory_dir: MemoryDir = None,
    as_json: Json = False,
) -> None:
    """Delete entries from every file of the memory."""
    from tinyalign_edge.bundle import open_bundle
    from tinyalign_edge.runtime.memory import open_bank

    wanted = {"--id": id, "--source": source, "--text": text}
    if sum(given is not None for given in wanted.values()) != 1:
        raise InputError("memory forget: give one of --id, --source and --text")
    gone = open_bank(bundle, open_bundle(bundle), memory_dir).forget(id=id, source=source, text=text)
    if not gone:
        option, value = next((name, value) for name, value in wanted.items() if value is not None)
        raise InputError(f"{option} {value}: no entry is of it; 'tinyalign-edge memory search' shows entries")
    _show(as_json, {"forgotten": list(gone)}, f"forgotten: {len(gone)} ({', '.join(map(str, gone[:20]))})")


@app.command()
def merge(
    bundle: Bundle,
    other: Annotated[Path, typer.Argument(help="A memory folder, of another device's bundle for instance.")],
    memory_dir: MemoryDir = None,
    as_json: Json = False,
) -> None:
    """Take over the entries of another memory of the same encoder."""
    from tinyalign_edge.bundle import open_bundle
    from tinyalign_edge.memory import Bank
    from tinyalign_edge.memory.shown import build_due_graph
    from tinyalign_edge.runtime.memory import open_bank

    bank = open_bank(bundle, open_bundle(bundle), memory_dir)
    added = bank.merge(Bank(other))
    build_due_graph(bank)
    _show(as_json, {"added": len(added), "entries": len(bank)}, f"added: {len(added)}, entries now: {len(bank)}")


@app.command()
def rebuild(bundle: Bundle, memory_dir: MemoryDir = None, as_json: Json = False) -> None:
    """Build the graph by which a large memory is searched anew; a small one has none."""
    from tinyalign_edge.bundle import open_bundle
    from tinyalign_edge.memory.shown import build_graph
    from tinyalign_edge.runtime.memory import open_bank

    bank = open_bank(bundle, open_bundle(bundle), memory_dir)
    covered = build_graph(bank)
    line = f"graph over {covered} entries" if covered else f"{len(bank)} entries are searched faster without a graph"
    _show(as_json, {"graph_entries": covered, "entries": len(bank)}, line)


@app.command()
def build(
    bundle: Bundle,
    data: Annotated[Path, typer.Option(help="LLaVA conversations, .json or .jsonl.")],
    images: Annotated[Path, typer.Option(help="The folder that the rows' image paths start from.")],
    out: Annotated[
        Path | None, typer.Option("--out", "--memory-dir", help="The memory's folder (default: the bundle's own).")
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard, what an interruption costs at most.")] = 1024,
    shard: Annotated[str | None, typer.Option(help="I/N: every N-th shard only; other calls make the rest.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of ending.")] = False,
    value_tokens: Annotated[int | None, typer.Option(help="Tokens kept of an entry (default: the bundle's).")] = None,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Keep small pictures, for people.")] = False,
    budget_mb: Annotated[
        float | None, typer.Option(help="Megabytes of entries, without the graph; it keeps what helps.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Conversations to measure the loss at that size on.")] = None,
    as_json: Json = False,
) -> None:
    """Build the memory anew from data; it takes the old one's place when it is complete."""
    from dataclasses import asdict

    from tinyalign_edge.report import print_built
    from tinyalign_edge.runtime.build import BuildOptions
    from tinyalign_edge.runtime.build import build as run
    from tinyalign_edge.runtime.launch import parse_part

    if held_out is not None and budget_mb is None:
        raise InputError("--held-out: give --budget-mb too, or measure with 'tinyalign-edge eval'")
    if budget_mb is not None and not 0 < budget_mb <= MAX_BUDGET_MB:
        raise InputError(f"--budget-mb {budget_mb:g}: must be above 0 and at most {MAX_BUDGET_MB:g}")
    options = BuildOptions(
        shard_rows=shard_rows,
        skip_bad=skip_bad,
        value_tokens=value_tokens,
        thumbnails=thumbnails,
        part=parse_part(shard) if shard else None,
        budget_bytes=None if budget_mb is None else int(budget_mb * 1e6),
        held_out=held_out,
    )
    built = run(bundle, data=data, images=images, out=out, options=options)
    if as_json:
        print(json.dumps(asdict(built)))
    else:
        print_built(built)


@app.command()
def stats(
    bundle: Bundle,
    memory_dir: MemoryDir = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again, also unchanged ones.")] = False,
    as_json: Json = False,
) -> None:
    """Show how much the memory holds."""
    from dataclasses import asdict

    from tinyalign_edge.bundle import open_bundle
    from tinyalign_edge.report import print_bank
    from tinyalign_edge.runtime.memory import open_bank

    bank = open_bank(bundle, open_bundle(bundle), memory_dir)
    if verify:
        bank.verify()
    found = bank.stats()
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        print_bank(found)


@contextmanager
def _memory_of(bundle: Path, memory_dir: Path | None) -> Iterator[Memory]:
    from tinyalign_edge.runtime.memory import check_has_memory
    from tinyalign_edge.runtime.model import load

    with load(bundle, memory_dir=memory_dir) as model:
        check_has_memory(bundle, model.manifest)
        assert model.memory is not None
        yield model.memory


def _show(as_json: bool, fields: dict[str, Any], line: str) -> None:
    print(json.dumps(fields, ensure_ascii=False) if as_json else line)
