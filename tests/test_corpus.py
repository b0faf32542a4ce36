"""What a run is trained on: several files, weights, rows of every shape, bad rows, and features kept on disk."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from tests.towers import save_lm, train_tiny  # noqa: E402
from tinyalign_edge import progress as progress_module  # noqa: E402
from tinyalign_edge.bench.trained import loss_curve  # noqa: E402
from tinyalign_edge.data import read_rows  # noqa: E402
from tinyalign_edge.errors import InputError, MissingExtraError  # noqa: E402
from tinyalign_edge.prompt import DEFAULT_CHAT_TEMPLATE, load_tokenizer  # noqa: E402
from tinyalign_edge.train.answer import TorchAnswerer  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.corpus import Source, open_corpus, parse_source, split  # noqa: E402
from tinyalign_edge.train.loop import last_whole  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def rows_of(world: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((world / "train.json").read_text("utf-8"))
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows, indent=1)
    path.write_text(text, "utf-8")
    return path


def weights(checkpoint: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    loaded: dict[str, Any] = load_file(checkpoint / "model.safetensors")
    return loaded


def test_rows_are_read_from_several_files_by_number(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    files = [write(tmp_path / "a.json", rows[:30]), write(tmp_path / "b.jsonl", rows[30:])]
    corpus = open_corpus([Source(str(file)) for file in files], world, tmp_path)
    whole = read_rows(world / "train.json", world)
    assert [row.id for row in corpus] == [row.id for row in whole]
    assert corpus[-1].turns == whole[-1].turns
    assert corpus[30].where == f"{files[1]} row 1 (id {whole[30].id})"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_not_held_in_memory(name: str, world: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    long = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "long " * 20_000}]
    data = write(tmp_path / name, [{**rows[i % len(rows)], "id": str(i), "conversations": long} for i in range(300)])
    tracemalloc.start(1)
    corpus = open_corpus([Source(str(data))], world, tmp_path)
    assert sum(len(row.turns[0].answer) for row in corpus) > 29_000_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < data.stat().st_size / 5


def test_an_epoch_goes_through_each_file_as_often_as_its_weight_says(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    files = [write(tmp_path / "a.json", rows[:20]), write(tmp_path / "b.json", rows[20:40])]
    corpus = open_corpus([Source(str(files[0]), 2.0), Source(str(files[1]), 0.5)], world, tmp_path)
    first, second = corpus.epoch(0, seed=1), corpus.epoch(1, seed=1)
    assert np.bincount(first, minlength=40)[:20].tolist() == [2] * 20
    assert sorted(np.bincount(first, minlength=40)[20:]) == [0] * 10 + [1] * 10
    assert not np.array_equal(first, second)
    assert np.array_equal(first, corpus.epoch(0, seed=1))


def test_a_weight_stands_after_a_colon(tmp_path: Path) -> None:
    assert parse_source("a.json:0.5") == Source("a.json", 0.5)
    assert parse_source("C:a.json") == Source("C:a.json")
    (tmp_path / "a:2").touch()
    assert parse_source(str(tmp_path / "a:2")) == Source(str(tmp_path / "a:2"))
    for bad in ("a.json:0", "a.json:-1", "a.json:nan", "a.json:1e9"):
        with pytest.raises(InputError, match="weight must be above 0"):
            parse_source(bad)


def test_a_bad_row_stops_the_run_or_is_counted(world: Path, tmp_path: Path, capsys: Any) -> None:
    rows = rows_of(world)
    file = write(tmp_path / "a.jsonl", [rows[0], {"id": "x", "image": "gone.png"}, rows[1], 7])
    with pytest.raises(InputError, match=r"a\.jsonl row 2 \(id x\)"):
        open_corpus([Source(str(file))], world, tmp_path)
    assert len(open_corpus([Source(str(file))], world, tmp_path, skip_bad=True)) == 2
    assert "note: 2 bad rows skipped" in capsys.readouterr().err
    with pytest.raises(InputError, match="all 2 rows are bad; the first"):
        open_corpus([Source(str(write(tmp_path / "b.json", [7, 8])))], world, tmp_path, skip_bad=True)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_a_hub_id_needs_the_package_that_reads_it(world: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyalign-edge\[hub\]'"):
        open_corpus([Source("org/name")], world, tmp_path)


def test_held_out_pictures_are_in_no_training_row(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    names = [row["image"] for row in rows]
    pairs = [{**rows[0], "id": f"pair{i}", "image": [a, b]} for i, (a, b) in enumerate(pairwise(names))]
    corpus = open_corpus([Source(str(write(tmp_path / "a.json", rows + pairs)))], world, tmp_path)
    training, held_out = split(corpus, held_out=256, fraction=1.0, seed=0)
    held = set(held_out.used())
    assert len(held) == 8
    assert all(len(pictures) == 1 for pictures in held_out.pictures)
    assert not held & set(training.used())


def test_rows_of_text_alone_and_of_several_pictures_are_trained_on(world: Path, towers: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    text = [{**row, "id": f"text{i}"} for i, row in enumerate(rows[:6])]
    for row in text:
        del row["image"]
        row["conversations"] = [{**m, "value": m["value"].replace("<image>", "")} for m in row["conversations"]]
    pairs = [{**rows[i], "id": f"pair{i}", "image": [rows[i]["image"], rows[i + 1]["image"]]} for i in range(6)]
    for memory in ("tokens", "latents"):
        out = train_tiny(
            world, towers, tmp_path / memory, data=write(tmp_path / "a.json", rows + text + pairs), memory=memory
        )
        checkpoint = load_checkpoint(out)
        assert checkpoint.bank is not None
        sources = {checkpoint.bank.entry(number).source for number in checkpoint.bank.ids}
        assert any(source.startswith("pair") for source in sources)  # found by their first picture
        assert not any(source.startswith("text") for source in sources)  # nothing to find them by
        assert np.isfinite(
            np.concatenate(
                TorchAnswerer(checkpoint).losses(
                    TorchAnswerer(checkpoint).prepare(read_rows(world / "test.json", world)[:4]).examples
                )
            )
        ).all()


def test_a_row_longer_than_the_context_stops_the_run_or_is_counted(world: Path, towers: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    rows[5] = {
        **rows[5],
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a b " * 300}],
    }
    data = write(tmp_path / "a.json", rows)
    with pytest.raises(InputError, match=r"row 6 .*text tokens, the context leaves"):
        train_tiny(world, towers, tmp_path / "c", data=data)
    assert not (tmp_path / "c").exists()
    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", data=data, skip_bad=True, steps=1))
    assert checkpoint.bank is not None
    assert len(checkpoint.bank) in (71, 72)  # one less, unless it was held out


def test_a_row_of_more_pictures_than_the_context_holds_is_named(world: Path, towers: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    for row in rows[:2]:  # of two one at least is not held out
        row["image"] = [row["image"]] * 16
    with pytest.raises(InputError, match=r"row [12] .*the context leaves -96 beside 16 pictures"):
        train_tiny(world, towers, tmp_path / "c", data=write(tmp_path / "a.json", rows), visual_tokens=16)


def test_a_picture_that_cannot_be_read_stops_the_run_or_is_counted(world: Path, towers: Path, tmp_path: Path) -> None:
    rows = rows_of(world)
    (world / "cut.png").write_bytes((world / rows[0]["image"]).read_bytes()[:60])
    data = write(tmp_path / "a.json", [*rows, {**rows[0], "id": "cut", "image": "cut.png"}])
    with pytest.raises(InputError, match=r"row 81 \(id cut\).*cut\.png"):
        train_tiny(world, towers, tmp_path / "c", data=data)
    for cache in (None, tmp_path / "cache"):
        train_tiny(
            world, towers, tmp_path / f"c{cache is None}", data=data, skip_bad=True, steps=1, cache_features=cache
        )


def test_held_out_pictures_may_all_be_bad_and_training_ones_may_not(world: Path, towers: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.json", rows_of(world)[:20])
    training, held_out = split(open_corpus([Source(str(data))], world, tmp_path), held_out=256, fraction=1.0, seed=0)
    for part, name in ((held_out, "held-out"), (training, "training")):
        folder = tmp_path / name
        shutil.copytree(world / "images", folder / "images")
        for picture in part.used():
            (folder / part.names[picture]).write_bytes(b"cut")
        if name == "held-out":
            out = train_tiny(folder, towers, tmp_path / "c", data=data, skip_bad=True, steps=1)
            lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
            assert [json.loads(line)["held_out_loss"] for line in lines] == [None, None, None]
        else:
            with pytest.raises(InputError, match=r"a\.json: 0 pictures to train on that can be read"):
                train_tiny(folder, towers, tmp_path / "d", data=data, skip_bad=True)
            assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("memory", ["latents", "paper"])
def test_two_rows_are_enough_to_train_on(world: Path, towers: Path, tmp_path: Path, memory: str) -> None:
    """Nothing is held out; neither is kept from the other."""
    data = write(tmp_path / "a.json", rows_of(world)[:2])
    checkpoint = load_checkpoint(train_tiny(world, towers, tmp_path / "c", data=data, memory=memory, steps=2))
    assert checkpoint.bank is not None
    assert len(checkpoint.bank) == 2
    side = TorchAnswerer(checkpoint)
    rows = read_rows(world / "test.json", world)[:2]
    assert np.isfinite(np.concatenate(side.losses(side.prepare(rows).examples))).all()
    with pytest.raises(InputError, match="1 pictures to train on that can be read, 2 are needed"):
        train_tiny(world, towers, tmp_path / "d", data=write(tmp_path / "b.json", rows_of(world)[:1]), memory=memory)


def test_a_tokenizer_without_a_pad_token_is_enough(world: Path, towers: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(towers / "lm", tmp_path / "towers" / "lm"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        kept = {key: value for key, value in settings.items() if key not in ("pad_token", "pad_token_id")}
        assert kept != settings or name == "generation_config.json"
        (folder / name).write_text(json.dumps(kept), "utf-8")
    shutil.copytree(towers / "vit", tmp_path / "towers" / "vit")
    side = TorchAnswerer(load_checkpoint(train_tiny(world, tmp_path / "towers", tmp_path / "c", steps=1)))
    rows = read_rows(world / "test.json", world)[:3]
    assert len(side.answers(side.prepare(rows).examples)) == 3


def test_features_from_the_cache_train_the_same_weights(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from tinyalign_edge.train import feature_cache, prepare

    fresh = weights(train_tiny(world, towers, tmp_path / "fresh", memory="latents"))
    cache = tmp_path / "cache"
    first = weights(train_tiny(world, towers, tmp_path / "first", memory="latents", cache_features=cache))
    (shard,) = cache.rglob("*.features")
    kept = shard.read_bytes()
    encoded: list[int] = []
    encoder = prepare.PictureEncoder

    class Counting(encoder):  # type: ignore[misc,valid-type]
        def __call__(self, paths: Any) -> Any:
            encoded.extend(paths)
            return super().__call__(paths)

    monkeypatch.setattr(prepare, "PictureEncoder", Counting)
    again = weights(train_tiny(world, towers, tmp_path / "again", memory="latents", cache_features=cache))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "SPARE_BYTES", 1 << 60)  # a full disk
        train_tiny(world, towers, tmp_path / "full", memory="latents", cache_features=cache, loaders=1)
    assert not encoded
    assert all(torch.equal(fresh[name], first[name]) and torch.equal(fresh[name], again[name]) for name in fresh)
    for number, damage in enumerate((kept[:-1], kept[:-1] + bytes([kept[-1] ^ 1]), b"")):
        shard.write_bytes(damage)
        encoded.clear()
        mended = weights(
            train_tiny(
                world,
                towers,
                tmp_path / f"mended{number}",
                memory="latents",
                cache_features=cache,
                steps=4,
            )
        )
        assert len(encoded) == 80
        assert all(torch.equal(fresh[name], mended[name]) for name in fresh)
        assert shard.read_bytes() == kept


def test_other_preprocessing_has_its_own_cache(world: Path, towers: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"image_size": 48}), ("c", {"visual_tokens": 2})):
        train_tiny(world, towers, tmp_path / name, steps=1, cache_features=tmp_path / "cache", **changes)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_the_disk_has_no_room_for_at_all_is_refused(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from tinyalign_edge.train import feature_cache

    monkeypatch.setattr(feature_cache, "SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match=r"the features of 80 pictures take .* the disk has room for 0\.00 GB"):
        train_tiny(world, towers, tmp_path / "c", cache_features=tmp_path / "cache")
    assert not (tmp_path / "c").exists()


def test_features_that_memory_has_no_room_for_at_all_are_refused(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    from tinyalign_edge.train import features

    record = features.record_type((1024, 1024), 1024)
    refusal = r"the features of 1000000000 pictures take 2101\d{3}\.\d GB, this machine has \d+\.\d GB of memory; "
    with pytest.raises(InputError, match=refusal + "ask less"):
        features.features_in_memory(
            10**9, range(10**9), record, lambda _: pytest.fail("it is refused before the long work"), less="ask less"
        )
    monkeypatch.setattr(features, "SHARE_OF_MEMORY", 0.0)
    with pytest.raises(InputError, match=r"the features of 80 pictures take .*; give --cache-features DIR or train on"):
        train_tiny(world, towers, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert "each step encodes its pictures anew" not in capfd.readouterr().err  # not what happens then
    train_tiny(world, towers, tmp_path / "c", steps=1, memory="none", cache_features=tmp_path / "cache")


def test_a_container_may_have_less_memory_than_its_machine(tmp_path: Path, monkeypatch: Any) -> None:
    from tinyalign_edge.train import features

    without = features._memory()
    limits = tmp_path / "v2", tmp_path / "v1", tmp_path / "absent"
    monkeypatch.setattr(features, "CONTAINER_LIMITS", limits)
    assert features._memory() >= without
    limits[0].write_text("max\n", "utf-8")
    assert features._memory() >= without
    limits[1].write_text("9223372036854771712\n", "utf-8")  # as without one
    assert features._memory() >= without > 2e9
    for limit in limits[:2]:
        limit.write_text("2000000000\n", "utf-8")
        assert features._memory() == 2e9
        limit.unlink()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"memory": "tokens"},
        {"memory": "latents", "bf16": True},
        {"memory": "paper"},
        {"connector": "mlp", "visual_tokens": None},
    ],
)
def test_pictures_are_encoded_anew_where_there_is_no_room_for_what_the_connector_reads(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, cached: bool, options: dict[str, Any]
) -> None:
    from tinyalign_edge.train import feature_cache, features

    rows = rows_of(world)
    for row in rows[:4]:
        del row["image"]
        row["conversations"][0]["value"] = "What do you see?"
    for row in rows[4:8]:
        row["image"] = [row["image"], rows[8]["image"]]
    data = write(tmp_path / "rows.json", rows)
    cache = tmp_path / "cache" if cached else None
    kept = train_tiny(world, towers, tmp_path / "kept", data=data, **options)
    assert "each step encodes its pictures anew" not in capfd.readouterr().err
    key_features = 80 * features.record_type((0, 32), 32).itemsize
    monkeypatch.setattr(feature_cache.FeatureCache, "room", lambda _: key_features)
    monkeypatch.setattr(features, "_memory", lambda: 1 + int(key_features / features.SHARE_OF_MEMORY))
    anew = train_tiny(world, towers, tmp_path / "anew", data=data, cache_features=cache, **options)
    told = capfd.readouterr().err
    assert told.count("each step encodes its pictures anew, which takes longer; --cache-features DIR") == 1
    before, after = ([point["held_out_loss"] for point in loss_curve(folder)] for folder in (kept, anew))
    assert after == pytest.approx(before, rel=1e-4)
    expected, found = weights(kept), weights(anew)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    if cached:
        (folder,) = (tmp_path / "cache").iterdir()
        assert sum(file.stat().st_size for file in folder.glob("*.features")) <= key_features
        shutil.rmtree(cache)
    with pytest.raises(InputError, match=r"--loaders 2: there is no room for the pictures' features"):
        train_tiny(world, towers, tmp_path / "loaders", data=data, cache_features=cache, loaders=2, **options)
    assert "Encoding pictures" not in capfd.readouterr().err
    assert not (tmp_path / "loaders").exists()
    assert not cache or not list(cache.iterdir())


def test_a_run_whose_pictures_are_encoded_anew_is_resumed_with_room_and_without(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from tinyalign_edge.train import features, watcher

    folder, cut, gone = tmp_path / "pictures", tmp_path / "cut", tmp_path / "gone"
    shutil.copytree(world / "images", folder / "images")
    options: dict[str, Any] = {"memory": "latents", "key": "fused", "data": world / "train.json", "steps": 6}
    whole = train_tiny(folder, towers, tmp_path / "whole", **options)
    key_features = 80 * features.record_type((0, 32), 32).itemsize
    memory = features._memory
    monkeypatch.setattr(features, "_memory", lambda: 1 + int(key_features / features.SHARE_OF_MEMORY))
    on_step_end = watcher.Watcher.on_step_end

    def lose_the_pictures(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        if state.global_step == 3:
            (folder / "images").rename(gone)

    with monkeypatch.context() as patch:
        patch.setattr(watcher.Watcher, "on_step_end", lose_the_pictures)
        with pytest.raises(InputError, match=r"\.png.*; it was there .* start again, with --resume$"):
            train_tiny(folder, towers, cut, **options)
    gone.rename(folder / "images")
    assert last_whole(cut / "state") is not None
    begun = cut / "state" / "run.json"
    settings = json.loads(begun.read_text("utf-8"))

    def write_floor(floor: float) -> float:
        begun.write_text(json.dumps({**settings, "memory": {**settings["memory"], "floor": floor}}), "utf-8")
        return floor

    write_floor(settings["memory"]["floor"] + 0.01)
    with pytest.raises(InputError, match=r"had other settings \(memory\.floor\)"):
        train_tiny(folder, towers, cut, resume=True, **options)
    floor = write_floor(settings["memory"]["floor"] + 1e-6)  # as another machine may have computed it
    shutil.copytree(cut, tmp_path / "other")
    for out in (cut, tmp_path / "other"):
        train_tiny(folder, towers, out, resume=True, **options)
        assert load_checkpoint(out).config.memory.floor == floor
        for name, expected in weights(whole).items():
            np.testing.assert_allclose(weights(out)[name], expected, rtol=1e-3, atol=1e-4)
        monkeypatch.setattr(features, "_memory", memory)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.json", "[]"), ("rows.json", ""), ("rows.json", " \n"), ("rows.jsonl", ""), ("rows.jsonl", "\n\n")],
)
def test_files_without_rows_are_named_and_nothing_is_left(
    world: Path, towers: Path, tmp_path: Path, name: str, text: str, skip_bad: bool
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path / name))}: holds no rows"):
        train_tiny(
            world, towers, tmp_path / "c", data=tmp_path / name, skip_bad=skip_bad, cache_features=tmp_path / "cache"
        )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_pictures_of_every_make_are_trained_on_and_bombs_are_not(world: Path, towers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(world / "images", folder / "images")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    Image.new("CMYK", (40, 20), (9, 99, 9, 0)).save(folder / "cmyk.jpg")
    Image.new("P", (9, 30), 3).save(folder / "palette.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 9)).save(folder / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 10), "blue").save(folder / "turned.jpg", exif=turned)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    odd = ["pixel.png", "cmyk.jpg", "palette.png", "clear.png", "turned.jpg", "moves.gif"]
    rows = rows_of(world)
    rows += [{**rows[0], "id": name, "image": name} for name in odd]
    data = write(tmp_path / "a.json", rows)
    checkpoint = load_checkpoint(train_tiny(folder, towers, tmp_path / "c", data=data, steps=1, fraction=1.0))
    assert checkpoint.bank is not None
    assert len(checkpoint.bank) == len(rows) - 8  # the held-out ones
    bomb = write(tmp_path / "b.json", [*rows, {**rows[0], "id": "bomb", "image": "bomb.png"}])
    with pytest.raises(InputError, match=r"\(id bomb\): .*bomb\.png: .* pixels.* allowed"):
        train_tiny(folder, towers, tmp_path / "d", data=bomb)


def test_pictures_that_are_skipped_are_told_with_the_reason(
    world: Path, towers: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = rows_of(world)
    Image.new("1", (20_000, 20_000)).save(world / "bomb.png")
    (world / "cut.png").write_bytes((world / rows[0]["image"]).read_bytes()[:60])
    bad = [{**rows[0], "id": name, "image": f"{name}.png"} for name in ("bomb", "cut")]
    data = write(tmp_path / "a.json", [*rows, *bad])
    for cache in (None, tmp_path / "cache"):
        out = tmp_path / f"c{cache is None}"
        train_tiny(world, towers, out, data=data, skip_bad=True, steps=1, cache_features=cache)
        said = capsys.readouterr().err
        for reason in (r"row 81 \(id bomb\): .*bomb\.png: .* pixels.* allowed", r"row 82 .*cut\.png: truncated"):
            assert re.search(reason, said), said


def test_bad_pictures_alone_leave_no_shard_in_the_cache(world: Path, towers: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(world / "images", folder / "images")
    for number, picture in enumerate(sorted((folder / "images").iterdir())):
        picture.write_bytes(b"cut" + bytes([number]))
    data, cache = write(tmp_path / "a.json", rows_of(world)[:20]), tmp_path / "cache"
    with pytest.raises(InputError, match="0 pictures to train on that can be read"):
        train_tiny(folder, towers, tmp_path / "c", data=data, skip_bad=True, cache_features=cache)
    assert not list(cache.rglob("*.features"))
    assert "damaged or foreign" not in capsys.readouterr().err


HALF = "x \ud800"  # half of a surrogate pair, which JSON can spell and no UTF-8 has


@pytest.mark.parametrize(
    "changed",
    [
        {"id": HALF},
        {"caption": HALF},
        {"image": f"{HALF}.png"},
        {"image": "a" * 300},
        {"conversations": [{"from": "human", "value": HALF}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": HALF}]},
    ],
    ids=["id", "caption", "image", "long name", "question", "answer"],
)
def test_a_row_that_cannot_be_written_or_opened_is_named_or_counted(
    changed: dict[str, Any], world: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = rows_of(world)[:3]
    file = write(tmp_path / "a.json", [*rows, {**rows[0], **changed}])
    with pytest.raises(InputError, match=r"a\.json row 4"):
        open_corpus([Source(str(file))], world, tmp_path)
    assert len(open_corpus([Source(str(file))], world, tmp_path, skip_bad=True)) == 3
    assert "note: 1 bad rows skipped" in capsys.readouterr().err


def test_it_is_told_how_far_long_work_before_and_after_the_steps_is(
    world: Path, towers: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(progress_module, "BRIEF_S", 0.0)
    train_tiny(world, towers, tmp_path / "c", memory="latents", steps=1)
    told = capfd.readouterr().err
    for work in ("Making keys", "Looking up neighbours", "Encoding entries"):
        assert f"{work}: 72 of 72, done" in told


def test_it_is_told_where_there_is_no_run_to_resume(world: Path, towers: Path, tmp_path: Path, capfd: Any) -> None:
    train_tiny(world, towers, tmp_path / "c", memory="none", resume=True)
    assert f"note: {tmp_path / 'c'}: no interrupted run to go on with; a new one begins\n" in capfd.readouterr().err


def test_a_run_goes_through_a_file_as_often_as_its_weight_says(world: Path, towers: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "steps": None, "memory": "none"}
    whole = train_tiny(world, towers, tmp_path / "whole", **options)
    half = train_tiny(world, towers, tmp_path / "half", data=[f"{world / 'train.json'}:0.5"], **options)
    steps = [load_checkpoint(folder).config.training.steps for folder in (whole, half)]
    assert steps == [2 * -(-rows // 8) for rows in (72, 36)]


def test_a_weight_that_takes_no_row_of_its_file_is_refused(world: Path, towers: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.json", rows_of(world)[:20])
    for data in ([f"{few}:0.01"], [str(world / "train.json"), f"{few}:0.01"]):
        with pytest.raises(InputError, match=r"few\.json:0\.01: of \d+ training rows that is none an epoch"):
            train_tiny(world, towers, tmp_path / "c", data=data)
        assert not (tmp_path / "c").exists()


def test_the_text_of_a_chat_template_counts_in_the_context(world: Path, towers: Path, tmp_path: Path) -> None:
    save_lm(tmp_path / "lm", steps=0, max_position_embeddings=2048)
    words = len(load_tokenizer(tmp_path / "lm" / "tokenizer.json").encode("one two", add_special_tokens=False).ids)
    template = f"{'one two' * (1500 // words)}{DEFAULT_CHAT_TEMPLATE}"
    (tmp_path / "lm" / "chat_template.jinja").write_text(template, "utf-8")
    rows = rows_of(world)
    rows[5]["conversations"] = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a b " * 150}]
    with pytest.raises(InputError, match=r"row 6 .*text tokens, the context leaves \d+; shorten"):
        train_tiny(world, towers, tmp_path / "c", lm=str(tmp_path / "lm"), data=write(tmp_path / "a.json", rows))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_memory_that_fills_the_context_is_refused_whatever_the_rows(
    world: Path, towers: Path, tmp_path: Path, skip_bad: bool
) -> None:
    with pytest.raises(InputError, match=r"no row fits .* the memory 24000, .*use fewer --neighbours, --value-tokens,"):
        train_tiny(world, towers, tmp_path / "c", k=1000, skip_bad=skip_bad)
    with pytest.raises(InputError, match=r"no row fits .* the memory 8000, .*use fewer --neighbours, --latents, "):
        train_tiny(world, towers, tmp_path / "c", k=1000, skip_bad=skip_bad, memory="latents")


def test_a_fraction_that_leaves_too_few_pictures_is_named(world: Path, towers: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 pictures to train on .*raise --fraction 0\.01"):
        train_tiny(world, towers, tmp_path / "c", fraction=0.01)
