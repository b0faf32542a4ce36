"""A bundle is opened only when every byte is the manifest's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tinyalign_edge as ta
from tests.banks import reseal
from tests.conftest import STORED_BUNDLE
from tinyalign_edge.bundle import MANIFEST, SCHEMA_VERSION, open_bundle
from tinyalign_edge.config import read_json
from tinyalign_edge.data import Turn
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.files import file_sha256
from tinyalign_edge.runtime.verify import verify


def edit(bundle: Path, **changes: Any) -> None:
    """Change keys of the manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    (bundle / MANIFEST).write_text(json.dumps({**manifest, **changes}), "utf-8")


def test_one_changed_byte_in_any_file_is_refused_before_a_parser_sees_it(bundle: Path) -> None:
    for name in open_bundle(bundle).files:
        path = bundle / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match=f"{name}.*was changed"):
            ta.load(bundle)
        path.write_bytes(whole)
    assert ta.load(bundle)


def test_one_changed_byte_in_the_memory_is_refused(bundle: Path) -> None:
    for path in sorted((bundle / "memory").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:1] + bytes([whole[1] ^ 1]) + whole[2:])
        with pytest.raises((BundleError, InputError), match="memory"):
            ta.load(bundle)
        path.write_bytes(whole)
    assert ta.load(bundle)


def test_a_missing_or_truncated_file_is_named(bundle: Path) -> None:
    path = bundle / "lm.data"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"lm\.data: .* bytes, the manifest says"):
        ta.load(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=r"lm\.data: the manifest lists it but it is missing"):
        ta.load(bundle)


@pytest.mark.parametrize(
    ("tools", "remedy"),
    [
        ({"tinyalign-edge": "2.1.0"}, "upgrade tinyalign-edge to 2.1.0"),
        ({"tinyalign-edge": "2\n\x1b[31m"}, "upgrade tinyalign-edge"),
        ("none", "upgrade tinyalign-edge"),
    ],
)
def test_a_newer_schema_says_which_version_reads_it(bundle: Path, tools: object, remedy: str) -> None:
    edit(bundle, schema_version=99, tool_versions=tools)
    with pytest.raises(BundleError, match=rf"schema version 99 is newer.*; {remedy}$"):
        ta.load(bundle)


def test_a_stored_bundle_of_every_schema_opens_and_answers() -> None:
    """What a version has released, the later ones read: `tests/make_stored_bundle.py` makes the next one."""
    stored = {int(folder.name.rpartition("-")[2]): folder for folder in STORED_BUNDLE.parent.glob("bundle-schema-*")}
    assert set(stored) == set(range(1, SCHEMA_VERSION + 1))
    for version, folder in stored.items():
        assert open_bundle(folder).schema_version == version
        verify(folder)  # the probe holds what the graphs gave when it was made
        with ta.load(folder, threads=1) as model:
            answer = model.ask(STORED_BUNDLE.parent / "picture.png", "How many objects are there?")
            assert (bool(answer.text), len(answer.memories)) == (True, model.manifest.memory.k)


def test_an_unknown_or_mistyped_key_is_named(bundle: Path) -> None:
    edit(bundle, colour="blue")
    with pytest.raises(BundleError, match="unknown key 'colour'"):
        ta.load(bundle)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    del manifest["colour"]
    manifest["vision"]["visual_tokens"] = "many"
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=r"vision\.visual_tokens: expected int, found str"):
        ta.load(bundle)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", "a/../../outside.onnx", "a\\b", ""])
def test_a_path_that_leaves_the_folder_is_refused(bundle: Path, name: str) -> None:
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    edit(bundle, files={**files, name: files["encoder.onnx"]})
    with pytest.raises(BundleError, match="not a plain path inside the folder"):
        ta.load(bundle)


def test_a_link_in_the_bundle_is_refused_even_if_its_target_is_right(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.onnx"
    (bundle / "encoder.onnx").rename(moved)
    (bundle / "encoder.onnx").symlink_to(moved)
    with pytest.raises(BundleError, match="is a link"):
        ta.load(bundle)


def test_a_file_that_a_block_names_must_have_a_hash(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    del files["lm.data"]
    (bundle / "lm.data").unlink()
    edit(bundle, files=files)
    with pytest.raises(BundleError, match=r"names the file 'lm\.data' but gives no hash"):
        ta.load(bundle)


def test_the_manifest_itself_can_be_pinned(bundle: Path) -> None:
    digest = file_sha256(bundle / MANIFEST)
    assert ta.load(bundle, expect_sha256=digest.upper())
    with pytest.raises(BundleError, match="expected 0000"):
        ta.load(bundle, expect_sha256="0" * 64)


def test_malformed_json_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }', "utf-8")
    with pytest.raises(InputError, match=r"x\.json:2:7: not valid JSON"):
        read_json(path)


def test_a_bank_of_another_encoder_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / "memory" / "manifest.json").read_text("utf-8"))
    manifest["spec"]["fingerprint"] = "f" * 64
    reseal(bundle / "memory", manifest)
    with pytest.raises(BundleError, match="use the bank made with this bundle"):
        ta.load(bundle)


def test_a_memory_folder_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "memory").rename(tmp_path / "outside")
    (bundle / "memory").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="is a link"):
        ta.load(bundle)


def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    """A graph may name such a file as its external data, and it would be read without a hash."""
    (bundle / "more.data").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"more\.data: the manifest does not list it"):
        ta.load(bundle)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("prompt", "eos_token_ids", []),
        ("decoder", "past_key", "x"),
        ("decoder", "layers", 10**9),
        ("image", "std", []),
        ("image", "width", -3),
        ("image", "rescale", 1e300),
        ("memory", "k", 2 * 10**9),
        ("vision", "visual_tokens", 999),
        ("memory", "latent_dim", 5),
    ],
)
def test_a_manifest_with_impossible_numbers_is_refused(bundle: Path, part: str, key: str, value: Any) -> None:
    block = json.loads((bundle / MANIFEST).read_text("utf-8"))[part]
    edit(bundle, **{part: {**block, key: value}})
    with pytest.raises(BundleError):
        ta.load(bundle)


def test_a_bundle_without_a_memory_makes_of_a_text_its_token_ids(bundle: Path) -> None:
    """Whoever keeps a bank of his own wants them."""
    memory = json.loads((bundle / MANIFEST).read_text("utf-8"))["memory"]
    edit(bundle, memory={**memory, "kind": "none"})
    with ta.load(bundle) as model:
        value = model.values.make(None, [Turn("", "a red cat")])
        assert model.prompt.text(value.tolist()) == "a red cat"


@pytest.mark.parametrize("kind", ["latents", "hybrid"])
def test_a_memory_with_latents_says_how_many_and_of_what_size(bundle: Path, kind: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    vision = {**manifest["vision"], "feature_dim": 32, "outputs": ["visual_tokens", "key", "features"]}
    memory = {**manifest["memory"], "kind": kind, "value_file": manifest["memory"]["file"]}
    for sizes in ({"latents": 0, "latent_dim": 8}, {"latents": 2, "latent_dim": 0}):
        edit(bundle, vision=vision, memory={**memory, **sizes})
        with pytest.raises(BundleError, match=r"memory\.latents is out of bounds"):
            open_bundle(bundle)
    edit(bundle, vision=vision, memory={**memory, "latents": 2, "latent_dim": 8})
    assert open_bundle(bundle).memory.latents == 2


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        pytest.param("decoder", "kv_heads", 10**4000, id="a number too long to print"),
        ("decoder", "head_dim", -1),
        ("decoder", "kv", "int4"),
        ("vision", "feature_dim", -1),
        ("memory", "latent_dim", 10**9),
    ],
)
def test_impossible_sizes_are_refused_before_they_are_shown(bundle: Path, part: str, key: str, value: Any) -> None:
    block = json.loads((bundle / MANIFEST).read_text("utf-8"))[part]
    edit(bundle, **{part: {**block, key: value}})
    with pytest.raises(BundleError):
        open_bundle(bundle)
