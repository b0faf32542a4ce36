"""Opening onnxruntime sessions and translating what onnxruntime raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from tinyalign_edge.errors import BundleError

LOG_ERRORS = 3
ort.disable_telemetry_events()  # what a device asks is nobody else's business


def open_session(path: Path, *, threads: int | None = None, spinning: bool = True) -> ort.InferenceSession:
    """Load an ONNX file for the CPU.

    Args:
        path: the model; its external data lie beside it.
        threads: of one operator; None leaves the number to onnxruntime (one a physical core).
        spinning: let idle threads wait busily for the next operator: faster, at the price of power.

    Raises:
        BundleError: onnxruntime does not take the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = LOG_ERRORS
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # unpack int8 convolution weights once, at load
    with onnxruntime_errors(path):
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_shapes(session: ort.InferenceSession, expected: Mapping[str, list[int]], path: Path) -> None:
    """Compare every input and output of a graph, and their fixed sizes but a batch of one, with what the manifest says.

    Raises:
        BundleError: a name is missing or too many, or a size differs.
    """
    values = (*session.get_inputs(), *session.get_outputs())
    shapes = {value.name: value.shape[1:] if value.shape[:1] == [1] else value.shape for value in values}
    found = {name: [size for size in shape if isinstance(size, int)] for name, shape in shapes.items()}
    if found != expected:
        name = min(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        raise BundleError(f"{path}: {name!r} has sizes {found.get(name)}, the manifest says {expected.get(name)}")


@contextmanager
def onnxruntime_errors(path: Path) -> Iterator[None]:
    """Turn whatever onnxruntime raises inside into a BundleError of one line that names `path`."""
    try:
        yield
    except Exception as error:  # its exceptions have no base class in common
        first = str(error).strip().partition("\n")[0]
        raise BundleError(f"{path}: onnxruntime refuses it ({first:.300})") from error
