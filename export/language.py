"""The graphs of a language model: fused where its family is known, traced where it is not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinyalign_edge.bundle import CachePrecision, DecoderBlock
from tinyalign_edge.errors import UnsupportedError
from tinyalign_edge.export.decoder import Floats, export_decoder
from tinyalign_edge.export.families import read_architecture
from tinyalign_edge.export.plan import Plan
from tinyalign_edge.export.smooth import Factors, SmoothedWeights
from tinyalign_edge.export.traced import probe, trace_decoder
from tinyalign_edge.export.weights import ParkedWeights, StateDict

logger = logging.getLogger(__name__)


def check_language(model: PreTrainedModel, *, kv: CachePrecision = "fp32") -> None:
    """Refuse before any long work what cannot be exported; warn of what will be traced, and why.

    Raises:
        UnsupportedError: neither way takes the model, or the way it takes has no cache of that precision.
    """
    try:
        read_architecture(model.config)
    except UnsupportedError as reason:
        if kv == "int8":
            raise UnsupportedError(
                f"{reason}; torch traces its graph, which has no int8 cache: use --kv fp32"
            ) from None
        probe(model)
        logger.warning("warning: %s; torch traces its graph instead, which is right but slower", reason)


def park(model: PreTrainedModel, path: Path) -> Mapping[str, Floats] | None:
    """Move the weights of a model whose graph is written from them into the file `path`: torch is done with it.

    Returns:
        its weights, read from the file one at a time; None for a model that is traced, which keeps them.
    """
    try:
        read_architecture(model.config)
    except UnsupportedError:
        return None
    return ParkedWeights(model, path)


def export_language(
    model: PreTrainedModel,
    folder: Path,
    *,
    plan: Plan,
    weights: Mapping[str, NDArray[Any]] | None = None,
    smoothing: Factors | None = None,
    scales: Floats | None = None,
    hidden: bool = False,
) -> DecoderBlock:
    """Write the decoder's and the embedding's graph into `folder`; `DecoderBlock.graph` says which way was taken.

    Args:
        weights: of the model, where they are not in it any more.
        smoothing: as `smoothing_factors` gives them, for a `plan` that is to be smooth.
        scales: as `cache_scales` gives them, for an int8 cache; a traced graph has none.
        hidden: the decoder's graph gives its last hidden states, too.

    Raises:
        UnsupportedError: neither way takes the model.
        InputError: weights that disagree with the configuration.
    """
    try:
        architecture = read_architecture(model.config)
    except UnsupportedError:
        return trace_decoder(model, folder, plan=plan, hidden=hidden)
    weights = StateDict(model) if weights is None else weights
    if plan.smooth and smoothing:
        weights = SmoothedWeights(architecture, weights, smoothing)
    return export_decoder(architecture, weights, folder, plan=plan, scales=scales, hidden=hidden)
