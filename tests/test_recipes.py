"""Recipes, and how the command line is put before them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.towers import save_lm  # noqa: E402
from tinyalign_edge.errors import InputError  # noqa: E402
from tinyalign_edge.train.checkpoint import load_checkpoint  # noqa: E402
from tinyalign_edge.train.command import TrainCommand, run_command  # noqa: E402
from tinyalign_edge.train.recipe import SHIPPED, load_recipe  # noqa: E402
from tinyalign_edge.train.settings import Stage  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PATCH = 2
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWERS = {  # of each recipe: kind of encoder, patches a side, kind of language model
    "siglip-base-smollm2-135m": ("siglip", 14, "llama"),
    "siglip-so400m-qwen2.5-0.5b": ("siglip", 27, "qwen2"),
    "clip-large-tinyllama": ("clip", 24, "llama"),
    "tinyalign-siglip-so400m-phi-2": ("siglip", 27, "phi"),
}


def save_encoder(folder: Path, kind: str, patches: int) -> None:
    """A random encoder with as many patches as the recipe's."""
    side = patches * PATCH
    size = {"height": side, "width": side}
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=side, patch_size=PATCH)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)
    else:
        config = SiglipVisionConfig(**SMALL, image_size=side, patch_size=PATCH)
        config.vision_use_head = False
        SiglipVisionModel(config).save_pretrained(folder)
        SiglipImageProcessor(size=size).save_pretrained(folder)


def command(world: Path, out: Path, recipe: str, stage: Stage, **given: Any) -> TrainCommand:
    options = {"steps": 2, "batch_size": 4, "micro_batch": 2, "device": "cpu", **given.pop("options", {})}
    paths: dict[str, Any] = {
        "data": (str(world / "train.json"),),
        "images": world,
        "vision": None,
        "lm": None,
        "vlm": None,
        "chat_template": None,
        "start": None,
    }
    return TrainCommand(stage, options, out=out, resume=False, recipe=recipe, **(paths | given))


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_each_recipe_runs_both_stages_on_tiny_towers_of_its_kinds(name: str, world: Path, tmp_path: Path) -> None:
    encoder, patches, lm = TOWERS[name]
    save_encoder(tmp_path / "vision", encoder, patches)
    save_lm(tmp_path / "lm", lm, steps=0, max_position_embeddings=2048)
    rows = json.loads((world / "train.json").read_text("utf-8"))[:12]
    (tmp_path / "few.json").write_text(json.dumps(rows), "utf-8")
    few = {"data": (str(tmp_path / "few.json"),)}
    towers = {"vision": str(tmp_path / "vision"), "lm": str(tmp_path / "lm"), **few}
    run_command(command(world, tmp_path / "align", name, "align", **towers))
    first = load_checkpoint(tmp_path / "align").config
    recipe = load_recipe(name)
    assert first.memory.kind == recipe.align.options["memory"]
    assert first.connector.kind == recipe.align.options["connector"]
    assert first.connector.visual_tokens == recipe.align.options.get("visual_tokens", patches**2)
    assert (first.training.bf16, first.training.warmup, first.training.steps) == (True, 0.03, 2)
    if recipe.instruct.options.get("lora_rank"):
        pytest.importorskip("peft")
    run_command(command(world, tmp_path / "instruct", name, "instruct", start=tmp_path / "align", **few))
    second = load_checkpoint(tmp_path / "instruct").config
    assert second.training.lm_learning_rate == recipe.instruct.options["lm_learning_rate"]
    assert second.language.sha256 != first.language.sha256


def write(path: Path, more: str) -> str:
    path.write_text(
        f'description = "d"\n[towers]\nvision = "v"\nlm = "l"\n[align]\nepochs = 2\n{more}\n[instruct]\n', "utf-8"
    )
    return str(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("batchsize = 3", r"r\.toml\.align: unknown key 'batchsize'; known: data, images, memory"),
        ("device = 'cpu'", "unknown key 'device'"),
        ("batch_size = '3'", r"r\.toml\.align\.batch_size: expected int, found str '3'"),
        ("[align.more]\na = 1", "unknown key 'more'"),
        ("connector = 'qformer'", "'qformer' is not one of 'pooled'"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_named(more: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path / "r.toml", more))


@pytest.mark.parametrize(
    ("at_top", "in_towers", "in_instruct", "message"),
    [
        ("colour = 1", "", "", r"r\.toml: unknown key 'colour'; known: description, towers, align, instruct$"),
        ("", "audio = 'a'", "", r"r\.toml\.towers: unknown key 'audio'; known: vision, lm$"),
        ("", "", "batchsize = 3", r"r\.toml\.instruct: unknown key 'batchsize'; known: data, images, memory"),
        ("", "", "[pretrain]\nsteps = 1", r"r\.toml: unknown key 'pretrain'; known: description"),
        ("", "vision = 'again'", "", "not valid TOML"),
    ],
)
def test_a_wrong_key_is_named_wherever_it_stands(
    at_top: str, in_towers: str, in_instruct: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        f'description = "d"\n{at_top}\n[towers]\nvision = "v"\nlm = "l"\n{in_towers}\n[align]\n'
        f"[instruct]\n{in_instruct}\n",
        "utf-8",
    )
    with pytest.raises(InputError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize("missing", ["description", "vision", "lm", "[align]", "[instruct]"])
def test_a_recipe_that_lacks_a_part_is_refused(missing: str, tmp_path: Path) -> None:
    lines = ['description = "d"', "[align]", "[instruct]", "[towers]", 'vision = "v"', 'lm = "l"']
    path = tmp_path / "r.toml"
    path.write_text("\n".join(lines), "utf-8")
    load_recipe(str(path))
    path.write_text("\n".join(line for line in lines if not line.startswith(missing)), "utf-8")
    with pytest.raises(InputError, match=f"r\\.toml.*: key '{missing.strip('[]')}' is missing"):
        load_recipe(str(path))


def test_an_unknown_recipe_lists_those_that_ship() -> None:
    with pytest.raises(InputError, match=r"--recipe none: no such file.*clip-large-tinyllama, siglip-base"):
        load_recipe("none")


def test_the_command_line_goes_before_the_recipe(world: Path, towers: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", "batch_size = 16\nlearning_rate = 0.5\nmemory = 'none'\nvisual_tokens = 4")
    given = {"vision": str(towers / "vit"), "lm": str(towers / "lm"), "options": {"learning_rate": 1e-4}}
    run_command(command(world, tmp_path / "c", recipe, "align", **given))
    training = load_checkpoint(tmp_path / "c").config.training
    assert (training.steps, training.batch_size, training.learning_rate) == (2, 4, 1e-4)


def test_a_recipe_names_data_and_the_folder_of_its_pictures(world: Path, towers: Path, tmp_path: Path) -> None:
    data = [f"{world / 'train.json'}:0.5", str(world / "test.json")]
    recipe = write(
        tmp_path / "r.toml", f"data = {json.dumps(data)}\nimages = {json.dumps(str(world))}\nvisual_tokens = 4"
    )
    given: dict[str, Any] = {"vision": str(towers / "vit"), "lm": str(towers / "lm")}
    run_command(command(world, tmp_path / "its", recipe, "align", **given | {"data": (), "images": None}))
    used = load_checkpoint(tmp_path / "its").config.training.data
    assert [(ref.path, ref.weight) for ref in used] == [(str(world / "train.json"), 0.5), (str(world / "test.json"), 1)]
    other = tmp_path / "other.json"
    other.write_bytes((world / "test.json").read_bytes())
    run_command(command(world, tmp_path / "ours", recipe, "align", **given | {"data": (str(other),)}))
    assert [ref.path for ref in load_checkpoint(tmp_path / "ours").config.training.data] == [str(other)]


def test_what_stage_one_made_is_not_chosen_in_stage_two(
    world: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write(tmp_path / "r.toml", "")
    for options in ({"k": 3}, {"memory_dropout": 0.5}):
        wanted = command(world, tmp_path / "c", recipe, "instruct", start=checkpoints["none"], options=options)
        with pytest.raises(InputError, match=r"--(neighbours 3|memory-dropout 0\.5): belongs to stage align"):
            run_command(wanted)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("align", {"memory": "none", "k": 9}, r"--neighbours 9: there is no memory with --memory none; leave it out"),
        ("align", {"memory": "none", "memory_dropout": 0.5}, r"--memory-dropout 0\.5: there is no memory"),
        ("align", {"memory": "tokens", "latents": 4}, r"--latents 4: --memory tokens has none; leave it out"),
        ("align", {"lm_learning_rate": 0.5}, r"--lm-learning-rate 0\.5: is for --stage instruct; leave it out"),
        ("instruct", {"lora_alpha": 4}, r"lora_alpha 4: there are no adapters without a rank \(--lora\)"),
    ],
)
def test_an_option_without_effect_is_refused(
    stage: Stage, options: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    wanted = command(world, tmp_path / "c", "", stage, options=options)
    with pytest.raises(InputError, match=message):
        run_command(replace(wanted, recipe=None))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "none", "gate": False, "copy_words": False, "episodes": 0.0},
        {"memory": "paper", "latents": 4, "latent_dim": 8},
    ],
)
def test_what_is_said_away_or_has_an_effect_is_taken(
    options: dict[str, Any], world: Path, towers: Path, tmp_path: Path
) -> None:
    given = {"vision": str(towers / "vit"), "lm": str(towers / "lm"), "options": {"visual_tokens": 4, **options}}
    run_command(replace(command(world, tmp_path / "c", "", "align", **given), recipe=None))
    assert load_checkpoint(tmp_path / "c").config.memory.kind == options["memory"]


def test_a_recipes_memory_can_be_left_out(world: Path, towers: Path, tmp_path: Path) -> None:
    memory = "k = 2\nkey = 'question'\nkey_grid = 2\nkey_dim = 8\nvalue_tokens = 9\ngate = true\nmemory_first = true\n"
    memory += "copy_words = true\nepisodes = 0.2\nmemory_dropout = 0.1\nmemory_from = 0.3\n"
    memory += "latents = 2\nlatent_dim = 8\nreconstruct = 0.1\nfreeze_values = true\nrandom_values = true\n"
    recipe = write(tmp_path / "r.toml", f"{memory}visual_tokens = 4")
    given = {"vision": str(towers / "vit"), "lm": str(towers / "lm"), "options": {"memory": "none"}}
    run_command(command(world, tmp_path / "c", recipe, "align", **given))
    assert load_checkpoint(tmp_path / "c").bank is None


def test_what_a_recipe_chose_is_told_with_a_remedy(world: Path, tmp_path: Path) -> None:
    name = "siglip-base-smollm2-135m"
    with pytest.raises(InputError, match=rf"connector pooled \(of --recipe {name}\): with --vlm it is the model's own"):
        run_command(command(world, tmp_path / "c", name, "align", vlm=tmp_path))
    wanted = command(world, tmp_path / "c", name, "align", options={"batch_size": 8, "steps": 2, "device": "cpu"})
    without = {key: value for key, value in wanted.options.items() if key != "micro_batch"}
    with pytest.raises(
        InputError, match=r"--batch-size 8: must be a multiple .*--micro-batch 32; give a --batch-size or a"
    ):
        run_command(replace(wanted, options=without))
