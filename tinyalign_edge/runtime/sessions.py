"""Opening onnxruntime sessions and translating what onnxruntime raises."""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from tinyalign_edge.errors import BundleError, InputError

PROVIDERS = ["CPUExecutionProvider"]
LOG_ERRORS = 3
MAX_THREADS = 256
PROCESSORS = r"\d+([,-]\d+)*"  # of one thread
ort.disable_telemetry_events()  # what a device asks is nobody else's business


@dataclass(frozen=True)
class Threads:
    """How onnxruntime uses the processor.

    Attributes:
        count: threads of one operator; None: one a physical core.
        spinning: while a graph runs, idle threads wait busily for its next operator: faster, at the price of power
            and of other work. Between runs all sleep.
        affinity: processors of all threads but the caller's own, as onnxruntime writes them: numbers from 1, a
            semicolon between threads ("2;3;4"). Needs `count`, and names one thread fewer.
    """

    count: int | None = None
    spinning: bool = True
    affinity: str | None = None

    def __post_init__(self) -> None:
        if self.count is not None and not (isinstance(self.count, int) and 1 <= self.count <= MAX_THREADS):
            raise InputError(f"threads {self.count}: must be 1 to {MAX_THREADS}, a whole number")
        if self.affinity is None:
            return
        others = (self.count or 1) - 1
        if not others or not re.fullmatch(f"{PROCESSORS}(;{PROCESSORS}){{{others - 1}}}", self.affinity):
            raise InputError(f"affinity {self.affinity!r}: name the processors of {others} threads")


DEVICES = {  # a phone shares its fast cores and its battery with others; a board's are its own, but not its power
    "phone": Threads(2, spinning=False),
    "board": Threads(spinning=False),
    "server": Threads(),
}
ThreadsLike = int | str | Threads | None


def threads_of(given: ThreadsLike) -> Threads:
    """Settings from a number of threads, one of `DEVICES`, or None for the server's.

    Raises:
        InputError: another word, or a number out of bounds.
    """
    if isinstance(given, Threads):
        return given
    if isinstance(given, str):
        if given not in DEVICES:
            raise InputError(f"threads {given!r}: not one of {', '.join(DEVICES)}; or give a number")
        return DEVICES[given]
    return Threads(given)


def open_session(path: Path, *, threads: ThreadsLike = None, packed: Path | None = None) -> ort.InferenceSession:
    """Load an ONNX file for the CPU.

    Args:
        path: the model; its external data lie beside it.
        threads: see `threads_of`.
        packed: the same model as `packed_graphs` wrote it, which is loaded in its place.

    Raises:
        BundleError: onnxruntime does not take the file.
    """
    options = session_options(threads)
    if packed is not None:  # it is optimised already, and its weights fit the graph as it is
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with onnxruntime_errors(packed or path):
        session = ort.InferenceSession(packed or path, options, providers=PROVIDERS)
    _open_sessions.add(session)
    return session


_open_sessions: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """A forked process has none of the threads that the end of a session waits for: there, none ends."""
    for session in list(_open_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)


def session_options(threads: ThreadsLike) -> ort.SessionOptions:
    """How every session of this package runs; `threads` as for `threads_of`."""
    settings = threads_of(threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.count or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = LOG_ERRORS
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings.spinning)))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else they wait in the way of the next graph
    if settings.affinity:
        options.add_session_config_entry("session.intra_op_thread_affinities", settings.affinity)
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # unpack int8 convolution weights once, at load
    return options


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
