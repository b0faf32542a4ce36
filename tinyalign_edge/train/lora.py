"""Low-rank adapters (Hu et al., 2021, arXiv 2106.09685) in a language model, by peft, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyalign_edge.errors import MissingExtraError

DROPOUT = 0.05


def add_adapters(language: Any, *, rank: int, alpha: int) -> Callable[[], None]:
    """Put trainable adapters beside all linear layers but the head, in place; the rest stays frozen.

    Returns:
        What merges them into the weights, in place, and removes them.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise MissingExtraError("--lora needs peft: pip install 'tinyalign-edge[lora]'") from None
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(language, settings)

    def merge() -> None:
        adapted.merge_and_unload()
        language.requires_grad_(False)

    return merge
