"""The paper's key: picture and text, each weighted, summed by how alike the parts of the sequence are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tinyalign_edge.data import Row, Turn  # noqa: E402
from tinyalign_edge.train.keys import entry_text, fused_keys, query_text  # noqa: E402
from tinyalign_edge.train.options import TrainOptions  # noqa: E402
from tinyalign_edge.train.paper import FusedKey  # noqa: E402
from tinyalign_edge.train.start import start_align  # noqa: E402

Array = np.ndarray


def by_hand(picture: Array, text: Array) -> Array:
    """The key of one picture's N tokens (N, D), as the connector gives them, and one text's T embeddings (T, D).

    Each is brought to length 1, pictures are weighted 0.4, texts 0.6. Every part of the sequence is compared with every
    other one; softmax over a row of these, the mean over the rows, and the sequence is summed by it.
    """
    sequence = [0.4 * token / np.sqrt((token**2).sum()) for token in picture]
    sequence += [0.6 * token / np.sqrt((token**2).sum()) for token in text]
    weights = np.zeros(len(sequence))
    for one in sequence:
        alike = np.exp([float(one @ other) for other in sequence])
        weights += alike / alike.sum() / len(sequence)
    key: Array = np.zeros_like(sequence[0])
    for weight, token in zip(weights, sequence, strict=True):
        key += weight * token
    key /= np.sqrt((key**2).sum())
    return key


def test_a_fused_key_is_what_the_papers_formula_gives() -> None:
    torch.manual_seed(0)
    connector = torch.nn.Linear(3, 5)
    key = FusedKey(connector)
    features, text = 3 * torch.randn(2, 4, 3), torch.randn(2, 6, 5)
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    with torch.no_grad():
        found, visual = key(features, text, mask).numpy(), connector(features).numpy()
        connector.weight.zero_()  # keys stay, whatever training makes of the connector
        assert np.array_equal(key(features, text, mask).numpy(), found)
    for row, words in enumerate((6, 2)):  # padding is no part of the sequence
        np.testing.assert_allclose(found[row], by_hand(visual[row], text[row, :words].numpy()), atol=1e-6)
    alone = by_hand(visual[0], text[0, :2].numpy())
    assert np.abs(found[0] - alone).max() > 0.01  # the other words count, where they are


@pytest.mark.filterwarnings("ignore")
def test_an_entry_is_fused_with_its_caption_and_searched_for_by_a_question(towers: Path) -> None:
    options = TrainOptions(memory="paper", visual_tokens=4)
    begun = start_align(str(towers / "vit"), str(towers / "lm"), options)
    model, prompt, memory = begun.model, begun.prompt, begun.memory
    assert (memory.key, model.fused_key is not None) == ("fused", True)
    row = Row("a", (), (Turn("What colour?", "red"),), "a red circle", "a")
    texts = [entry_text(row, prompt, memory), query_text(row, prompt, memory)]
    assert [prompt.text(list(ids)) for ids in texts] == ["a red circle", "What colour?"]
    pooled = np.random.default_rng(0).normal(size=(2, 4, begun.connector.input_dim)).astype(np.float32)
    found = fused_keys(model, pooled, texts)
    table = model.language.get_input_embeddings().weight.detach().numpy()
    with torch.no_grad():
        visual = model.connector(torch.from_numpy(pooled)).numpy()
    for key, tokens, ids in zip(found, visual, texts, strict=True):
        np.testing.assert_allclose(key, by_hand(tokens, table[list(ids)]), atol=1e-5)
