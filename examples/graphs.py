"""Answers from a bundle's files by onnxruntime and numpy alone, for ports to other languages.

Tokenizers reads the tokenizer file and Pillow the picture; nothing of tinyalign_edge is used. `docs/embedding.md`
describes each step.

    tinyalign-edge inspect BUNDLE --prompt > prompt.json      # once, where the app is built
    python examples/graphs.py BUNDLE prompt.json photo.jpg "What is in the picture?"
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from memory_bank import read_bank
from PIL import Image, ImageOps
from tokenizers import Tokenizer

SCHEMA_VERSION = 1
KNOWN = {  # what this program makes use of, or may leave aside
    "": "schema_version name image prompt generation vision decoder memory tokenizer_file probe_file target given_back "
    "gate licences tool_versions files",
    "image": "height width resample resize resize_to center_crop rescale mean std",
    "vision": "file precision visual_tokens key_dim inputs outputs feature_dim",
    "decoder": "file embed_file data_files precision layers width kv_heads head_dim vocab_size max_positions smoothed "
    "kv graph past_key past_value present_key present_value hidden",
    "memory": "kind k floor first metric key_dim key_dtype value_tokens latents latent_dim fingerprint file value_file "
    "copy_file copy_end copy_similarity",
    "prompt": "chat_template prepend_bos bos_token eos_token eos_token_ids max_context_tokens picture",
}


def open_bundle(folder: Path) -> dict:
    """The manifest, after every file that it names has been compared with its hash."""
    manifest = json.loads((folder / "bundle.json").read_bytes())
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise SystemExit(f"schema {manifest['schema_version']}: this program reads up to {SCHEMA_VERSION}")
    for block, known in KNOWN.items():
        for key, value in (manifest[block] if block else manifest).items():
            if key not in known.split() and value:  # null, false, 0 and empty mean that it is not used
                raise SystemExit(f"{block}.{key} is {value!r:.80}: a feature that this program does not know")
    for name, entry in manifest["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
            raise SystemExit(f"{name}: not the file that the manifest describes")
    return manifest


def open_graph(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads sleep between graphs, not spin
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # int8 convolution weights: unpacked at load
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pixel_values(path: Path, image: dict) -> np.ndarray:
    """A picture as the vision graph takes it, (1, 3, height, width) float32."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    filters = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box")}
    resample, (width, height), side = filters[image["resample"]], picture.size, image["resize_to"]
    if image["resize"] == "shortest_edge":
        longest = int(side * max(width, height) / min(width, height))
        picture = picture.resize((side, longest) if width <= height else (longest, side), resample)
    elif image["resize"] == "longest_edge":
        other = int(side / (width / height)) if width >= height else int(side * (width / height))
        other = max(other + other % 2, 1)
        picture = picture.resize((side, other) if width >= height else (other, side), resample)
    if image["resize"] in ("exact", "longest_edge"):
        picture = picture.resize((image["width"], image["height"]), resample)
    if image["center_crop"]:
        left, top = (picture.width - image["width"]) // 2, (picture.height - image["height"]) // 2
        picture = picture.crop((left, top, left + image["width"], top + image["height"]))
    pixels = (np.asarray(picture, np.float64) * image["rescale"]).astype(np.float32)  # (height, width, 3)
    pixels = (pixels - np.float32(image["mean"])) / np.float32(image["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


class LanguageModel:
    """Two graphs, and the keys and values of one sequence, which a call reads and extends in place."""

    def __init__(self, folder: Path, block: dict, capacity: int) -> None:
        self.embed_graph, self.graph = open_graph(folder / block["embed_file"]), open_graph(folder / block["file"])
        self.block, self.length = block, 0
        self.states = np.zeros((0, block["width"]), np.float32)  # of every position, where the graph gives them
        shape = (1, block["kv_heads"], capacity, block["head_dim"])
        dtype = {"fp32": np.float32, "int8": np.int8}[block.get("kv", "fp32")]
        self.binding = self.graph.io_binding()
        self.cache = []  # older onnxruntimes do not keep an array alive that they read and write
        for past, present in (("past_key", "present_key"), ("past_value", "present_value")):
            for layer in range(block["layers"]):
                self.cache.append(np.zeros(shape, dtype))
                buffer = ort.OrtValue.ortvalue_from_numpy(self.cache[-1])
                self.binding.bind_ortvalue_input(block[past] % layer, buffer)
                self.binding.bind_ortvalue_output(block[present] % layer, buffer)  # the same memory

    def embed(self, ids: list[int]) -> np.ndarray:
        """Rows (T, D) float32 of token ids."""
        return self.embed_graph.run(None, {"input_ids": np.array([ids], np.int64)})[0][0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Append rows (T, D); the logits (V,) float32 of what follows the last one."""
        self.length += len(rows)
        inputs = {
            "inputs_embeds": rows[None],
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
            "num_logits": np.array(1, np.int64),
        }
        logits = np.empty((1, 1, self.block["vocab_size"]), np.float32)
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        states = np.empty((1, *rows.shape), np.float32)
        if self.block.get("hidden"):
            self.binding.bind_ortvalue_output("hidden", ort.OrtValue.ortvalue_from_numpy(states))
        self.graph.run_with_iobinding(self.binding)
        self.states = np.concatenate([self.states, states[0]])
        return logits[0, 0]


def retrieve(folder: Path, block: dict, key: np.ndarray) -> list[tuple[float, np.ndarray, dict]]:
    """The entries most similar to a picture's key: similarity, value and record."""
    scored = [(float(k @ key), number, value, record) for number, (k, value, record) in read_bank(folder).items()]
    best = sorted(scored, key=lambda entry: (-entry[0], entry[1]))[: block["k"]]
    return [(score, value, record) for score, _, value, record in best if score >= block["floor"]]


def memory_tokens(folder: Path, block: dict, found: list, embed) -> np.ndarray:
    """What the language model reads of retrieved entries, (M, D) float32."""
    parts = [token_ids_and_latents(block, value) for _, value, _ in found]
    sizes = [len(ids) + len(latents) for ids, latents in parts]
    ids, latents = [token for ids, _ in parts for token in ids], np.concatenate([latents for _, latents in parts])
    inputs = {
        "values": latents if block["kind"] == "latents" else embed(ids),
        "rank": np.repeat(np.arange(len(found), dtype=np.int64), sizes),
        "similarity": np.repeat(np.array([score for score, _, _ in found], np.float32), sizes),
    }
    if block["kind"] == "hybrid":
        owners = [np.repeat(range(len(parts)), [len(part[i]) for part in parts]) for i in (1, 0)]
        inputs |= {"latents": latents, "order": np.argsort(np.concatenate(owners), kind="stable")}
    return open_graph(folder / block["file"]).run(["memory_tokens"], inputs)[0]


def token_ids_and_latents(block: dict, value: np.ndarray | tuple) -> tuple[list[int], np.ndarray]:
    """Both parts of an entry's value, one of them empty unless it is hybrid."""
    none = np.zeros((0, block["latent_dim"]), np.float32)
    ids, latents = {"tokens": (value, none), "latents": ([], value), "hybrid": value}[block["kind"]]
    return np.array(ids).tolist(), latents.astype(np.float32)


class Copying:
    """The graph by which the next token may be one of the memory's, whose first stands at the position `start`."""

    def __init__(self, folder: Path, block: dict, found: list, start: int) -> None:
        self.graph, end = open_graph(folder / block["copy_file"]), block.get("copy_end")
        self.ids, self.before, self.places = [], [], []  # before: in its entry; -1: nothing
        self.similarity = [] if block.get("copy_similarity") else None
        for score, value, _ in found:
            ids, latents = token_ids_and_latents(block, value)
            start += len(latents)  # they stand before the text and cannot be copied
            self.ids += ids
            self.before += [-1, *ids[:-1]]
            self.places += [(max(at - 1, 0), at) for at in range(start, start + len(ids))]
            start += len(ids)
            if end is not None and 0 < len(ids) < block["value_tokens"]:  # the answer may end where the entry does
                self.ids.append(end)
                self.before.append(ids[-1])
                self.places.append((start - 1, start - 1))
            if self.similarity is not None:
                self.similarity += [score] * (len(self.ids) - len(self.similarity))

    def mix(self, logits: np.ndarray, states: np.ndarray, token: int) -> np.ndarray:
        """Log probabilities (V,) of what follows `token`, the last one read."""
        inputs = {
            "logits": logits[None],
            "states": states[-1:],
            "texts": states[np.array(self.places)],
            "token_ids": np.array(self.ids, np.int64),
            "match": (np.array(self.before) == token).astype(np.float32)[None],
        }
        if self.similarity is not None:
            inputs["similarity"] = np.array([self.similarity], np.float32)
        return self.graph.run(["log_probabilities"], inputs)[0][0]


def prompt_ids(tokenizer: Tokenizer, layout: dict, question: str) -> tuple[list[int], list[int]]:
    """Token ids before and after the picture."""
    start, text = (
        tokenizer.encode(part, add_special_tokens=False).ids
        for part in (layout["start"], layout["before"] + question.strip() + layout["after"])
    )
    if layout["picture_marker"] is None:
        return start, text
    at = text.index(tokenizer.token_to_id(layout["picture_marker"]))
    return start + text[:at], text[at + 1 :]


def answer(folder: Path, layout: dict, picture: Path, question: str) -> dict:
    """The greedy answer, and the texts that were retrieved."""
    manifest = open_bundle(folder)
    tokenizer = Tokenizer.from_file(str(folder / manifest["tokenizer_file"]))
    before, after = prompt_ids(tokenizer, layout, question)
    vision, memory, prompt = manifest["vision"], manifest["memory"], manifest["prompt"]
    language = LanguageModel(folder, manifest["decoder"], prompt["max_context_tokens"])

    pixels = pixel_values(picture, manifest["image"])
    outputs = open_graph(folder / vision["file"]).run(vision["outputs"], {"pixel_values": pixels})
    seen = {name: output[0] for name, output in zip(vision["outputs"], outputs, strict=True)}
    found = [] if memory["kind"] == "none" else retrieve(folder / "memory", memory, seen["key"])
    rows, copying = [seen["visual_tokens"]], None
    if any(len(value) for _, value, _ in found):
        rows.insert(0 if memory.get("first") else 1, memory_tokens(folder, memory, found, language.embed))
        if memory.get("copy_file"):
            start = len(before) + (0 if memory.get("first") else len(seen["visual_tokens"]))
            copying = Copying(folder, memory, found, start)

    language.read(np.concatenate([language.embed(before), *rows]))  # up to the picture's end
    logits, last = language.read(language.embed(after)), after[-1]
    limit = min(manifest["generation"]["max_new_tokens"], prompt["max_context_tokens"] - language.length)
    ids: list[int] = []
    while len(ids) < limit:
        if copying:
            logits = copying.mix(logits, language.states, last)
        if (last := int(logits.argmax())) in prompt["eos_token_ids"]:
            break
        ids.append(last)
        logits = language.read(language.embed([last]))
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return {"answer": text, "memories": [record["text"] for _, _, record in found]}


if __name__ == "__main__":
    bundle, layout_file, photo, asked = sys.argv[1:]
    layout = json.loads(Path(layout_file).read_text("utf-8"))
    print(json.dumps(answer(Path(bundle), layout, Path(photo), asked), ensure_ascii=False))
