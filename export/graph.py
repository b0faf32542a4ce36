"""A small ONNX graph builder, and the data file in which graphs keep their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
PAGE_BYTES = 4096  # tensors in a data file start on a page, so that they can be mapped; smaller ones stay in the graph


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in its data file, in bytes."""

    offset: int
    length: int


class DataFile:
    """Raw tensors one after another, each content once: graphs that add equal bytes share their place.

    An existing file at `path` is emptied.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans: dict[bytes, Span] = {}
        path.write_bytes(b"")

    def add(self, array: NDArray[Any]) -> Span:
        """Write `array` (C order) unless the same bytes are there already; returns where they are."""
        payload = np.ascontiguousarray(array)
        digest = hashlib.sha256(payload.data).digest()
        if digest not in self._spans:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % PAGE_BYTES))
                self._spans[digest] = Span(file.tell(), payload.nbytes)
                file.write(payload.data)
        return self._spans[digest]


class Graph:
    """Nodes, constants, inputs and outputs of one ONNX model, in the order in which they were added.

    Values are plain names. A shape may hold names for the dimensions that are free, such as `("B", "T", 576)`.
    Saving equal graphs gives equal bytes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, NDArray[Any]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare an input of the model; returns its name."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare that the value `name`, which some node makes, is an output of the model."""
        self._outputs.append(_value(name, dtype, shape))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer; returns its name. The array is read when the graph is saved, not before."""
        if name in self._constants:
            raise ValueError(f"graph {self._name}: constant {name!r} is there already")
        self._constants[name] = array
        return name

    def op(self, kind: str, *inputs: str, name: str = "", output: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name.

        An absent optional input is `""`. Without `name` the node is numbered; without `output` the value is
        called as the node is.
        """
        name = name or f"{kind}_{len(self._nodes)}"
        self.node(kind, inputs, [output or name], name=name, domain=domain, **attributes)
        return output or name

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Add a node whose outputs have the given names; `""` leaves an optional output out."""
        name = name or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))

    def save(self, path: Path, *, data: DataFile | None = None) -> None:
        """Write the model; with `data`, a file in the same folder, constants of a page or more go there."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            [tensor(name, array, data) for name, array in self._constants.items()],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tinyalign-edge")
        path.write_bytes(model.SerializeToString(deterministic=True))


def _value(name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def tensor(name: str, array: NDArray[Any], data: DataFile | None) -> onnx.TensorProto:
    """An initializer, its contents in `data` if there is such a file and they are a page or more."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    made = TensorProto(name=name, data_type=kind, dims=array.shape)
    if data is None or array.nbytes < PAGE_BYTES:
        made.raw_data = array.tobytes()
        return made
    span = data.add(array)
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data.path.name), ("offset", span.offset), ("length", span.length)):
        made.external_data.add(key=key, value=str(value))
    return made
