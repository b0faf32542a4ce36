"""tinyalign-edge: small vision-language models with a compact memory, on CPU.

    import tinyalign_edge as ta

    model = ta.load("BUNDLE")
    image = model.encode("photo.jpg")
    print(model.ask(image, "What is in the picture?").text)

Names are imported when they are first used; importing the package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyalign_edge.bundle import open_bundle as open_bundle
    from tinyalign_edge.errors import (
        BundleError as BundleError,
    )
    from tinyalign_edge.errors import (
        DegradedWarning as DegradedWarning,
    )
    from tinyalign_edge.errors import (
        GateError as GateError,
    )
    from tinyalign_edge.errors import (
        InputError as InputError,
    )
    from tinyalign_edge.errors import (
        MissingExtraError as MissingExtraError,
    )
    from tinyalign_edge.errors import (
        TinyAlignError as TinyAlignError,
    )
    from tinyalign_edge.errors import (
        UnsupportedError as UnsupportedError,
    )
    from tinyalign_edge.memory import Bank as Bank
    from tinyalign_edge.memory import Entry as Entry
    from tinyalign_edge.runtime.answer import Answer as Answer
    from tinyalign_edge.runtime.answer import AnswerStream as AnswerStream
    from tinyalign_edge.runtime.answer import AsyncAnswerStream as AsyncAnswerStream
    from tinyalign_edge.runtime.conversation import Conversation as Conversation
    from tinyalign_edge.runtime.model import Model as Model
    from tinyalign_edge.runtime.model import load as load
    from tinyalign_edge.runtime.options import Generation as Generation
    from tinyalign_edge.runtime.sessions import Threads as Threads
    from tinyalign_edge.runtime.sight import EncodedImage as EncodedImage

__version__ = "0.1.0"

_HOMES = {
    "tinyalign_edge.bundle": ("open_bundle",),
    "tinyalign_edge.errors": (
        "BundleError",
        "DegradedWarning",
        "GateError",
        "InputError",
        "MissingExtraError",
        "TinyAlignError",
        "UnsupportedError",
    ),
    "tinyalign_edge.memory": ("Bank", "Entry"),
    "tinyalign_edge.runtime.answer": ("Answer", "AnswerStream", "AsyncAnswerStream"),
    "tinyalign_edge.runtime.conversation": ("Conversation",),
    "tinyalign_edge.runtime.model": ("Model", "load"),
    "tinyalign_edge.runtime.options": ("Generation",),
    "tinyalign_edge.runtime.sessions": ("Threads",),
    "tinyalign_edge.runtime.sight": ("EncodedImage",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
