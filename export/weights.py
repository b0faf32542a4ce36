"""The weights of a checkpoint, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinyalign_edge.errors import InputError, UnsupportedError
from tinyalign_edge.export.graph import DataFile

Floats = NDArray[np.float32]

IGNORED = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry


class LazyArrays(Mapping[str, Floats]):
    """Arrays by name, each made by `read` of what is held for it when it is asked for, and not kept."""

    def __init__(self, held: Mapping[str, Any], read: Callable[[Any], Floats]) -> None:
        self._held, self._read = held, read

    def __getitem__(self, name: str) -> Floats:
        return self._read(self._held[name])

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class StateDict(LazyArrays):
    """A model's state dict as float32 arrays; a tensor of another type is converted when it is read."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.state_dict(), lambda tensor: tensor.detach().float().numpy())


class ParkedWeights(LazyArrays):
    """A model's state dict as float32 arrays in a file; the model is empty afterwards.

    Args:
        model: its parameters and buffers are moved to torch's "meta" device.
        path: of the file, which must last as long as this.
    """

    def __init__(self, model: torch.nn.Module, path: Path) -> None:
        data = DataFile(path)
        places = {name: (data.add(array), array.shape) for name, array in StateDict(model).items()}
        model.to("meta")
        super().__init__(places, self._from_file)
        self._path = path

    def _from_file(self, place: Any) -> Floats:
        span, shape = place
        array: Floats = np.fromfile(self._path, np.float32, int(np.prod(shape)), offset=span.offset)
        return array.reshape(shape)


class Weights:
    """A state dict that checks shapes and remembers what has been read of it."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], *, unused: frozenset[str]) -> None:
        self._arrays = arrays
        self._read = set(unused)

    def take(self, name: str, *shape: int) -> Floats:
        """The tensor `name`, which must have `shape`, as float32."""
        if name not in self._arrays:
            raise InputError(f"weight {name!r} is missing")
        array = self._arrays[name]
        if array.shape != shape:
            raise InputError(f"weight {name!r} has shape {array.shape}, the configuration says {shape}")
        self._read.add(name)
        return np.asarray(array, np.float32)

    def bias(self, name: str, size: int) -> Floats:
        """The tensor `name` (size,) as float32; one that is not there reads as zeros."""
        return self.take(name, size) if name in self._arrays else np.zeros(size, np.float32)

    def linear(self, paths: tuple[str, ...], outputs: tuple[int, ...], inputs: int) -> tuple[Floats, Floats]:
        """Rows (sum of outputs, inputs) and bias (sum of outputs,) of one linear layer, or of several side by side.

        `paths` are as many as `outputs`, or one that holds all of them.
        """
        sizes = outputs if len(paths) == len(outputs) else (sum(outputs),)
        parts = list(zip(paths, sizes, strict=True))
        rows = [self.take(f"{path}.weight", size, inputs) for path, size in parts]
        biases = [self.bias(f"{path}.bias", size) for path, size in parts]
        return (rows[0], biases[0]) if len(parts) == 1 else (np.concatenate(rows), np.concatenate(biases))

    def refuse_unread(self) -> None:
        """A weight that no node uses means that the graph is not the model."""
        for name in self._arrays:
            if name not in self._read and not name.endswith(IGNORED):
                raise UnsupportedError(f"weight {name!r} is not part of the model that this exporter writes")
