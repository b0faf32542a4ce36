"""Whole vision-language models: the bundle reads what transformers reads and says what transformers says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import tinyalign_edge as ta
from tests.vlms import KINDS, load_processor, load_vlm, processor_inputs
from tinyalign_edge.bundle import CachePrecision, PictureInTemplate, PromptConfig, open_bundle
from tinyalign_edge.errors import BundleError, GateError, InputError, UnsupportedError
from tinyalign_edge.export import vlm_samples
from tinyalign_edge.export.run import ExportOptions, export
from tinyalign_edge.image import open_image, preprocess
from tinyalign_edge.prompt import Prompt, Said, chat_messages, load_tokenizer
from tinyalign_edge.runtime.decoder import missing_for_cache
from tinyalign_edge.runtime.verify import verify
from tinyalign_edge.train import vlm

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = ("What colour is the circle?", "How many objects are there?", "zz", " Is it  <image> red? ")
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, world: Path) -> dict[str, Path]:
    """Options of `export`: four samples, for what does not depend on their number."""
    path = tmp_path_factory.mktemp("few") / "few.json"
    path.write_text(json.dumps(json.loads((world / "test.json").read_text("utf-8"))[:4]), "utf-8")
    return {"calibration": path, "images": world}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory, vlms: Path, few: dict[str, Path]) -> dict[str, Path]:
    """The float32 bundle of each."""
    folder = tmp_path_factory.mktemp("fp32")
    for kind in KINDS:
        export(vlms / kind, folder / kind, ExportOptions(precision="fp32", **few))
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copy(vlms: Path, tmp_path: Path) -> Path:
    """A LLaVA folder, free to be changed."""
    return Path(shutil.copytree(vlms / "llava-clip", tmp_path / "vlm"))


def pictures(world: Path) -> list[Image.Image]:
    """Some of the world, one of them wide, one tall, and one of noise."""
    drawn = [Image.open(path).convert("RGB") for path in sorted((world / "images").glob("test-*.png"))[:3]]
    noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
    return [drawn[0], drawn[1].resize((150, 61)), drawn[2].resize((41, 200)), Image.fromarray(noise)]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundle_reads_the_ids_and_pixels_that_the_processor_gives(
    vlms: Path, fp32: dict[str, Path], world: Path, kind: str
) -> None:
    processor, image_token = load_processor(vlms / kind, kind), "<image>"
    manifest = open_bundle(fp32[kind])
    prompt = Prompt(manifest.prompt, load_tokenizer(fp32[kind] / manifest.tokenizer_file))
    marker = prompt.tokenizer.token_to_id(image_token)
    for picture in pictures(world):
        for question in QUESTIONS:
            expected = processor_inputs(processor, kind, picture, question.replace(image_token, " ").strip())
            ids = prompt.question(question)
            given = [*ids.before, *[marker] * manifest.vision.visual_tokens, *ids.after]
            assert given == expected["input_ids"][0].tolist()
        pixels = expected["pixel_values"].numpy().reshape(1, 3, manifest.image.height, manifest.image.width)
        np.testing.assert_array_equal(preprocess(picture, manifest.image), pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_reads_the_ids_that_the_processor_gives(
    vlms: Path, fp32: dict[str, Path], world: Path, kind: str
) -> None:
    processor = load_processor(vlms / kind, kind)
    manifest = open_bundle(fp32[kind])
    prompt = Prompt(manifest.prompt, load_tokenizer(fp32[kind] / manifest.tokenizer_file))
    marker = prompt.tokenizer.token_to_id("<image>")
    turns = [Said("What is red?", "a circle"), Said("And now?", None, 2)]
    messages = chat_messages(turns, manifest.prompt.picture)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    starts = text.startswith(processor.tokenizer.bos_token)
    options = {"add_special_tokens": not starts, "return_token_type_ids": False}
    expected = processor(images=[pictures(world)[:3]], text=[text], **options)["input_ids"][0]
    picture = [marker] * manifest.vision.visual_tokens
    first, *rest = prompt.conversation(turns)
    assert [*first, *(token for part in rest for token in (*picture, *part))] == list(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_about_several_pictures_is_answered(fp32: dict[str, Path], world: Path, kind: str) -> None:
    with ta.load(fp32[kind], threads=1) as model:
        talk, (one, two, three) = model.chat(), pictures(world)[:3]
        assert talk.ask(QUESTIONS[0], one).text == model.ask(one, QUESTIONS[0]).text
        talk.ask("And what is the same in both?", [two, three])
        assert [len(exchange.images) for exchange in talk.exchanges] in ([1, 2], [2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_fp32_bundle_says_what_transformers_generates(
    vlms: Path, fp32: dict[str, Path], world: Path, kind: str
) -> None:
    processor, torch_side = load_processor(vlms / kind, kind), load_vlm(vlms / kind, kind)
    first_logits = []
    with ta.load(fp32[kind]) as model:
        for picture in pictures(world):
            image = model.encode(picture)
            for question in QUESTIONS[:3]:
                inputs = processor_inputs(processor, kind, picture, question)
                out = torch_side.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                expected = processor.tokenizer.decode(
                    out[0, inputs["input_ids"].shape[1] :],
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
                answer = model.ask(image, question, max_new_tokens=MAX_NEW_TOKENS)
                assert answer.text.strip() == expected.strip()
            logits, _ = model.answer_logits(image, QUESTIONS[0], "red")
            with torch.inference_mode():
                own = torch_side(**processor_inputs(processor, kind, picture, QUESTIONS[0])).logits[0, -1].numpy()
            np.testing.assert_allclose(logits[0], own, atol=1e-4 * np.abs(own).max())
            first_logits.append(logits[0])
    apart = [np.abs(logits - first_logits[0]).max() for logits in first_logits[1:]]
    assert min(apart) > 1e-3 * np.abs(own).max(), "the picture matters, ten times more than the tolerance above"


@pytest.mark.parametrize("kind", KINDS)
def test_the_int8_bundle_passes_the_gate_and_verifies(vlms: Path, world: Path, tmp_path: Path, kind: str) -> None:
    tried = kind in ("llava-gemma2", "smolvlm") and not missing_for_cache("int8")
    kv: CachePrecision = "int8" if tried else "fp32"
    options = ExportOptions(calibration=world / "test.json", images=world, kv=kv)
    manifest = export(vlms / kind, tmp_path / "b", options)
    assert manifest.decoder.kv == kv
    assert manifest.gate is not None
    assert manifest.gate.passed
    assert manifest.gate.answers == 24
    assert manifest.gate.fp32_max_logit_error < 1e-4
    assert (manifest.memory.kind, manifest.vision.key_dim) == ("none", 0)
    verified = verify(tmp_path / "b")
    assert verified.probe_key_cosine is None
    assert verified.probe_logits_cosine > 0.9999
    with ta.load(tmp_path / "b") as model:
        image = model.encode(pictures(world)[0])
        assert image.key is None
        assert image.memories == ()


@pytest.mark.parametrize(("kind", "eye"), [("llava-clip", "LlavaEye"), ("idefics3", "Idefics3Eye")])
def test_a_graph_that_is_not_the_models_is_caught(
    vlms: Path, tmp_path: Path, few: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, eye: str
) -> None:
    right = getattr(vlm, eye)

    def wrong(model: Any) -> Any:
        made = right(model)
        if kind == "llava-clip":
            made.layers = [-1]  # the model reads the one before the last
        else:
            made.positions = made.tower.embeddings.position_embedding.weight[None]  # transformers' differ by rounding
        return made

    monkeypatch.setattr(vlm, eye, wrong)
    with pytest.raises(GateError, match="fp32 logit error"):
        export(vlms / kind, tmp_path / "b", ExportOptions(precision="fp32", **few))
    assert not (tmp_path / "b").exists()


def test_without_samples_drawn_pictures_are_used(
    vlms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vlm_samples, "DRAWN", 6)
    manifest = export(vlms / "smolvlm", tmp_path / "b", ExportOptions(precision="fp32"))
    assert manifest.gate is not None
    assert (manifest.gate.answers, manifest.gate.answers_equal) == (6, 1.0)
    assert "--calibration" in capsys.readouterr().err
    first = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    export(vlms / "smolvlm", tmp_path / "b", ExportOptions(precision="fp32"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == first


def test_a_model_of_another_kind_is_refused_with_the_list_of_known_ones(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        UnsupportedError, match=r"'GPT2LMHeadModel' is not supported; known: .*Llava.*Idefics3.*SmolVLM"
    ):
        export(tmp_path / "gpt2", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_vision_tower_of_another_kind_is_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text("utf-8"))
    edit_json(copy / "config.json", vision_config={**config["vision_config"], "image_size": 48})
    with pytest.raises(InputError, match="pictures of 32 x 32, its vision tower takes 48 x 48"):
        export(copy, tmp_path / "b")


@pytest.mark.parametrize(
    "changes", [{"model_type": "llama"}, {"architectures": ["Idefics3ForConditionalGeneration"]}, {"architectures": 7}]
)
def test_a_configuration_that_is_not_of_its_class_is_refused(
    copy: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit_json(copy / "config.json", **changes)
    with pytest.raises(ta.TinyAlignError, match=r"^[^\n]*vlm[^\n]*$"):
        export(copy, tmp_path / "b")


def test_an_adapter_is_to_be_merged_first(copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(UnsupportedError, match=r"adapter.*merge"):
        export(copy, tmp_path / "b")


def test_a_weight_that_is_missing_or_not_used_is_named(copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # the file is written anew below
    name = next(name for name in weights if "linear_2.weight" in name)
    save_file({n: w for n, w in weights.items() if n != name}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"linear_2\.weight' is missing"):
        export(copy, tmp_path / "b")
    save_file({**weights, "lora_A.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lora_A\.weight' is not part of"):
        export(copy, tmp_path / "b")


def test_a_model_without_a_chat_template_says_how_to_give_one(copy: Path, tmp_path: Path, few: dict[str, Path]) -> None:
    template = (copy / "chat_template.jinja").read_text("utf-8")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"has no chat template.*--chat-template FILE"):
        export(copy, tmp_path / "b")
    (tmp_path / "blind.jinja").write_text("{{ messages[0]['role'] }}", "utf-8")
    with pytest.raises(InputError, match="does not write the token '<image>' once"):
        export(copy, tmp_path / "b", ExportOptions(chat_template=tmp_path / "blind.jinja"))
    (tmp_path / "own.jinja").write_text(template, "utf-8")
    own = tmp_path / "own.jinja"
    manifest = export(copy, tmp_path / "b", ExportOptions(precision="fp32", chat_template=own, **few))
    assert manifest.prompt.chat_template == template


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_older_places_of_a_chat_template_are_read(
    copy: Path, tmp_path: Path, few: dict[str, Path], name: str
) -> None:
    template = (copy / "chat_template.jinja").read_text("utf-8")
    (copy / "chat_template.jinja").unlink()
    if not (copy / name).is_file():
        (copy / name).write_text("{}", "utf-8")
    edit_json(copy / name, chat_template=template)
    manifest = export(copy, tmp_path / "b", ExportOptions(precision="fp32", **few))
    assert manifest.prompt.chat_template == template


def test_samples_need_both_options_and_a_checkpoint_has_its_own_template(
    vlms: Path, checkpoints: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--calibration and --images: give both"):
        export(vlms / "smolvlm", tmp_path / "b", ExportOptions(calibration=world / "test.json"))
    template = tmp_path / "own.jinja"
    with pytest.raises(InputError, match="is for whole vision-language models"):
        export(checkpoints["none"], tmp_path / "b", ExportOptions(chat_template=template))


def test_a_picture_that_the_template_writes_twice_or_the_tokenizer_does_not_know_is_refused(
    fp32: dict[str, Path],
) -> None:
    manifest = open_bundle(fp32["llava-clip"])
    tokenizer = load_tokenizer(fp32["llava-clip"] / manifest.tokenizer_file)
    settings: dict[str, Any] = {**vars(manifest.prompt), "picture": PictureInTemplate("<nothing>")}
    with pytest.raises(BundleError, match="no token '<nothing>'"):
        Prompt(PromptConfig(**settings), tokenizer)
    settings |= {"picture": PictureInTemplate("<image>"), "chat_template": "<image><image>{{ messages[0].content }}"}
    with pytest.raises(BundleError, match="'<image>' 2 times for one picture"):
        Prompt(PromptConfig(**settings), tokenizer).question("What?")


def test_a_picture_that_is_to_be_split_into_tiles_is_read_as_one(
    vlms: Path, tmp_path: Path, world: Path, few: dict[str, Path]
) -> None:
    """The setting is switched off: what the processor gives with `do_image_splitting=False` is what is read."""
    folder = Path(shutil.copytree(vlms / "idefics3", tmp_path / "vlm"))
    edit_json(folder / "preprocessor_config.json", do_image_splitting=True)
    manifest = export(folder, tmp_path / "b", ExportOptions(precision="fp32", **few))
    processor = load_processor(vlms / "idefics3", "idefics3")
    picture = open_image(pictures(world)[1])
    expected = processor_inputs(processor, "idefics3", picture, "What?")["pixel_values"][0].numpy()
    np.testing.assert_array_equal(preprocess(picture, manifest.image), expected)
