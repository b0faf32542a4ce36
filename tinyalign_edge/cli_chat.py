"""`tinyalign-edge chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyalign_edge.cli_memory import MemoryDir
from tinyalign_edge.errors import InputError, TinyAlignError

if TYPE_CHECKING:
    from tinyalign_edge.runtime.memory import Memory
    from tinyalign_edge.runtime.model import Model
    from tinyalign_edge.runtime.sight import EncodedImage

HELP = """\
/image PATH      show a picture; it comes with the next question
/remember TEXT   teach the memory a text about the picture
/memories        what the memory holds of pictures like this one
/forget [ID]     forget the entry ID, or what was remembered last
/reset           begin anew, with the same picture
/exit            leave (or end of input)
An interrupt (Ctrl-C) ends an answer."""


def chat(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'export' wrote.")],
    image: Annotated[Path | None, typer.Argument(help="A picture to begin with.")] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Answer from the pictures alone.")] = False,
    memory_dir: MemoryDir = None,
) -> None:
    """Talk about pictures, in several turns."""
    from tinyalign_edge.runtime.model import load

    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    with load(bundle, memory=not no_memory, memory_dir=memory_dir) as model:
        talk = Talk(model)
        if image is not None:
            talk.show(str(image))
        if sys.stdin.isatty():
            print(HELP)
        talk.run()


class Talk:
    """The state of a conversation in the terminal."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._conversation = model.chat()
        self._image: EncodedImage | None = None  # that was shown last
        self._new = False  # no question came with it yet
        self._remembered: list[int] = []
        self._asked = ""  # last

    def run(self) -> None:
        """Answer line by line until the end of input or /exit."""
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
                if line == "/exit":
                    return
                if line:
                    self._do(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(interrupted; /exit leaves)")
            except TinyAlignError as error:
                print(f"error: {error}", file=sys.stderr)

    def show(self, path: str) -> None:
        """Look at a picture."""
        self._image, self._new = self._model.encode(path), True

    def _do(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {
            "/image": self.show,
            "/remember": self._remember,
            "/memories": self._memories,
            "/forget": self._forget,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }
        if name in commands:
            commands[name](rest.strip())
        elif name.startswith("/"):
            raise InputError(f"{name}: no such command; /help shows them")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        images = [self._image] if self._new and self._image is not None else []
        self._asked = question
        for piece in self._conversation.stream(question, images):
            print(piece, end="", flush=True)
        print()
        self._new = False

    def _remember(self, text: str) -> None:
        question = self._asked if self._memory.asks else ""
        entry = self._memory.add(self._shown, text, question=question, source="chat")
        self._remembered.append(entry.id)
        print(f"remembered as entry {entry.id}")

    def _memories(self, _: str) -> None:
        from tinyalign_edge.report import print_entries

        print_entries(self._memory.search(self._shown, question=self._asked))

    def _forget(self, given: str) -> None:
        if not given and not self._remembered:
            raise InputError("/forget: nothing was remembered in this conversation; name an ID that /memories shows")
        if given and not given.isdecimal():
            raise InputError(f"/forget {given}: not a number; /memories shows them")
        number = int(given) if given else self._remembered[-1]
        gone = self._memory.forget(id=number)
        self._remembered = [kept for kept in self._remembered if kept != number]
        if not gone:
            raise InputError(f"/forget {number}: there is no such entry; /memories shows them")
        print(f"forgotten: entry {number}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._new = self._image is not None

    @property
    def _memory(self) -> Memory:
        if self._model.memory is None:
            raise InputError("this bundle has no memory, or it was left closed (--no-memory)")
        return self._model.memory

    @property
    def _shown(self) -> EncodedImage:
        if self._image is None:
            raise InputError("no picture was shown yet; /image PATH shows one")
        return self._image
