"""Pictures that are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign_edge.data import Row
from tinyalign_edge.train.encode import Encoded, encode_rows


class Eye:
    """Encodes each picture once for all checkpoints whose encoder, pooling and regions are the same."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Any, Any]] = {}

    def __call__(self, vision: Any, image: Any, model: Any, rows: Sequence[Row], **options: Any) -> Encoded:
        """As `encode_rows`."""
        if new := [row for row in rows if row.path not in self._seen]:
            made = encode_rows(vision, image, model, new, **options)
            self._seen.update((row.path, (made.pooled[i], made.regions[i])) for i, row in enumerate(new))
        pooled, regions = zip(*(self._seen[row.path] for row in rows), strict=True)
        return Encoded(np.stack(pooled), np.stack(regions))
