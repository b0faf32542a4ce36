"""Questions over HTTP: one model, many requests at a time.

pip install tinyalign-edge fastapi uvicorn python-multipart
BUNDLE=path/to/bundle uvicorn --app-dir examples service:app

curl -F picture=@photo.jpg -F question="What is in the picture?" localhost:8000/ask
curl -F picture=@photo.jpg -F text="my cat Tom" localhost:8000/remember
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

import tinyalign_edge as ta
from tinyalign_edge.image import MAX_FILE_BYTES

T = TypeVar("T")
Text = Annotated[str, Form(min_length=1)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the model as long as the service runs."""
    with ta.load(os.environ["BUNDLE"], memory_dir=os.environ.get("MEMORY_DIR")) as model:
        app.state.model = model
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(ta.InputError)
async def refuse(_: Request, error: ta.InputError) -> JSONResponse:
    """What the client sent is wrong: not a picture, an empty question, too much of something."""
    return JSONResponse({"error": str(error)}, status_code=422)


async def while_connected(request: Request, wanted: Awaitable[T]) -> T:
    """What is awaited, unless the client goes away meanwhile: then it is cancelled, and status 499 goes to the log."""
    task = asyncio.ensure_future(wanted)
    while not task.done():
        if await request.is_disconnected():
            task.cancel()
            raise HTTPException(499, "the client has gone away")
        await asyncio.wait({task}, timeout=0.1)
    return task.result()


@app.post("/ask")
async def ask(request: Request, picture: UploadFile, question: Text) -> dict[str, object]:
    """The whole answer, and what was remembered. A client that goes away ends it."""
    asked = request.app.state.model.aask(await picture.read(MAX_FILE_BYTES + 1), question, timeout_s=60)
    answer = await while_connected(request, asked)
    return {"answer": answer.text, "memories": [memory.text for memory in answer.memories]}


@app.post("/stream")
async def stream(request: Request, picture: UploadFile, question: Text) -> StreamingResponse:
    """The answer piece by piece; what was sent wrongly is told before the first. A client that goes away ends it."""
    image = await run_in_threadpool(request.app.state.model.encode, await picture.read(MAX_FILE_BYTES + 1))
    answer = request.app.state.model.astream(image, question, timeout_s=60)
    pieces = aiter(answer)
    first = await while_connected(request, anext(pieces, ""))

    async def all_pieces() -> AsyncIterator[str]:
        try:
            yield first
            async for piece in pieces:
                yield piece
        finally:
            answer.cancel()

    return StreamingResponse(all_pieces(), media_type="text/plain")


@app.post("/remember")
async def remember(request: Request, picture: UploadFile, text: Text) -> dict[str, int]:
    """Remember a text with a picture; it is on the disk when this answers."""
    entry = await run_in_threadpool(
        request.app.state.model.memory.add, await picture.read(MAX_FILE_BYTES + 1), text, source="http"
    )
    return {"id": entry.id}
