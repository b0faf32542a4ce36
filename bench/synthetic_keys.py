"""Retrieval keys as those of real pictures are, in any number.

    python -m tinyalign_edge.bench.synthetic_keys BANK

fits three numbers to the keys of a real bank and writes them to `bench/results/key_spectrum.json`:

- `exponent`: the variance along the i-th principal axis falls as i to this power (least squares in logarithms, without
  the last tenth of the axes, where the pictures of one bank are too few);
- `group`: entries of one text, which lie around one centre;
- `within`: the share of the variance that is within a group, chosen so that the median similarity of an entry and its
  fourth neighbour is the real one.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyalign_edge.bench.record import RESULTS, record
from tinyalign_edge.config import read_json
from tinyalign_edge.memory import Bank

Float = npt.NDArray[np.float32]
NEIGHBOUR = 4
SAMPLE = 3000
NAME = "key_spectrum"


@dataclass(frozen=True)
class Spectrum:
    """What synthetic keys have in common with real ones."""

    exponent: float
    group: float
    within: float


def synthetic_keys(count: int, dim: int, spectrum: Spectrum, *, seed: int) -> Float:
    """`count` unit keys (E, dim), in no order."""
    rng = np.random.default_rng(seed)
    axes = np.arange(1, dim + 1, dtype=np.float32) ** (spectrum.exponent / 2)
    centres = rng.standard_normal((max(1, round(count / spectrum.group)), dim), np.float32)
    keys = rng.standard_normal((count, dim), np.float32)
    keys *= np.sqrt(spectrum.within)
    keys += np.sqrt(1 - spectrum.within) * centres[rng.integers(0, len(centres), count)]
    keys *= axes
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return keys


def stored_spectrum() -> Spectrum:
    """The committed fit."""
    fit = read_json(RESULTS / f"{NAME}.json")["fit"]
    return Spectrum(**fit)


def fit_spectrum(keys: Float, texts: int) -> Spectrum:
    """Fit to the keys (E, dim) of pictures with so many different texts."""
    centred = keys - keys.mean(axis=0)
    variance = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    leading = np.arange(len(variance) * 9 // 10)
    exponent = float(np.polyfit(np.log(leading + 1), np.log(variance[leading]), 1)[0])
    target, group = _neighbour_similarity(keys), len(keys) / texts
    low, high = 0.0, 1.0
    for _ in range(12):
        within = (low + high) / 2
        tried = synthetic_keys(len(keys), keys.shape[1], Spectrum(exponent, group, within), seed=0)
        low, high = (within, high) if _neighbour_similarity(tried) > target else (low, within)
    return Spectrum(round(exponent, 3), round(group, 1), round((low + high) / 2, 3))


def real_keys(bank: Bank) -> Float:
    """The keys (E, dim) of a bank, of length 1."""
    tables = bank._snapshot.tables
    keys = np.concatenate([table.keys * table.key_scales[:, None] for table in tables]).astype(np.float32)
    return np.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True), np.float32)


def _neighbour_similarity(keys: Float) -> float:
    scores = keys[:SAMPLE] @ keys.T
    return float(np.median(np.partition(scores, -1 - NEIGHBOUR, axis=1)[:, -1 - NEIGHBOUR]))  # the best is itself


def main() -> None:
    """Fit and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    bank = Bank(parser.parse_args().bank)
    keys, texts = real_keys(bank), {bank.entry(number).text for number in bank.ids}
    fit = fit_spectrum(keys, len(texts))
    result = {"entries": len(keys), "texts": len(texts), "key_dim": keys.shape[1], "fit": asdict(fit)}
    print(fit, record(NAME, "python -m tinyalign_edge.bench.synthetic_keys BANK", result))


if __name__ == "__main__":
    main()
