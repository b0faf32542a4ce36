"""The programs in `examples/`, run as a reader would, on the stored bundle."""

from __future__ import annotations

import asyncio
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyalign_edge as ta
from tests.conftest import ROOT, STORED_BUNDLE
from tinyalign_edge.bundle import MANIFEST, ImageConfig, PictureInTemplate, open_bundle
from tinyalign_edge.config import to_json, write_json
from tinyalign_edge.image import open_image, preprocess
from tinyalign_edge.prompt import Prompt, load_tokenizer
from tinyalign_edge.runtime.sessions import open_session

EXAMPLES = ROOT / "examples"
PICTURE = STORED_BUNDLE.parent / "picture.png"
EXPECTED = json.loads((STORED_BUNDLE.parent / "expected.json").read_text("utf-8"))
QUESTION, OTHER_QUESTION = EXPECTED["answers"]
CACHES = (("past_key_values.%d.key", "present.%d.key"), ("past_key_values.%d.value", "present.%d.value"))
IN_PARTS = "Look:{% for p in messages[0].content %} {{ '<image>' if p.type == 'image' else p.text }}{% endfor %} Say:"
WITHOUT_US = ("tinyalign_edge", "usearch", "jinja2", "typer", "rich")


def run(*command: object, stdin: str = "") -> str:
    """What a Python program prints."""
    done = subprocess.run([sys.executable, *map(str, command)], input=stdin, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def graphs(bundle: Path, layout: Path, picture: Path, question: str) -> subprocess.CompletedProcess[str]:
    """`examples/graphs.py` where nothing of this package can be imported."""
    code = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({WITHOUT_US!r}))\n"
        "sys.path.insert(0, 'examples')\nrunpy.run_path('examples/graphs.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, bundle, layout, picture, question]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def write_layout(bundle: Path, folder: Path) -> Path:
    """What `inspect --prompt` prints, as a file."""
    with ta.load(bundle, threads=1) as model:
        write_json(folder / "prompt.json", to_json(model.prompt.layout()))
    return folder / "prompt.json"


def test_the_app_answers_and_remembers(bundle: Path) -> None:
    lines = f"{QUESTION}\nremember a large red cat.\n{QUESTION}\n"
    first, second = run("examples/app.py", bundle, PICTURE, stdin=lines).splitlines()
    assert first == EXPECTED["answers"][QUESTION]
    with ta.load(bundle) as model:
        answer = model.ask(PICTURE, QUESTION)
        assert (answer.text, answer.memories[0].text) == (second, "a large red cat.")


def test_the_app_is_as_short_as_the_document_says() -> None:
    source = (EXAMPLES / "app.py").read_text("utf-8")
    assert len(source.splitlines()) <= 20
    assert source in (ROOT / "docs" / "embedding.md").read_text("utf-8")


def test_the_graphs_alone_give_the_runtimes_answers_and_memories(tmp_path: Path, bundle: Path) -> None:
    """Also of an entry that is in the journal."""
    layout = write_layout(bundle, tmp_path)
    with ta.load(bundle) as model:
        assert model.memory is not None
        model.memory.add(PICTURE, "a large red cat.")
        expected = [model.ask(PICTURE, question) for question in (QUESTION, OTHER_QUESTION)]
    for answer, question in zip(expected, (QUESTION, OTHER_QUESTION), strict=True):
        done = graphs(bundle, layout, PICTURE, question)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found == {"answer": answer.text, "memories": [memory.text for memory in answer.memories]}
    assert found["memories"][0] == "a large red cat."


@pytest.mark.parametrize("kind", ["none", "latents", "tokens"])
def test_the_graphs_alone_do_without_a_memory_with_latents_and_with_copying(
    tmp_path: Path, bundles: dict[str, Path], kind: str
) -> None:
    layout = write_layout(bundles[kind], tmp_path)
    with ta.load(bundles[kind]) as model:
        assert (model.manifest.memory.copy_file is not None) == (kind == "tokens")
        answer = model.ask(PICTURE, QUESTION)
    done = graphs(bundles[kind], layout, PICTURE, QUESTION)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"answer": answer.text, "memories": [entry.text for entry in answer.memories]}


def test_the_graphs_alone_refuse_what_they_do_not_know(bundle: Path, tmp_path: Path) -> None:
    layout = write_layout(bundle, tmp_path)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    unused = {**manifest["decoder"], "another": None}
    for changes, part in (
        ({"schema_version": 2}, "schema 2: this program reads up to 1"),
        ({"decoder": {**unused, "eyes": "two"}}, "decoder.eyes is 'two': a feature that this program does not know"),
        ({"decoder": unused}, ""),
    ):
        write_json(bundle / MANIFEST, {**manifest, **changes})
        done = graphs(bundle, layout, PICTURE, QUESTION)
        assert (part in done.stderr, done.returncode) == (True, int(bool(part)))


def test_the_graphs_example_preprocesses_as_the_runtime_does(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.syspath_prepend(str(EXAMPLES))
    pixel_values = runpy.run_path(str(EXAMPLES / "graphs.py"))["pixel_values"]
    for config in (
        ImageConfig(40, 24, "bicubic"),
        ImageConfig(32, 32, "bilinear", resize="shortest_edge", resize_to=37, center_crop=True),
        ImageConfig(32, 32, "lanczos", resize="longest_edge", resize_to=50, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)),
    ):
        expected = preprocess(open_image(PICTURE), config)
        assert (pixel_values(PICTURE, to_json(config)) == expected).all()


def test_the_service_answers_streams_remembers_and_refuses(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed; pip install fastapi httpx2 python-multipart")
    pytest.importorskip("httpx2", reason="httpx2 is not installed; pip install fastapi httpx2 python-multipart")
    pytest.importorskip("python_multipart", reason="python-multipart is not installed; pip install python-multipart")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("BUNDLE", str(bundle))
    app = runpy.run_path(str(EXAMPLES / "service.py"))["app"]
    picture = {"picture": PICTURE.read_bytes()}
    with TestClient(app) as client:
        asked = client.post("/ask", files=picture, data={"question": QUESTION})
        assert asked.json() == {"answer": EXPECTED["answers"][QUESTION], "memories": EXPECTED["memories"]}
        assert client.post("/stream", files=picture, data={"question": QUESTION}).text == EXPECTED["answers"][QUESTION]
        client.post("/remember", files=picture, data={"text": "a large red cat."})
        asked = client.post("/ask", files=picture, data={"question": QUESTION})
        assert asked.json()["memories"][0] == "a large red cat."
        refused = client.post("/ask", files={"picture": b"<svg/>"}, data={"question": QUESTION})
        assert (refused.status_code, refused.json()["error"][:5]) == (422, "image")
        assert client.post("/ask", files=picture, data={"question": ""}).status_code == 422
        too_long = client.post("/stream", files=picture, data={"question": "what " * 5000})
        assert (too_long.status_code, "context" in too_long.json()["error"]) == (422, True)
        for path in ("/ask", "/stream"):
            assert status_for_a_client_that_leaves(app, path, QUESTION) == 499


def status_for_a_client_that_leaves(app: Any, path: str, question: str) -> int:
    """What is answered to a request whose connection ends as soon as it was read."""
    border = b"border"
    fields = [(b'name="picture"; filename="a.png"', PICTURE.read_bytes()), (b'name="question"', question.encode())]
    body = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (border, *field) for field in fields)
    received = iter([{"type": "http.request", "body": body + b"--border--\r\n", "more_body": False}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(received, {"type": "http.disconnect"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=" + border)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def test_caches_that_are_handed_on_instead_of_shared_give_the_same_logits() -> None:
    """As in languages whose onnxruntime cannot bind an output to an input's memory."""
    with ta.load(STORED_BUNDLE, threads=1) as model:
        block, rows = model.decoder.block, model.decoder.embed(list(range(40)))
        shared = model.decoder.new_cache(64)
        session = open_session(STORED_BUNDLE / block.file, threads=1)
        names = [(past % i, present % i) for past, present in CACHES for i in range(block.layers)]
        shape, length = (1, block.kv_heads, 64, block.head_dim), 0
        cache = {past: np.zeros(shape, np.float32) for past, _ in names}
        for part in (rows[:30], rows[30:31], rows[31:]):
            length += len(part)
            inputs = {
                "inputs_embeds": part[None],
                "seqlens_k": np.array([length - 1], np.int32),
                "total_sequence_length": np.array(length, np.int32),
                "num_logits": np.array(1),
            }
            logits, *presents = session.run(["logits", *(present for _, present in names)], {**inputs, **cache})
            cache = {past: array for (past, _), array in zip(names, presents, strict=True)}
            np.testing.assert_array_equal(logits[0], model.decoder.forward(shared, part))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prepend_bos": False},
        {"chat_template": "{{ bos_token }}A chat. {{ messages[0]['content'] | trim }}\nSay:", "prepend_bos": False},
        {
            "chat_template": IN_PARTS,
            "picture": PictureInTemplate("<image>", "(", ")"),
        },
        {
            "chat_template": "{{ bos_token }}{{ messages[0].content }}:",
            "picture": PictureInTemplate("<image>", content="text"),
        },
    ],
)
def test_the_layout_gives_the_ids_that_the_template_gives(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    prompt_ids = runpy.run_path(str(EXAMPLES / "graphs.py"))["prompt_ids"]
    manifest = open_bundle(STORED_BUNDLE)
    tokenizer = load_tokenizer(STORED_BUNDLE / manifest.tokenizer_file)
    tokenizer.add_special_tokens(["<image>"])
    prompt = Prompt(replace(manifest.prompt, **changes), tokenizer)
    for question in ("Why?", " How many circles are there? "):
        found = prompt_ids(tokenizer, to_json(prompt.layout()), question)
        ids = prompt.question(question)
        assert tuple(map(tuple, found)) == (ids.before, ids.after)


@pytest.mark.parametrize("template", ["{{ messages[0].content | upper }}:", "{% if messages %}{% endif %}Say:"])
def test_a_template_that_changes_the_question_has_no_layout(template: str) -> None:
    manifest = open_bundle(STORED_BUNDLE)
    tokenizer = load_tokenizer(STORED_BUNDLE / manifest.tokenizer_file)
    with pytest.raises(ta.UnsupportedError, match="does not write the question once"):
        Prompt(replace(manifest.prompt, chat_template=template), tokenizer).layout()


def test_inspect_prints_the_layout() -> None:
    shown = run("-m", "tinyalign_edge", "inspect", STORED_BUNDLE, "--prompt")
    expected = {"start": "<s>", "before": "Question: ", "after": " Answer:", "picture_marker": None}
    assert json.loads(shown) == expected
