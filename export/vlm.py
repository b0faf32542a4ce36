"""A whole vision-language model in Hugging Face format as a `Source`."""

from __future__ import annotations

from pathlib import Path

from tinyalign_edge.data import Row
from tinyalign_edge.export.source import Source
from tinyalign_edge.export.vlm_graph import whole_graph
from tinyalign_edge.export.vlm_reference import VlmReference
from tinyalign_edge.export.vlm_samples import drawn_questions
from tinyalign_edge.prompt import Prompt
from tinyalign_edge.train.vlm import load_vlm


def vlm_source(folder: Path, *, rows: list[Row] | None, template: str | None) -> Source:
    """The model, without a memory.

    Args:
        rows: samples for the gate; None for drawn pictures with the model's own answers.
        template: a Jinja chat template to use in place of the folder's.

    Raises:
        InputError, UnsupportedError: as `load_vlm`.
    """
    whole = load_vlm(folder, template=template)
    vision, language, tokens = whole.vision, whole.language, whole.connector.visual_tokens
    prompt = Prompt(language.prompt, whole.tokenizer.backend_tokenizer)
    reference = VlmReference(whole.model, whole.tokenizer, prompt, vision.image, visual_tokens=tokens)
    return Source(
        image=vision.image,
        prompt=language.prompt,
        language=language.model,
        tokenizer_json=language.tokenizer_json,
        visual_tokens=tokens,
        key_dim=0,
        towers={"model": vision.ref},
        reference=reference,
        rows=lambda scratch: drawn_questions(scratch, reference) if rows is None else rows,
        encoder=lambda: whole_graph(whole),
    )
