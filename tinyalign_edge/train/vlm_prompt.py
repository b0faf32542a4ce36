"""A whole model's own prompt: its chat template, and where that puts the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyalign_edge.bundle import PictureInTemplate, PromptConfig
from tinyalign_edge.config import read_json
from tinyalign_edge.errors import BundleError, InputError, UnsupportedError
from tinyalign_edge.prompt import Prompt, Said, chat_messages
from tinyalign_edge.train.pretrained import adds_bos

REMEDY = "write one that puts the picture's token into the user's message and give it with --chat-template FILE"
QUESTION = "What is in the picture?"


def find_chat_template(folder: Path, tokenizer: Any) -> str:
    """The text of the template: the processor's, else the tokenizer's.

    Raises:
        InputError: there is none, or a file cannot be read.
    """
    for name in ("chat_template.json", "processor_config.json"):  # transformers reads them in this order, too
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(stored, dict) and isinstance(stored.get("chat_template"), str):
            return str(stored["chat_template"])
        if name == "chat_template.json" and (folder / "chat_template.jinja").is_file():
            return read_template(folder / "chat_template.jinja")
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise InputError(f"{folder}: has no chat template; {REMEDY}")
    return str(template)


def fit_prompt(folder: Path, template: str, tokenizer: Any, model: Any, *, visual_tokens: int) -> PromptConfig:
    """The prompt that gives the token ids which the model's own processor gives.

    Raises:
        InputError: the template writes no picture.
        UnsupportedError: it gives other ids here than in transformers.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    config = PromptConfig(
        chat_template=template,
        prepend_bos=adds_bos(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        eos_token_ids=_eos_ids(folder, model, tokenizer),
        max_context_tokens=int(model.config.text_config.max_position_embeddings),
    )
    picture = _picture(folder, model, tokenizer)
    for content in ("parts", "text"):
        config = replace(config, picture=replace(picture, content=content))
        try:
            ids = Prompt(config, backend).question(QUESTION)
        except BundleError:
            continue
        own = processor_ids(config, tokenizer, QUESTION, visual_tokens)
        marker = backend.token_to_id(picture.marker)
        if [*ids.before, *[marker] * visual_tokens, *ids.after] != own:
            raise UnsupportedError(
                f"{folder}: its chat template gives other tokens here than in transformers; give one with "
                "--chat-template FILE that uses messages, add_generation_prompt, bos_token and eos_token only"
            )
        return config
    raise InputError(f"{folder}: its chat template does not write the token {picture.marker!r} once; {REMEDY}")


def processor_ids(config: PromptConfig, tokenizer: Any, question: str, visual_tokens: int) -> list[int]:
    """What the processors of transformers give for a question: the picture's token once for each visual token."""
    picture = config.picture
    if picture is None:
        raise InputError("the prompt of a whole model says where the picture stands")
    text = tokenizer.apply_chat_template(
        chat_messages([Said(question)], picture),
        chat_template=config.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    starts = bool(config.bos_token) and text.startswith(config.bos_token)
    text = text.replace(picture.marker, picture.before + picture.marker * visual_tokens + picture.after)
    ids: list[int] = tokenizer(text, add_special_tokens=not starts)["input_ids"]
    return ids


def _picture(folder: Path, model: Any, tokenizer: Any) -> PictureInTemplate:
    marker = str(tokenizer.convert_ids_to_tokens(model.config.image_token_id))
    if model.config.model_type == "llava":
        return PictureInTemplate(marker)
    around = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
    if around not in tokenizer.get_vocab():
        raise InputError(
            f"{folder}: its tokenizer has no token {around!r}; save it with the processor's save_pretrained"
        )
    tile = getattr(tokenizer, "global_image_token", "<global-img>")
    return PictureInTemplate(marker, before=around + tile, after=around)


def _eos_ids(folder: Path, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens at which transformers' `generate` ends an answer; the tokenizer's where none is declared."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [tokenizer.eos_token_id if declared is None else declared]
    if not ids or ids[0] is None:
        raise InputError(f"{folder}: declares no end-of-text token; set eos_token_id in generation_config.json")
    return tuple(ids)


def read_template(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
