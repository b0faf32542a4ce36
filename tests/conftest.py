"""Fixtures: tiny real towers, a tiny data set, a tiny checkpoint and its bundles, each made once a session."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STORED_BUNDLE = Path(__file__).parent / "data" / "bundle-schema-1"


def pytest_report_header() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "usearch", "numpy")]
    return f"runtime: {', '.join(versions)}"


def shared(*parts: str) -> Path:
    """A path below the folder of pretrained weights and data; skips the test where it is absent."""
    folder = Path(os.environ.get("TINYALIGN_SHARED", ROOT.parent / "shared")).joinpath(*parts)
    if not folder.exists():
        pytest.skip(f"{folder} is absent; set TINYALIGN_SHARED to the folder of pretrained weights and data")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Banks opened by tests leave no record in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json, test.json and images of the demo's world."""
    pytest.importorskip("torch")
    from tinyalign_edge.demo.dataset import write_dataset
    from tinyalign_edge.demo.world import make_scenes

    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, make_scenes(80, seed=1), make_scenes(24, seed=2), seed=0)
    return folder


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random towers in Hugging Face format: vit/, cnn/, lm/."""
    pytest.importorskip("torch")
    from tests.towers import save_cnn, save_lm, save_vit

    folder = tmp_path_factory.mktemp("towers")
    save_vit(folder / "vit")
    save_cnn(folder / "cnn")
    save_lm(folder / "lm")
    return folder


@pytest.fixture(scope="session")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole vision-language model of each of `tests.vlms.KINDS`; do not change them, copy them."""
    pytest.importorskip("torch")
    from tests.vlms import KINDS, save_vlm

    folder = tmp_path_factory.mktemp("vlms")
    for kind in KINDS:
        save_vlm(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, world: Path, towers: Path) -> dict[str, Path]:
    """A few steps' training for each kind of memory, on the ViT-like tower."""
    from tests.towers import train_tiny

    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = ("none", "tokens", "latents")
    return {kind: train_tiny(world, towers, folder / kind, memory=kind) for kind in kinds}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, Path]:
    """The int8 bundle of each checkpoint; do not change them, copy them."""
    from tinyalign_edge.export.run import export

    folder = tmp_path_factory.mktemp("bundles")
    for kind, checkpoint in checkpoints.items():
        export(checkpoint, folder / kind)
    return {kind: folder / kind for kind in checkpoints}


@pytest.fixture(scope="session")
def fp32_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """The bundle with a memory of tokens, in float32, whose answers do not depend on how tokens come in passes."""
    from tinyalign_edge.export.run import ExportOptions, export

    folder = tmp_path_factory.mktemp("fp32") / "bundle"
    export(checkpoints["tokens"], folder, ExportOptions(precision="fp32"))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the stored bundle, free to be changed."""
    return Path(shutil.copytree(STORED_BUNDLE, tmp_path / "bundle"))
