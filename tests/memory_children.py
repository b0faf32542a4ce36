"""Processes that write to a bank and die, run out of disk or compete. For `test_memory_durability.py`.

python -m tests.memory_children crash|replace|full|read-only|add|copy|unreadable FOLDER ...
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tests.banks import contents, files, key_of, make_bank, named_files, teach
from tinyalign_edge.errors import TinyAlignError
from tinyalign_edge.memory import Bank, copy_bank, graph, journal, rebuild
from tinyalign_edge.memory import publish as publish_module
from tinyalign_edge.memory import write as write_module
from tinyalign_edge.memory.join import write_joined
from tinyalign_edge.memory.manifest import write_manifest
from tinyalign_edge.memory.search import quantize_keys
from tinyalign_edge.memory.segment import write_segment
from tinyalign_edge.memory.snapshot import open_snapshot

WRITERS = (write_module.append, write_module.extend, write_module.commit, write_module.remove, write_module.sweep)
WRITERS += (journal.append, write_manifest, write_segment, rebuild.install, graph.write_graph)
WRITERS += (publish_module._replace, write_joined)
CODE = {function.__code__ for function in WRITERS}  # where the folder changes: a process is killed at a line of it
OPERATIONS = 16
SECRET = "secret number"


def crash(folder: Path, points: str, seed: str) -> None:
    """Kill writers at random lines of the code that changes a bank, and look at what they leave, `points` times."""
    write_module.JOURNAL_ENTRIES, rebuild.SWITCH_OVER = 4, 20
    states = [contents(Bank(folder))]
    rehearsal = Path(shutil.copytree(folder, folder.with_name("rehearsal")))
    names, steps = _operations(random.Random(seed), Bank(rehearsal))
    for step in steps:
        step(Bank(rehearsal))
        states.append(contents(Bank(rehearsal)))
    lines = _lines_until_the_end(Path(shutil.copytree(folder, folder.with_name("counted"))), steps)
    rng = random.Random(seed)
    acknowledged = set()
    for point in range(int(points)):
        copy = Path(shutil.copytree(folder, folder.with_name(f"killed-{point}")))
        done = _run_and_kill(copy, steps, at_line=rng.randrange(1, lines))
        _check(copy, states[done : done + 2], names)
        acknowledged.add(done)
    print(json.dumps({"points": int(points), "lines": lines, "different_ends": len(acknowledged)}))


def replace(folder: Path, points: str, seed: str) -> None:
    """Kill writers that put another bank in the place of this one, and look at what they leave."""
    new = open_snapshot(make_bank(folder.with_name("new"), 30))
    parts = [(table, np.ones(len(table), np.bool_)) for table in new.segments]
    steps = [lambda bank: publish_module.publish(bank.folder, new.manifest.spec, parts)]
    finished = Path(shutil.copytree(folder, folder.with_name("finished")))
    lines = _lines_until_the_end(finished, steps)
    states = [contents(Bank(folder)), contents(Bank(finished))]
    rng, found = random.Random(seed), set[int]()
    for point in range(int(points)):
        copy = Path(shutil.copytree(folder, folder.with_name(f"killed-{point}")))
        assert _run_and_kill(copy, steps, at_line=rng.randrange(1, lines)) == 0
        found.add(states.index(contents(Bank(copy))))
        _check(copy, states, [])
    print(json.dumps({"lines": lines, "found": sorted(found)}))


def _operations(rng: random.Random, bank: Bank) -> tuple[list[str], list[Callable[[Bank], Any]]]:
    """The names of all additions; additions, merges, removals and new graphs, the same for every process."""
    ids, next_id = list(bank.ids), max(bank.ids) + 1
    names, steps = list[str](), list[Callable[[Bank], Any]]()
    for _ in range(OPERATIONS):
        kind = rng.random()
        if kind < 0.2:
            steps.append(lambda bank: bank.rebuild())
        elif kind < 0.35:
            other = Bank(make_bank(bank.folder.with_name(f"other-{next_id}"), 0))
            new = range(next_id, next_id + 3)
            for number in new:
                names.append(f"{SECRET} {number}")
                teach(other, names[-1])
            steps.append(lambda bank, other=other.folder: bank.merge(Bank(other)))  # type: ignore[misc]
            ids, next_id = [*ids, *new], new.stop
        elif kind < 0.7:
            names.append(f"{SECRET} {next_id}")
            steps.append(lambda bank, name=names[-1]: teach(bank, name))  # type: ignore[misc]
            ids, next_id = [*ids, next_id], next_id + 1
        else:
            gone = ids.pop(rng.choice([rng.randrange(len(ids)), -1]))
            steps.append(lambda bank, gone=gone: bank.forget(id=gone))  # type: ignore[misc]
    return names, steps


def _lines_until_the_end(folder: Path, steps: list[Callable[[Bank], Any]]) -> int:
    """How many lines of that code all steps run through."""
    count = 0

    def tracer(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return tracer if frame.f_code in CODE else None

    bank = Bank(folder)
    sys.settrace(tracer)
    for step in steps:
        step(bank)
    sys.settrace(None)
    return count


def _run_and_kill(folder: Path, steps: list[Callable[[Bank], Any]], *, at_line: int) -> int:
    """Run the steps in a process that is killed before a line; returns how many it acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        left = at_line

        def tracer(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            left -= event == "line"
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return tracer if frame.f_code in CODE else None

        bank = Bank(folder)
        sys.settrace(tracer)
        for step in steps:
            step(bank)
            os.write(writing, b".")
        os._exit(1)  # it should have been killed
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        done = len(pipe.read())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return done


def _check(folder: Path, allowed: list[dict[int, Any]], names: list[str]) -> None:
    """The bank is as after the last acknowledged step or the one under way, and the next writer clears up."""
    bank = Bank(folder)
    found = contents(bank)
    assert found in allowed, (sorted(found), [sorted(state) for state in allowed])
    bank.forget(text="there is none of this")
    assert files(folder) == named_files(bank)
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    kept = [entry[0] for entry in found.values()]
    assert stored.count(SECRET.encode()) == 2 * sum(SECRET in text for text in kept)  # in its text and its source
    for name in names:
        assert (quantize_keys(key_of(name)[None])[0].tobytes() in stored) == (name in kept)
    number = teach(bank, "afterwards")
    assert contents(Bank(folder)) == {**found, number: contents(bank)[number]}
    shutil.rmtree(folder)


def full(folder: Path, limit_bytes: str) -> None:
    """Change a bank in every way where no file may grow beyond a limit; prints the errors."""
    rebuild.SWITCH_OVER = 20
    bank, changes = _changes(folder)
    before = contents(bank)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), limits[1]))
    errors = [_error_of(change) for change in changes]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(bank) == contents(Bank(folder)) == before
    assert files(folder) == named_files(bank)
    print(json.dumps(errors))


def read_only(folder: Path) -> None:
    """Change a bank in every way in a folder without the right to write; prints the errors."""
    rebuild.SWITCH_OVER = 20
    _, changes = _changes(folder)
    folder.chmod(0o555)
    _give_up_rights()
    print(json.dumps([_error_of(change) for change in changes]))


def _changes(folder: Path) -> tuple[Bank, list[Callable[[], Any]]]:
    """A bank and what may be done to it."""
    bank, other = Bank(folder), Bank(make_bank(folder.with_name("other"), 3))
    teach(other, "another")
    add, forget = lambda: teach(bank, "one more"), lambda: bank.forget(id=5)
    return bank, [add, forget, lambda: bank.merge(other), bank.rebuild]


def copy(folder: Path, target: str) -> None:
    """Copy the bank into a folder whose parent, and then also itself, cannot be written; prints the errors."""
    Path(target).parent.chmod(0o555)
    _give_up_rights()
    errors = [_error_of(lambda: copy_bank(folder, Path(target)))]
    assert contents(Bank(Path(target))) == contents(Bank(folder))
    print(json.dumps([*errors, _error_of(lambda: copy_bank(folder, Path(target).with_name("another")))]))


def unreadable(folder: Path) -> None:
    """Open the bank without the right to read one of its files; prints the errors."""
    _give_up_rights()
    errors = list[str | None]()
    for path in (*sorted(folder.glob("*.bin")), folder / "manifest.json"):
        mode = path.stat().st_mode
        path.chmod(0)
        errors.append(_error_of(lambda: Bank(folder)))
        path.chmod(mode)
    print(json.dumps(errors))


def _give_up_rights() -> None:
    """Root reads and writes everywhere, until it gives up its capabilities."""
    if os.geteuid() == 0:
        import ctypes

        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


def add(folder: Path, name: str, count: str) -> None:
    """Add entries, and forget every fifth again."""
    write_module.JOURNAL_ENTRIES = 7
    bank = Bank(folder)
    for i in range(int(count)):
        number = teach(bank, f"{name} {i}")
        if i % 5 == 0:
            assert bank.forget(id=number) == (number,)


def _error_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except TinyAlignError as error:
        return str(error)
    return None


if __name__ == "__main__":
    commands = {"crash": crash, "replace": replace, "full": full, "read-only": read_only, "add": add}
    commands |= {"copy": copy, "unreadable": unreadable}
    commands[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
