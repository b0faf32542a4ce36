"""Outlier channels of activations moved into the weights beside them, which leaves the function of a model as it is.

An int8 product quantises its input with one scale: a channel that is far the largest takes the range from all others.
Channel j is therefore divided by s_j where it is made, and column j of the matrix that reads it is multiplied by s_j,
with s_j = sqrt(max |x_j| / max |w_j|) up to a common factor: SmoothQuant (Xiao et al., 2022, arXiv 2211.10438) with a
strength of one half. A channel is made by a norm's weight and bias (the inputs of the products after the norms), or,
where the MLP is gated, by a row of its `up` matrix (the input of `down_proj`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tinyalign_edge.export.families import Architecture
from tinyalign_edge.export.matrices import Floats, find_matrices, matrix_rows
from tinyalign_edge.export.sensitivity import Feed, watch

Factors = Mapping[str, Floats]  # product name to s (K,)
Fold = Callable[[Floats], Floats]


def smoothing_factors(arch: Architecture, decoder: Path, feeds: Sequence[Feed]) -> dict[str, Floats]:
    """The factors of a written decoder.

    Args:
        arch: of the model.
        decoder: its float32 graph.
        feeds: inputs of the graph, one run each.

    Returns:
        product name to s (K,) float32, all above zero, of every product whose input can be smoothed; products that
        read the same norm have the same.
    """
    model = onnx.load(decoder, load_external_data=False)
    matrices = find_matrices(model)
    groups = [group for i in range(len(arch.layers)) for group in _groups(arch, i)]
    nodes = {node.name: node for node in model.graph.node}
    first = [nodes[group[0]] for group in groups]
    peaks = [np.zeros(matrices[group[0]].columns, np.float32) for group in groups]
    for values in watch(model, first, decoder.with_name("watched.onnx"), feeds):
        for peak, node in zip(peaks, first, strict=True):
            x = np.abs(values[node.input[0]])
            np.maximum(peak, x.reshape(-1, x.shape[-1]).max(axis=0), out=peak)
    factors: dict[str, Floats] = {}
    for group, peak in zip(groups, peaks, strict=True):
        columns = [np.abs(matrix_rows(model, matrices[name], decoder.parent)).max(axis=0) for name in group]
        factors |= dict.fromkeys(group, _factors(peak, np.max(columns, axis=0)))
    return factors


def _groups(arch: Architecture, i: int) -> Iterator[tuple[str, ...]]:
    """The products of layer `i` by the input that they read."""
    qkv, _, up, down = (f"layers.{i}.{name}" for name in arch.layer_products)
    yield from ((qkv,), (up,)) if arch.names.mlp_norm else ((qkv, up),)
    if arch.gated:
        yield (down,)


def _factors(activations: Floats, weights: Floats) -> Floats:
    """s (K,) from the largest magnitudes of each channel; 1 where a channel is always zero, or is not read."""
    alive = (activations > 0) & (weights > 0)
    logs = np.zeros_like(activations)
    np.log(activations / np.where(alive, weights, 1), out=logs, where=alive)
    logs = np.where(alive, logs / 2, 0)
    middle = logs[alive].mean() if alive.any() else 0.0
    return np.asarray(np.exp(np.where(alive, logs - middle, 0)), np.float32)


class SmoothedWeights(Mapping[str, NDArray[Any]]):
    """A state dict with factors folded in; each tensor is changed when it is read."""

    def __init__(self, arch: Architecture, weights: Mapping[str, NDArray[Any]], factors: Factors) -> None:
        self._weights = weights
        self._folds: dict[str, list[Fold]] = {}
        for i in range(len(arch.layers)):
            self._fold_layer(arch, i, factors)

    def __getitem__(self, name: str) -> NDArray[Any]:
        array = self._weights[name]
        for fold in self._folds.get(name, ()):
            array = fold(np.asarray(array, np.float32))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _fold_layer(self, arch: Architecture, i: int, factors: Factors) -> None:
        names, layer = arch.names, arch.names.layer % i
        qkv, _, up, down = (f"layers.{i}.{name}" for name in arch.layer_products)
        readers = {names.attention_norm: (qkv, names.qkv), names.mlp_norm: (up, names.up)}
        if not names.mlp_norm:  # the MLP reads what attention reads
            readers = {names.attention_norm: (qkv, names.qkv + names.up)}
        for norm, (product, parts) in readers.items():
            s = factors[product]
            self._add(f"{layer}.{norm}.weight", partial(_divide_norm, s, arch.norm_offset))
            self._add(f"{layer}.{norm}.bias", partial(_divide_norm, s, 0.0))
            for part in parts:
                self._add(f"{layer}.{part}.weight", partial(np.multiply, s))
        if arch.gated:
            s = factors[down]
            self._add(f"{layer}.{names.down}.weight", partial(np.multiply, s))
            for kind in ("weight", "bias"):
                self._add(f"{layer}.{names.up[-1]}.{kind}", partial(_divide_last, s))

    def _add(self, name: str, fold: Fold) -> None:
        if name in self._weights:
            self._folds.setdefault(name, []).append(fold)


def _divide_norm(s: Floats, offset: float, weight: Floats) -> Floats:
    return (weight + offset) / s - offset


def _divide_last(s: Floats, rows: Floats) -> Floats:
    """Divide as many of the last rows as there are factors: `up` stands after `gate` where both are one matrix."""
    divided = np.array(rows)
    divided[-len(s) :] = (divided[-len(s) :].T / s).T
    return divided
