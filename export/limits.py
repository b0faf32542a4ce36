"""How large a model may be."""

from __future__ import annotations

from torch import nn

from tinyalign_edge.errors import UnsupportedError

MAX_TRACED_BYTES = 2**31  # of one protobuf message


def refuse_large(model: nn.Module, what: str) -> None:
    """Refuse a model whose traced graph would not fit into one protobuf message.

    Raises:
        UnsupportedError: more than 2 GiB in float32.
    """
    size = sum(4 * weight.numel() for weight in model.parameters())
    if size > MAX_TRACED_BYTES:
        raise UnsupportedError(
            f"{what}: {size / 2**30:.1f} GiB of float32 weights, a traced graph holds {MAX_TRACED_BYTES >> 30} GiB; "
            "use a smaller one"
        )
