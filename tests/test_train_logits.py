"""What training computes on a language model is what that model computes: windows, caps and multipliers included."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tinyalign_edge.bench.models.tiny import FUSED, TRACED, build, random_ids  # noqa: E402
from tinyalign_edge.train.model import PADDING, SHARED, AlignModel  # noqa: E402
from tinyalign_edge.train.settings import ConnectorSettings, MemorySettings  # noqa: E402

SHOWN = 20  # tokens before the question, as the picture's would be
QUESTION = 28


@pytest.mark.parametrize("name", [*FUSED, *TRACED])
def test_each_question_is_read_as_the_language_model_reads_it_alone(name: str) -> None:
    language = build((FUSED | TRACED)[name])
    model = AlignModel(
        language, ConnectorSettings(1, 1, 8, 1, language.config.hidden_size), MemorySettings(kind="none")
    )
    ids = torch.tensor(random_ids(SHOWN + 2 * QUESTION))
    shown, first, second = ids[:SHOWN], ids[SHOWN : SHOWN + QUESTION], ids[SHOWN + QUESTION :]
    block = torch.tensor([[SHARED] * SHOWN + [1] * QUESTION + [2] * QUESTION + [PADDING]])
    after = list(range(SHOWN, SHOWN + QUESTION))
    positions = torch.tensor([[*range(SHOWN), *after, *after, 0]])
    with torch.inference_mode():
        embed = language.get_input_embeddings()
        packed = torch.cat([ids, ids[:1]])[None]
        logits = model.vocabulary_logits(model.hidden(embed(packed), positions, block)[block > SHARED])
        alone = [language(torch.cat([shown, part])[None]).logits[0, SHOWN:] for part in (first, second)]
    scale = torch.cat(alone).abs().max()
    assert (logits - torch.cat(alone)).abs().max() / scale < 1e-4
