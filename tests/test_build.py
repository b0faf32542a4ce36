"""Building a bank from data: streamed, in shards, interrupted, on several processes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.memory_bank import read_bank
from tests.banks import contents, files, named_files, reseal
from tests.conftest import ROOT, STORED_BUNDLE
from tinyalign_edge.bundle import open_bundle
from tinyalign_edge.data import read_rows
from tinyalign_edge.errors import BundleError, InputError, TinyAlignError
from tinyalign_edge.memory import Bank, verified
from tinyalign_edge.memory import check as check_module
from tinyalign_edge.memory import join as join_module
from tinyalign_edge.memory import rebuild as rebuild_module
from tinyalign_edge.memory import shards as shards_module
from tinyalign_edge.report import print_built
from tinyalign_edge.runtime import build as build_module
from tinyalign_edge.runtime.budget import OVERHEAD_BYTES
from tinyalign_edge.runtime.build import BuildOptions, Built, build, work_folder
from tinyalign_edge.runtime.launch import Part, parse_part
from tinyalign_edge.runtime.memory import check_has_memory
from tinyalign_edge.runtime.model import load
from tinyalign_edge.runtime.values import ValueMaker


def make_data(folder: Path, rows: int, *, pictures: int = 10, name: str = "data.json") -> Path:
    """Conversations about a few pictures of noise; the last row repeats the first."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(pictures):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    made = [row(i % pictures, f"row-{i}", f"answer {i}") for i in range(rows - 1)]
    path = folder / name
    text = (
        "\n".join(json.dumps(item) for item in [*made, made[0]]) if name.endswith("l") else json.dumps([*made, made[0]])
    )
    path.write_text(text, "utf-8")
    return path


def row(picture: int, name: str, answer: str) -> dict[str, Any]:
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{picture}.png", "conversations": asked}


def run(data: Path, out: Path, **options: Any) -> Built:
    return build(STORED_BUNDLE, data=data, images=data.parent, out=out, options=BuildOptions(**options))


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of a bank's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", 41)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_bank_is_built_from_json_and_json_lines(tmp_path: Path, name: str) -> None:
    data = make_data(tmp_path / "data", 41, name=name)
    built = run(data, tmp_path / "bank", shard_rows=7)
    size = (tmp_path / "bank" / "segment-1-0.bin").stat().st_size
    assert built == Built(True, 6, 6, 41, 0, 1, entries=40, bytes=size, without_picture=0, held_back=0)
    bank = Bank(tmp_path / "bank")
    rows = read_rows(data, data.parent)[:40]
    with load(STORED_BUNDLE, memory_dir=tmp_path / "bank") as model:
        assert model.memory is not None
        for row, number in zip(rows, bank.ids, strict=True):
            entry = bank.entry(number)
            assert (entry.text, entry.question, entry.source, entry.time) == (row.turns[0].answer, "What?", row.id, "")
            assert entry.value.tolist() == list(model.prompt.memory_ids(row.memory_turns, 24))
        assert model.memory.search(rows[3].path, 1)[0].source == "row-3"
    assert list(read_bank(bank.folder)) == list(bank.ids) == list(range(40))
    assert not work_folder(STORED_BUNDLE, tmp_path / "bank").exists()


def test_it_takes_the_place_of_the_old_bank_which_stays_readable(tmp_path: Path, data: Path) -> None:
    bundle = Path(shutil.copytree(STORED_BUNDLE, tmp_path / "bundle"))
    before = Bank(bundle / "memory")
    old, next_id = contents(before), before.manifest.next_id
    build(bundle, data=data, images=data.parent, options=BuildOptions())
    assert contents(before) == old
    with load(bundle) as model:
        assert model.memory is not None
        assert model.memory.bank.ids == tuple(range(next_id, next_id + 40))
        assert files(bundle / "memory") == named_files(model.memory.bank)
        model.memory.add(data.parent / "1.png", "taught")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("bundle")] == ["bundle"]


def test_a_damaged_bank_is_mended_by_building_it_again(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "bank")
    expected = contents(Bank(tmp_path / "bank"))
    (tmp_path / "bank" / "manifest.json").write_text("{")
    run(data, tmp_path / "bank")
    assert contents(Bank(tmp_path / "bank")) == expected


@pytest.mark.parametrize("with_bank", [False, True])
def test_no_manifest_of_another_program_or_of_a_newer_version_is_replaced(
    tmp_path: Path, data: Path, with_bank: bool
) -> None:
    folder = tmp_path / "folder"
    if with_bank:
        run(data, folder)
        reseal(folder, json.loads((folder / "manifest.json").read_text("utf-8")) | {"schema_version": 2})
    else:
        folder.mkdir()
        (folder / "manifest.json").write_text('{"name": "A web app", "icons": []}')
    before = stored(folder)
    error, message = (BundleError, "version 2 is newer than 1") if with_bank else (InputError, "is not a memory bank")
    with pytest.raises(error, match=message):
        run(data, folder)
    assert stored(folder) == before


def test_the_size_of_shards_and_the_number_of_processes_change_no_byte(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "one")
    for index in (2, 0, 1):
        built = run(data, tmp_path / "three", shard_rows=5, part=Part(index, 3))
        assert built.complete == (index == 1)
        assert (tmp_path / "three").exists() == built.complete
    assert run(data, tmp_path / "one more", shard_rows=5, part=Part(7, 20)).complete is False
    assert stored(tmp_path / "three") == stored(tmp_path / "one")


def test_a_process_that_finds_the_shards_joined_says_only_what_it_knows(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = build_module._make_shards

    def overtaken(*given: Any) -> None:
        monkeypatch.setattr(build_module, "_make_shards", make)
        make(*given)
        joined.append(run(data, tmp_path / "bank"))

    joined: list[Built] = []
    monkeypatch.setattr(build_module, "_make_shards", overtaken)
    built = run(data, tmp_path / "bank")
    assert (joined[0].duplicates, joined[0].skipped) == (1, 0)
    assert built == replace(joined[0], duplicates=None, skipped=None, without_picture=None, held_back=None)
    print_built(built)
    shown = capsys.readouterr().out
    assert "40, joined elsewhere" in shown
    assert "None" not in shown and "skipped" not in shown and "merged" not in shown


def test_rows_without_an_id_are_named_after_their_file_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("here", "there"):
        data = make_data(tmp_path / name, 12)
        rows = [{key: item[key] for key in item if key != "id"} for item in json.loads(data.read_text("utf-8"))]
        data.write_text(json.dumps(rows), "utf-8")
        run(data, tmp_path / f"bank {name}")
    assert stored(tmp_path / "bank here") == stored(tmp_path / "bank there")
    assert Bank(tmp_path / "bank here").entry(2).source == "data.json row 3"


def test_a_killed_build_goes_on_without_repeating_finished_shards(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 200, pictures=200)
    work = work_folder(STORED_BUNDLE, tmp_path / "bank")
    command = [sys.executable, "-m", "tinyalign_edge", "memory", "build", str(STORED_BUNDLE), "--data", str(data)]
    command += ["--images", str(data.parent), "--out", str(tmp_path / "bank"), "--shard-rows", "10"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(work.glob("shard-*"))) < 3 and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "bank").exists()
    finished = {path: path.stat().st_ino for path in work.glob("shard-*")}
    assert 3 <= len(finished) < 20
    broken = min(finished)
    (broken / "segment-1-0.bin").write_bytes(b"")
    run(data, tmp_path / "bank", shard_rows=10, part=Part(1, 2))
    kept = {path: path.stat().st_ino for path in finished if path != broken}
    assert kept == {path: finished[path] for path in kept}
    assert run(data, tmp_path / "bank", shard_rows=10).complete
    run(data, tmp_path / "whole")
    assert stored(tmp_path / "bank") == stored(tmp_path / "whole")
    assert not work.exists()


def test_a_build_of_something_else_does_not_go_on_with_these_shards(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "bank", shard_rows=7, part=Part(0, 2))
    with pytest.raises(InputError, match="unfinished build of another shard_rows, value_tokens; take the same"):
        run(data, tmp_path / "bank", shard_rows=8, value_tokens=5)


def test_what_is_in_memory_does_not_grow_with_the_number_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "BUCKET", 32)
    for module in (check_module, join_module):
        monkeypatch.setattr(module, "BLOCK", 32)
    silent = nullcontext(lambda *_: None)  # a bar keeps its last 1,000 steps
    monkeypatch.setattr(build_module, "progress", lambda *_, **__: silent)
    write = shards_module.Shards.write
    monkeypatch.setattr(shards_module.Shards, "write", lambda *given: (gc.collect(), write(*given)))  # no rubbish

    def peak(rows: int, time: str) -> tuple[int, float]:
        data = make_data(tmp_path / f"{time}-{rows}", rows)
        tracemalloc.start(1)
        built = run(data, tmp_path / f"bank-{time}-{rows}", shard_rows=150)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, built.bytes / built.entries

    peak(50, "first")  # fills what others cache
    # the less of two: in one of them the interpreter's own table of file names may grow, by megabytes at once
    (few, _), (many, entry_bytes) = (min(peak(rows, time) for time in ("once", "again")) for rows in (150, 600))
    assert 2 * (many - few) / 450 < entry_bytes, (few, many)


def test_bad_rows_are_named_before_the_work_or_counted(tmp_path: Path, data: Path) -> None:
    rows = json.loads(data.read_text("utf-8"))
    rows[20]["image"] = "gone.png"
    rows[30]["image"] = "cut.png"
    rows.append("text")
    (data.parent / "cut.png").write_bytes((data.parent / "0.png").read_bytes()[:99])
    data.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(InputError, match=r"row 21 \(id row-20\): image .*gone\.png does not exist"):
        run(data, tmp_path / "bank")
    assert not work_folder(STORED_BUNDLE, tmp_path / "bank").exists()
    rows[20]["image"] = "1.png"
    data.write_text(json.dumps(rows[:-1]), "utf-8")
    with pytest.raises(InputError, match=r"row 31 \(id row-30\): .*cut\.png: truncated or damaged"):
        run(data, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    data.write_text(json.dumps(rows), "utf-8")
    shutil.rmtree(work_folder(STORED_BUNDLE, tmp_path / "bank"))
    built = run(data, tmp_path / "bank", skip_bad=True, shard_rows=10)
    assert (built.rows, built.skipped, built.duplicates, built.entries) == (42, 2, 1, 39)
    data.write_text('["nothing", "usable"]', "utf-8")
    with pytest.raises(InputError, match="no row can be used, 2 are bad"):
        run(data, tmp_path / "bank", skip_bad=True)
    assert len(Bank(tmp_path / "bank")) == 39


def test_an_entry_is_found_by_its_rows_first_picture_and_text_alone_is_none(tmp_path: Path, data: Path) -> None:
    rows = json.loads(data.read_text("utf-8"))
    rows[3]["image"] = ["4.png", "5.png"]
    for text in (rows[7], rows[8]):
        del text["image"]
        text["conversations"][0]["value"] = "What?"
    data.write_text(json.dumps(rows), "utf-8")
    built = run(data, tmp_path / "bank")
    assert (built.entries, built.without_picture, built.skipped) == (38, 2, 0)
    with load(STORED_BUNDLE, memory_dir=tmp_path / "bank") as model:
        assert model.memory is not None
        assert "row-3" in {entry.source for entry in model.memory.search(data.parent / "4.png", 5)}
    with pytest.raises(InputError, match=r"data\.json row 4 \(id row-3\): .* one only, found 2"):
        run(data, tmp_path / "small", budget_bytes=10**6, held_out=data)
    assert not work_folder(STORED_BUNDLE, tmp_path / "small").exists()
    data.write_text(json.dumps(rows[7:9]), "utf-8")
    with pytest.raises(InputError, match="0 are bad and 2 have no picture"):
        run(data, tmp_path / "none")


def test_a_value_that_is_not_finite_is_a_bad_row(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ValueMaker, "make", lambda *_, **__: np.full((3, 8), np.nan, np.float32))
    with pytest.raises(InputError, match=r"data\.json row 1 .*is not finite; look for a damaged value encoder"):
        run(data, tmp_path / "bank")


def test_rows_of_a_picture_that_is_held_back_are_not_in_the_bank(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 300, pictures=60)
    rows = json.loads(data.read_text("utf-8"))
    text = {"id": "text", "conversations": row(0, "", "answer")["conversations"]}
    text["conversations"][0]["value"] = "What?"
    held = {name for name in (f"{i}.png" for i in range(60)) if zlib.crc32(name.encode()) < 0.1 * 2**32}
    both = row(0, "both", "answer") | {"image": ["1.png", min(held)]}
    data.write_text(json.dumps([*rows, text, both]), "utf-8")
    built = run(data, tmp_path / "bank", budget_bytes=10**7)
    assert built.held_back == sum(item["image"] in held for item in rows) + 1
    assert built.without_picture == 1
    assert "both" not in {source for _, _, source, *_ in contents(Bank(tmp_path / "bank")).values()}


def test_the_graph_of_a_large_bank_is_built_by_who_joins_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild_module, "SWITCH_OVER", 20)
    built = run(data, tmp_path / "one")
    assert Bank(tmp_path / "one").stats().graph_entries == 40
    assert built.graph_bytes == (tmp_path / "one" / "graph-2.usearch").stat().st_size
    for index in (1, 0):
        run(data, tmp_path / "two", shard_rows=5, part=Part(index, 2))
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
    for name in ("usearch", "usearch.index", "usearch.compiled"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(data, tmp_path / "without").graph_bytes == 0
    assert len(Bank(tmp_path / "without")) == 40


def test_a_shard_that_lost_a_file_is_an_error_and_not_a_finished_build(tmp_path: Path, data: Path) -> None:
    run(make_data(tmp_path / "small", 5), tmp_path / "bank")
    before = stored(tmp_path / "bank")
    run(data, tmp_path / "bank", shard_rows=30, part=Part(0, 2))
    digests = work_folder(STORED_BUNDLE, tmp_path / "bank") / "shard-000000" / "digests.bin"
    whole = digests.read_bytes()
    for damaged in (None, whole[:-1], b""):
        digests.unlink() if damaged is None else digests.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"digests\.bin: missing or cut; delete .*shard-000000"):
            run(data, tmp_path / "bank", shard_rows=30, part=Part(1, 2))
    assert stored(tmp_path / "bank") == before


def test_shards_leave_no_record_in_the_users_cache(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    monkeypatch.setenv("TINYALIGN_CACHE", str(tmp_path / "cache"))
    run(data, tmp_path / "bank", shard_rows=5, part=Part(0, 2))
    run(data, tmp_path / "bank", shard_rows=5)
    assert len(list((tmp_path / "cache").rglob("*.json"))) <= 2  # of the bank, and of the bundle's own


def test_entries_of_one_picture_and_answer_that_say_different_things_all_fit_a_large_budget(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 2, pictures=1)
    rows = [row(0, f"row-{i}", "yes") for i in range(6)]
    for i, one in enumerate(rows):
        one["conversations"][0]["value"] = f"<image>\nIs there a {'ABCDEF'[i]}?"
    data.write_text(json.dumps(rows), "utf-8")
    assert run(data, tmp_path / "bank", budget_bytes=10**6, held_out=data).entries == 6


def test_what_cannot_be_built_is_refused_before_any_work(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a memory bank"):
        run(data, tmp_path / "other")
    with pytest.raises(InputError, match="--value-tokens 25: must be from 1 to 24"):
        run(data, tmp_path / "bank", value_tokens=25)
    with pytest.raises(InputError, match="--shard-rows 0"):
        run(data, tmp_path / "bank", shard_rows=0)
    for wrong in ("3/2", "0/2", "2", "x/y"):
        with pytest.raises(InputError, match="must be I/N"):
            parse_part(wrong)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK '2' of WORLD_SIZE '1'"):
        run(data, tmp_path / "bank")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "other"}


def test_a_full_disk_leaves_the_old_bank_and_the_finished_shards(tmp_path: Path, data: Path) -> None:
    import resource

    run(make_data(tmp_path / "small", 5), tmp_path / "bank")
    before = stored(tmp_path / "bank")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["segment-1-0.bin"]) + 2048, limits[1]))
    try:
        with pytest.raises(TinyAlignError, match="cannot be written"):
            run(data, tmp_path / "bank", shard_rows=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored(tmp_path / "bank") == before
    assert run(data, tmp_path / "bank", shard_rows=5).entries == 40


def test_fewer_tokens_an_entry_make_a_smaller_bank(tmp_path: Path, data: Path) -> None:
    sizes = [run(data, tmp_path / f"bank-{tokens}", value_tokens=tokens).bytes for tokens in (24, 3)]
    assert sizes[1] < sizes[0]
    assert {len(entry[-1]) for entry in contents(Bank(tmp_path / "bank-3")).values()} == {3}


def test_two_gloo_processes_make_the_bank_of_one(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("torch")
    run(data, tmp_path / "one", shard_rows=5)
    command = [sys.executable, "-m", "tests.build_child", str(STORED_BUNDLE), str(data), str(tmp_path / "two")]
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # as torchrun and `accelerate launch` set them
    children = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=os.environ | launched | {"RANK": rank}
        )
        for rank in ("0", "1")
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
    shares = json.loads((tmp_path / "shares.json").read_text("utf-8"))
    assert sorted(shares) == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_the_bank_built_of_the_training_rows_is_the_bank_that_training_wrote(tmp_path: Path, world: Path) -> None:
    options = BuildOptions()
    build(STORED_BUNDLE, data=world / "train.json", images=world, out=tmp_path / "bank", options=options)
    trained, built = (read_bank(folder) for folder in (STORED_BUNDLE / "memory", tmp_path / "bank"))
    by_source = {record["source"]: (key, value.tolist(), record) for key, value, record in built.values()}
    assert len(trained) > 60
    for key, value, record in trained.values():
        own_key, *own = by_source[record["source"]]
        assert own == [value.tolist(), record]
        assert float(own_key @ key) > 0.98  # of the int8 graph, and of torch


@pytest.mark.filterwarnings("ignore")  # training, for the bundles
def test_latents_are_built_as_training_wrote_them(tmp_path: Path, world: Path, bundles: dict[str, Path]) -> None:
    build(bundles["latents"], data=world / "train.json", images=world, out=tmp_path / "bank", options=BuildOptions())
    banks = Bank(tmp_path / "bank"), Bank(bundles["latents"] / "memory")
    built, trained = ({bank.entry(i).source: bank.entry(i).value.ravel() for i in bank.ids} for bank in banks)
    for source, value in trained.items():
        assert value @ built[source] >= 0.999 * np.linalg.norm(value) * np.linalg.norm(built[source])


def test_a_bundle_without_a_memory_is_refused() -> None:
    manifest = open_bundle(STORED_BUNDLE)
    with pytest.raises(InputError, match="--memory tokens"):
        check_has_memory(STORED_BUNDLE, replace(manifest, memory=replace(manifest.memory, kind="none")))


def test_a_budget_is_kept_and_the_loss_around_it_is_told(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 300, pictures=60)
    held_out = tmp_path / "data" / "held-out.json"
    held_out.write_text(json.dumps([row(3, "a", "answer 3"), row(4, "b", "answer 4")]), "utf-8")
    built = run(data, tmp_path / "bank", budget_bytes=24_000, held_out=held_out)
    half, chosen, twice = built.points
    assert [point.budget_bytes for point in built.points] == [12_000, 24_000, 48_000]
    assert all(point.budget_bytes - OVERHEAD_BYTES - 300 < point.bytes <= point.budget_bytes for point in built.points)
    assert half.entries < chosen.entries < twice.entries < 299
    assert (built.entries, built.held_back) == (chosen.entries, 0) == (len(Bank(tmp_path / "bank")), 0)
    with load(STORED_BUNDLE, memory_dir=tmp_path / "bank") as model:
        losses = [model.answer_nll(model.encode(data.parent / f"{i}.png"), "What?", f"answer {i}") for i in (3, 4)]
    assert chosen.nll_per_token == pytest.approx(float(np.concatenate(losses).mean()), rel=1e-5)
    assert chosen.tokens == sum(map(len, losses))


def test_without_held_out_questions_a_share_of_the_pictures_is_held_back(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 300, pictures=60)
    built = run(data, tmp_path / "bank", budget_bytes=10**7)
    kept = {int(source.split("-")[1]) % 60 for _, _, source, *_ in contents(Bank(tmp_path / "bank")).values()}
    held = {i for i in range(60) if zlib.crc32(f"{i}.png".encode()) < 0.1 * 2**32}
    assert kept == set(range(60)) - held
    assert built.held_back == sum(i % 60 in held for i in range(299)) + (0 in held) > 0
    for budget_bytes in (-1, 0, 5000):
        with pytest.raises(InputError, match="must have room for an entry"):
            run(data, tmp_path / "small", budget_bytes=budget_bytes)
    assert not work_folder(STORED_BUNDLE, tmp_path / "small").exists()
    with pytest.raises(InputError, match="must have room for an entry"):
        run(data, tmp_path / "small", budget_bytes=2 * OVERHEAD_BYTES + 10)
    with pytest.raises(InputError, match="too few rows to hold some back"):
        run(make_data(tmp_path / "few", 2), tmp_path / "few-bank", budget_bytes=10**6)
    assert not (tmp_path / "small").exists()
