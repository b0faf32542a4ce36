"""Keys that are made of a picture and of a question."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

KNOWN = 0.5  # shorter than this, the part of a question says nothing

Float = npt.NDArray[np.float32]


def joined(pictures: Float, questions: Float, weight: float) -> Float:
    """Unit keys (E, P + Q) of unit keys of pictures (E, P) and of questions (E, Q).

    The cosine of two of them is the mean of the cosines of their parts, with `weight` for the questions'. A question's
    part of length 0, where nothing is asked or all ask the same, leaves the whole length to the picture.
    """
    known = np.linalg.norm(questions, axis=-1, keepdims=True) > KNOWN
    share = np.where(known, weight, 0.0)
    parts = [pictures * np.sqrt(1 - share), np.where(known, questions, 0) * np.sqrt(share)]
    return np.concatenate(parts, axis=-1).astype(np.float32)
