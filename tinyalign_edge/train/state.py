"""The folder `state/` of a run that is not finished: its settings and keys, so that it can go on as it was begun."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tinyalign_edge.config import from_json, read_json, to_json, write_json
from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.train.checkpoint import is_checkpoint
from tinyalign_edge.train.model import AlignModel
from tinyalign_edge.train.picture_files import FOLDER
from tinyalign_edge.train.settings import CheckpointConfig

STATE = "state"
RUN = "run.json"
KEY = "key.safetensors"
FEATURES = "features"
FREE = ("training.micro_batch", "training.device")  # settings that may change when a run is resumed
ROUNDED = {"memory.floor": 1e-3}  # what another machine or thread count computes a little otherwise, and how much


class RunState:
    """The state of the run that writes its checkpoint to `out`.

    Raises:
        InputError: `out` holds something else, or an interrupted run that is not to be resumed, or cannot be read.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self.out, self.folder, self.resume = out, out / STATE, resume
        try:
            self._look()
        except OSError as error:
            raise _unusable(out, error) from None

    def _look(self) -> None:
        out, run = self.out, self.folder / RUN
        if is_checkpoint(out):
            raise InputError(f"{out}: holds a finished checkpoint; choose another --out")
        others = {path.name for path in out.iterdir()} - {STATE} if out.is_dir() else set()
        if out.exists() and (not out.is_dir() or (others and not run.is_file())):
            raise InputError(f"{out}: exists and is not an interrupted run; choose another --out")
        if run.is_file() and not self.resume:
            raise InputError(f"{out}: holds an interrupted run; continue it with --resume or choose another --out")

    def try_to_write(self) -> None:
        """Refuse a folder that cannot be made or written, before work is put into what is to go there; leaves nothing.

        Raises:
            InputError: it cannot.
        """
        missing = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        except OSError as error:
            raise _unusable(self.out, error) from None
        finally:
            for folder in missing:
                with suppress(OSError):  # not made
                    folder.rmdir()

    def fit_keys(self, model: AlignModel, fit: Callable[[], None]) -> None:
        """Fit what keys are made with, or take it from the interrupted run: another machine's or thread count's
        arithmetic differs in the last digits, and the keys must not."""
        kept = self.folder / KEY
        state = load_file(kept) if self.resume and kept.is_file() else {}
        if {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in model.key_state().items()}:
            model.load_own_state({**model.own_state(), **state})
        else:  # a new run, or one with other settings, which `begin` refuses
            fit()

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Remove the data sets' pictures and the features again where the block ends before `begin`, and folders that
        are empty then."""
        try:
            yield
        finally:
            made = [folder for folder in (self.pictures, self.features) if folder.is_dir()]
            if made and not (self.folder / RUN).is_file():
                for folder in made:
                    shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # not empty
                    self.folder.rmdir()
                    self.out.rmdir()

    @property
    def pictures(self) -> Path:
        """Where pictures that data sets hold are until the run is finished."""
        return self.folder / FOLDER

    @property
    def features(self) -> Path:
        """Where the features are in which several processes meet, until the run is finished."""
        return self.folder / FEATURES

    @property
    def resumed(self) -> bool:
        """Whether there is a run to go on with."""
        return self.resume and (self.folder / RUN).is_file()

    def check(self, config: CheckpointConfig, *, but: tuple[str, ...] = ()) -> None:
        """Compare the settings of a resumed run, but some that are not known yet, with the interrupted one's.

        A setting that those lack, of before there was one, has its default.

        Raises:
            BundleError: the interrupted run's are damaged.
            InputError: they differ; the message names those that do.
        """
        if not self.resumed:
            return
        before, now = to_json(self._interrupted()), to_json(config)
        changed = sorted(
            name
            for part in now
            for key in (now[part] if isinstance(now[part], dict) else {})
            if (name := f"{part}.{key}") not in (*FREE, *but) and not _same(name, before[part][key], now[part][key])
        )
        if changed:
            raise InputError(f"{self.out}: the interrupted run had other settings ({', '.join(changed)}); use the same")

    def begin(self, config: CheckpointConfig, model: AlignModel) -> CheckpointConfig:
        """Record the settings and keys of the run, or `check` them; the checkpoint keeps the interrupted one's."""
        self.check(config)
        if self.resumed:
            return replace(config, memory=replace(config.memory, floor=self._interrupted().memory.floor))
        run = self.folder / RUN
        run.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.key_state(), self.folder / KEY)
        write_json(run.with_suffix(".part"), config)
        run.with_suffix(".part").replace(run)
        return config

    def _interrupted(self) -> CheckpointConfig:
        run = self.folder / RUN
        try:
            return from_json(CheckpointConfig, read_json(run), str(run))
        except BundleError as error:
            raise BundleError(f"{error}; the interrupted run cannot go on: train anew with another --out") from None

    def clear(self) -> None:
        """Remove the state of a run that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _same(name: str, before: Any, now: Any) -> bool:
    return math.isclose(before, now, abs_tol=ROUNDED[name]) if name in ROUNDED else before == now


def _unusable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out}: cannot be written ({error.strerror}); choose another --out")
