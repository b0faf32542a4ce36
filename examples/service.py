"""Questions over HTTP: one model, many requests at a time.

pip install tinyalign-edge fastapi uvicorn python-multipart
BUNDLE=path/to/bundle uvicorn --app-dir examples service:app

curl -F picture=@photo.jpg -F question="What is in the picture?" localhost:8000/ask
curl -F picture=@photo.jpg -F text="my cat Tom" localhost:8000/remember
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

import tinyalign_edge as ta
from tinyalign_edge.image import MAX_FILE_BYTES

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


@app.post("/ask")
async def ask(request: Request, picture: UploadFile, question: Text) -> dict[str, object]:
    """The whole answer, and what was remembered. A client that goes away ends it."""
    answer = await request.app.state.model.aask(await picture.read(MAX_FILE_BYTES + 1), question, timeout_s=60)
    return {"answer": answer.text, "memories": [memory.text for memory in answer.memories]}


@app.post("/stream")
async def stream(request: Request, picture: UploadFile, question: Text) -> StreamingResponse:
    """The answer piece by piece."""
    image = await run_in_threadpool(request.app.state.model.encode, await picture.read(MAX_FILE_BYTES + 1))
    return StreamingResponse(request.app.state.model.astream(image, question, timeout_s=60), media_type="text/plain")


@app.post("/remember")
async def remember(request: Request, picture: UploadFile, text: Text) -> dict[str, int]:
    """Remember a text with a picture; it is on the disk when this answers."""
    entry = await run_in_threadpool(
        request.app.state.model.memory.add, await picture.read(MAX_FILE_BYTES + 1), text, source="http"
    )
    return {"id": entry.id}
