"""Data sets of the package `datasets`: those whose pictures are files, and those that hold their pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")

from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.errors import InputError, TinyAlignError  # noqa: E402
from tinyalign_edge.train import hub_rows, picture_files, watcher  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.corpus import Corpus, Source, data_refs, open_corpus  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.run import train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ID = "org/name"
Publish = Callable[..., None]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Write the rows of the data set `ID`, which is then loaded from this disk instead of the hub."""
    import pyarrow.parquet as pq

    load_dataset, folder = datasets.load_dataset, tmp_path / "hub"

    def load(name: str, config: str | None = None, *, split: str) -> Any:
        return load_dataset(str(folder / name), config, split=split, cache_dir=str(tmp_path / "cached"))

    def write(rows: list[dict[str, Any]], image: Any = None) -> None:
        image = image or datasets.Image()
        message = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features = datasets.Features(
            {"id": datasets.Value("string"), "image": image, "conversations": [message],
             "caption": datasets.Value("string"), "license": datasets.Value("string")}
        )  # fmt: skip
        # a row that names the file of a picture keeps the name: `to_parquet` would put the file's bytes in
        table = datasets.Dataset.from_list([{"license": None, **row} for row in rows], features=features).data.table
        (folder / ID).mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), folder / ID / "train.parquet")

    monkeypatch.setattr(datasets, "load_dataset", load)
    return write


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def rows_of(world: Path, count: int = 80) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((world / "train.json").read_text("utf-8"))
    return rows[:count]


def holding(world: Path, count: int = 80) -> list[dict[str, Any]]:
    """The rows with their pictures in them, which call themselves by names that lead elsewhere."""
    return [
        {**row, "image": {"bytes": (world / row["image"]).read_bytes(), "path": "../../evil.png"}}
        for row in rows_of(world, count)
    ]


def opened(kept: Path, images: Path | None = None, **given: Any) -> Corpus:
    return open_corpus([Source(ID)], images, kept, **given)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def trained(towers: Path, out: Path, *, resume: bool = False, **options: Any) -> Path:
    given = {"steps": 2, "batch_size": 8, "visual_tokens": 4, "eval_every": 2, "device": "cpu", **options}
    train(
        data=ID,
        vision=str(towers / "vit"),
        lm=str(towers / "lm"),
        out=out,
        options=TrainOptions(**given),
        resume=resume,
    )
    return out


def test_rows_with_their_pictures_are_those_of_a_file(world: Path, kept: Path, publish: Publish) -> None:
    publish(holding(world))
    corpus, whole = opened(kept), read_rows(world / "train.json", world)
    assert [(row.id, row.turns, row.caption) for row in corpus] == [(row.id, row.turns, row.caption) for row in whole]
    assert [row.path.read_bytes() for row in corpus] == [row.path.read_bytes() for row in whole]
    assert corpus.path(corpus.pictures[7][0]) == corpus[7].path


def test_pictures_are_named_by_their_content_alone(world: Path, kept: Path, publish: Publish) -> None:
    rows = holding(world, 3)
    publish([*rows, {**rows[0], "id": "again"}])
    opened(kept)
    digests = sorted(hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows)
    assert files_in(kept) == [kept / digest[:2] / digest for digest in digests]
    first, second, third = files_in(kept)
    whole, before = first.read_bytes(), second.stat()
    first.write_bytes(b"cut")
    third.unlink()
    third.symlink_to(second)
    opened(kept)
    assert files_in(kept) == [first, second, third]
    assert first.read_bytes() == whole
    assert not third.is_symlink()
    assert (second.stat().st_ino, second.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("kind", ["list", "sequence"])
def test_a_row_may_hold_several_pictures_or_none(world: Path, kept: Path, publish: Publish, kind: str) -> None:
    rows = holding(world, 4)
    pictures = [row["image"] for row in rows]
    text = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    rows[0]["image"], rows[1]["image"], rows[2]["image"] = pictures[:3], [pictures[3]], []
    rows[2]["conversations"] = rows[3]["conversations"] = text
    rows[3]["image"] = None
    publish(rows, [datasets.Image()] if kind == "list" else datasets.Sequence(datasets.Image()))
    corpus = opened(kept)
    assert [len(row.pictures) for row in corpus] == [3, 1, 0, 0]
    assert [picture.path.read_bytes() for picture in corpus[0].pictures] == [held["bytes"] for held in pictures[:3]]
    publish([{**rows[0], "image": pictures * 5}], [datasets.Image()])
    with pytest.raises(InputError, match=rf"{ID} row 1 \(id .*\): 20 pictures, a row may have 16"):
        opened(kept)


def test_a_picture_without_bytes_is_a_bad_row_and_its_path_is_not_followed(
    world: Path, kept: Path, publish: Publish, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = holding(world, 3), str(world / rows_of(world)[0]["image"])
    rows[1]["image"] = {"bytes": None, "path": path}
    publish(rows)
    with pytest.raises(InputError, match=rf"row 2 \(id {rows[1]['id']}\): a picture .* no bytes, only the path '"):
        opened(kept)
    assert len(opened(kept, skip_bad=True)) == 2
    assert "1 bad rows skipped" in capsys.readouterr().err
    monkeypatch.setattr(hub_rows, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match=r"row 1 .*: a picture has \d+ bytes, more than the 10 allowed"):
        opened(kept)
    publish([{**rows[0], "image": [rows[0]["image"], None]}], [datasets.Image()])
    with pytest.raises(InputError, match="row 1 "):
        opened(kept)


def test_a_full_disk_is_no_fault_of_the_rows(
    world: Path, kept: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(holding(world, 3))
    monkeypatch.setattr(picture_files, "SPARE_BYTES", 1 << 60)
    with pytest.raises(TinyAlignError, match=r"the disk has .* free"):
        opened(kept, skip_bad=True)
    assert not files_in(kept)


def test_pictures_may_be_named_too(world: Path, kept: Path, publish: Publish) -> None:
    publish(rows_of(world, 5), datasets.Value("string"))
    assert [row.path for row in opened(kept, world)] == [world / row["image"] for row in rows_of(world, 5)]
    assert not kept.exists()
    with pytest.raises(InputError, match=f"{ID}: names its pictures; give the folder .* with --images"):
        opened(kept)
    files = Source(str(world / "train.json"))
    corpus = open_corpus([Source(ID), files], world, kept)
    assert len(corpus.used()) == 80
    publish(holding(world, 5))
    corpus = open_corpus([Source(ID), files], world, kept)
    assert len(corpus.used()) == 85
    assert [corpus.path(number).is_file() for number in corpus.used()] == [True] * 85


def test_the_hash_of_a_data_set_is_that_of_its_rows(world: Path, kept: Path, publish: Publish) -> None:
    rows, found = holding(world, 5), []
    other = {**rows[1], "caption": "else"}
    drawn = {**rows[1], "image": rows[2]["image"]}
    renamed = {**rows[1], "image": {**rows[1]["image"], "path": "b.png"}, "license": "MIT"}
    for second in (rows[1], renamed, other, drawn):
        publish([rows[0], second, *rows[2:]])
        (ref,) = data_refs(opened(kept))
        assert len(bytes.fromhex(ref.sha256)) == 32
        found.append(ref.sha256)
    assert found[0] == found[1]  # neither is read
    assert len(set(found)) == 3
    publish(rows_of(world, 5), datasets.Value("string"))
    first, second = (data_refs(opened(kept, world))[0].sha256 for _ in range(2))
    assert first == second
    assert first not in found


@pytest.mark.parametrize("column", ["caption", "image"])
def test_text_that_is_not_utf8_is_a_bad_row(
    world: Path, tmp_path: Path, kept: Path, publish: Publish, column: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    publish(holding(world, 3))
    file = tmp_path / "hub" / ID / "train.parquet"
    table = pq.read_table(file)
    spoiled = pa.array([b"fine", b"\xff", b"fine"]).view(pa.string())
    if column == "image":
        contents = table["image"].combine_chunks().field("bytes")
        spoiled = pa.StructArray.from_arrays([contents, spoiled], names=["bytes", "path"])
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, table.schema.field(column), spoiled), file)
    with pytest.raises(InputError, match=f"{ID} row 2.*: cannot be read .*utf-8"):
        opened(kept)
    corpus = opened(kept, skip_bad=True)
    assert [int(item) for item in corpus.item] == [0, 2]
    assert len(bytes.fromhex(data_refs(corpus)[0].sha256)) == 32


def test_a_configuration_and_a_split_may_be_named(
    world: Path, tmp_path: Path, kept: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(holding(world, 3))
    folder = tmp_path / "hub" / ID
    files = [{"config_name": name, "data_files": [{"split": "val", "path": "train.parquet"}]} for name in ("a", "b")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(files)}\n---\n", "utf-8")
    assert len(open_corpus([Source(f"{ID}/b@val")], None, kept)) == 3
    for given, choices in (
        ("", r"\['a', 'b'\]"),
        ("/c", r"\['a', 'b'\]"),
        ("/b", r"\['val'\]"),
        ("/b@c", r"\['val'\]"),
    ):
        with pytest.raises(InputError, match=rf"--data {ID}{given}: .*{choices}.* ORG/NAME/CONFIG@SPLIT") as found:
            open_corpus([Source(f"{ID}{given}")], None, kept)
        assert "\n" not in str(found.value)


def test_a_wrong_path_is_named_as_one(publish: Publish, kept: Path) -> None:
    for wrong in ("data/train.csv", "data/missing/rows.parquet"):
        with pytest.raises(InputError, match=rf"^--data {wrong}: no such file, and the hub could not give it") as found:
            open_corpus([Source(wrong)], None, kept)
        assert "@SPLIT" not in str(found.value)


@pytest.mark.parametrize("cached", [False, True], ids=["in memory", "cached"])
def test_a_data_set_that_holds_its_pictures_is_trained_on(
    world: Path, towers: Path, tmp_path: Path, publish: Publish, cached: bool
) -> None:
    publish(holding(world))
    cache = tmp_path / "cache" if cached else None
    out = trained(towers, tmp_path / "c", cache_features=cache)
    checkpoint = load_checkpoint(out)
    assert checkpoint.bank is not None
    assert len(checkpoint.bank) == 72
    assert checkpoint.config.training.images == ""
    assert not (out / "state").exists()
    assert cache is None or len(files_in(cache / "pictures")) == 80
    assert {Image.open(path).size for path in (out / "samples" / "images").iterdir()}


def test_a_run_that_is_refused_leaves_nothing(world: Path, towers: Path, tmp_path: Path, publish: Publish) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    rows = holding(world)
    bomb = {**rows[0], "id": "bomb", "image": {"bytes": (tmp_path / "bomb.png").read_bytes(), "path": None}}
    publish([*rows, bomb])
    with pytest.raises(InputError, match=r"org/name row 81 \(id bomb\): .* pixels.* allowed"):
        trained(towers, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_resumed_run_notices_other_rows(
    world: Path, towers: Path, tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, on_step_end = holding(world), watcher.Watcher.on_step_end

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    publish(rows)
    monkeypatch.setattr(watcher.Watcher, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(towers, tmp_path / "c")
    monkeypatch.setattr(watcher.Watcher, "on_step_end", on_step_end)
    publish([{**rows[0], "caption": "else"}, *rows[1:]])
    with pytest.raises(InputError, match=r"other settings \(training\.data\)"):
        trained(towers, tmp_path / "c", resume=True)
    publish(rows)
    assert load_checkpoint(trained(towers, tmp_path / "c", resume=True)).bank is not None
