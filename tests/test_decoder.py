"""The exported decoder's contract, on a tiny random Llama; what each family computes is in test_families."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyalign_edge.bench.models.compare import onnx_logits, relative_error, torch_logits
from tinyalign_edge.bench.models.tiny import Tiny, build, random_ids
from tinyalign_edge.bundle import DecoderBlock, Format
from tinyalign_edge.errors import BundleError, InputError, UnsupportedError
from tinyalign_edge.export.decoder import export_decoder
from tinyalign_edge.export.families import product_names, read_architecture
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.processor import own_plan
from tinyalign_edge.export.weights import StateDict
from tinyalign_edge.runtime.decoder import Decoder

SHARED = Path(os.environ.get("TINYALIGN_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260k"


def llama(**changes: Any) -> PreTrainedModel:
    """A Llama of two layers with random weights, biases and norm weights that all matter."""
    return build(Tiny("llama", "", {"tie_word_embeddings": True, **changes}))


def export(
    model: PreTrainedModel, folder: Path, base: Format = "fp32", given_back: dict[str, Format] | None = None
) -> Decoder:
    block = export_decoder(model.config, StateDict(model), folder, plan=own_plan(base, given_back))
    return Decoder(folder, block, threads=1)


def greedy(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    cache, answer = decoder.new_cache(len(ids) + count), []
    step = ids
    for _ in range(count):
        step = [int(decoder.forward(cache, decoder.embed(step))[0].argmax())]
        answer += step
    return answer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def decoder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return export(model, tmp_path_factory.mktemp("fp32"))


def test_a_model_with_a_padded_head_gives_the_padded_size_in_its_block(tmp_path: Path) -> None:
    assert export(llama(head_dim=24), tmp_path).block.head_dim == 32


@pytest.mark.parametrize("num_logits", [1, 3, 10])
def test_logits_are_those_of_the_last_positions(model: PreTrainedModel, decoder: Decoder, num_logits: int) -> None:
    ids = random_ids(10)
    logits = decoder.forward(decoder.new_cache(10), decoder.embed(ids), num_logits=num_logits)
    assert relative_error(logits, torch_logits(model, ids)[-num_logits:]) < 1e-4


def test_embed_gives_the_rows_of_the_table(model: PreTrainedModel, decoder: Decoder) -> None:
    table = model.model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(decoder.embed([3, 95, 3]), table[[3, 95, 3]])


def test_keys_and_values_are_written_in_place_and_nowhere_else(decoder: Decoder) -> None:
    cache = decoder.new_cache(16)
    decoder.forward(cache, decoder.embed(random_ids(5)))
    before = cache.buffer.copy()
    decoder.forward(cache, decoder.embed([7]))
    assert np.array_equal(cache.buffer[..., :5, :], before[..., :5, :])
    assert cache.buffer[..., 5, :].any()
    assert not cache.buffer[..., 6:, :].any()


def test_a_truncated_cache_continues_as_if_the_rest_had_never_been(decoder: Decoder) -> None:
    ids = random_ids(12)
    cache = decoder.new_cache(16)
    decoder.forward(cache, decoder.embed(ids[:8]))
    decoder.forward(cache, decoder.embed([1, 2, 3, 4, 5]))
    cache.truncate(8)
    logits = decoder.forward(cache, decoder.embed(ids[8:]), num_logits=4)
    assert np.array_equal(logits, onnx_logits(decoder, ids, [8, 4])[8:])
    with pytest.raises(InputError, match="cannot truncate to 13"):
        cache.truncate(13)


def test_logits_of_one_step_survive_the_next(decoder: Decoder) -> None:
    cache = decoder.new_cache(4)
    first = decoder.forward(cache, decoder.embed([1]))
    kept = first.copy()
    decoder.forward(cache, decoder.embed([2]))
    assert np.array_equal(first, kept)


def test_a_refused_call_leaves_the_cache_usable(model: PreTrainedModel, decoder: Decoder) -> None:
    ids = random_ids(8)
    cache = decoder.new_cache(8)
    decoder.forward(cache, decoder.embed(ids[:6]))
    with pytest.raises(InputError, match="6 \\+ 3 positions: the cache has room for 8"):
        decoder.forward(cache, decoder.embed([1, 2, 3]))
    with pytest.raises(InputError, match="3 logits of 2 positions"):
        decoder.forward(cache, decoder.embed([1, 2]), num_logits=3)
    with pytest.raises(InputError, match="expected \\(T, 64\\)"):
        decoder.forward(cache, np.zeros((2, 63), np.float32))
    logits = decoder.forward(cache, decoder.embed(ids[6:]), num_logits=2)
    assert relative_error(logits, torch_logits(model, ids)[6:]) < 1e-4


def test_ids_and_capacities_out_of_range_are_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match="the vocabulary has 96"):
        decoder.embed([5, 96])
    with pytest.raises(InputError, match="the model takes 1 to 128"):
        decoder.new_cache(129)


@pytest.mark.parametrize(("precision", "item_bytes"), [("int8", 1), ("int8_weight", 1), ("fp32", 4)])
def test_a_tied_embedding_is_on_disk_once(precision: Format, item_bytes: int, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        export(llama(vocab_size=4096, tie_word_embeddings=tied), tmp_path, precision)
        sizes[tied] = (tmp_path / "lm.data").stat().st_size
    table_bytes = 4096 * 64 * item_bytes
    assert table_bytes < sizes[True] < 2 * table_bytes
    assert 2 * table_bytes < sizes[False]


def test_products_kept_in_fp32_leave_no_error_when_all_are_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    names = product_names(read_architecture(model.config))
    assert names[:5] == (*(f"layers.0.{n}_proj" for n in ("qkv", "o", "gate_up", "down")), "layers.1.qkv_proj")
    ids = random_ids(40)
    wanted = torch_logits(model, ids)
    errors = [
        relative_error(onnx_logits(export(model, tmp_path, "int8", dict.fromkeys(kept, "fp32")), ids, [40]), wanted)
        for kept in ((), names[:-1], names)
    ]
    assert errors[0] > errors[1] > 1e-3 > 1e-4 > errors[2]
    with pytest.raises(InputError, match=r"no product 'layers\.9\.o_proj'"):
        export(model, tmp_path, "int8", {"layers.9.o_proj": "fp32"})


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_second_export_writes_the_same_bytes(precision: Format, model: PreTrainedModel, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        export(model, tmp_path, precision)
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"decoder.onnx", "embed.onnx", "lm.data"}


def test_an_unknown_family_is_an_error_that_lists_the_known_ones(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedError, match=r"model_type 'bloom' is not supported; known: 'llama', 'mistral'"):
        read_architecture(model.config.to_dict() | {"model_type": "bloom"})


def test_weights_that_do_not_fit_the_configuration_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    norm, extra = "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"
    for changed, message in (
        ({name: weights[name] for name in weights if name != norm}, f"{norm}' is missing"),
        (weights | {norm: np.ones(63, np.float32)}, "has shape \\(63,\\), the configuration says \\(64,\\)"),
        (weights | {extra: np.ones(16, np.float32)}, f"{extra}' is not part of the model"),
    ):
        with pytest.raises(InputError, match=message):
            export_decoder(model.config, changed, tmp_path, plan=Plan("fp32"))


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    block: DecoderBlock = export(model, tmp_path).block
    for changes in ({"layers": 3}, {"kv_heads": 4}, {"vocab_size": 97}, {"file": "embed.onnx"}, {"file": "lm.data"}):
        with pytest.raises(BundleError):
            Decoder(tmp_path, dataclasses.replace(block, **changes))


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}; set TINYALIGN_SHARED")
@pytest.mark.parametrize(("precision", "agreeing"), [("fp32", 40), ("int8", 40)])
def test_stories260k_tells_the_story_that_torch_tells(precision: Format, agreeing: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    ids = Tokenizer.from_file(str(STORIES / "tokenizer.json")).encode("Once upon a time").ids
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    told = greedy(export(model, tmp_path, precision), ids, 40)
    assert told[:agreeing] == wanted[:agreeing]
