"""A small image service on a gated pipeline, to take as a beginning for your own.

    python -m benchmarks.serve --port 8000
    curl -s localhost:8000/images -H 'content-type: application/json' -o image.png \
        -d '{"prompt": "a large red star in the centre on a plain white background", "seed": 1}'

One pipeline generates one image after the other; requests wait in a queue of limited length. What cannot be served is
refused with a reason: 422 for a request that is wrong, 400 for one that Python does not read (numbers of thousands of
digits, lists in lists without end), 413 for one of more than 64 kB and 408 for one that does not arrive, 503 when the
queue is full, 500 when generating failed, after which the next request is served as usual. A client that goes away
while it waits is not generated for, and a connection whose headers do not arrive is closed. Put it behind a proxy,
which limits connections.
"""

from __future__ import annotations

import asyncio
import copy
import io
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import click
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

import tgate_fx
from tgate_fx import demo
from tgate_fx.demo.compare import unknown_words

from .request_limits import BodyLimit, headers_within

SIZE = 64  # pixels per side: what was compiled for
_MOST_BYTES = 2**16  # of a request's body
MOST_SECONDS = 10.0  # until a request's headers are there, and then its body
_CLIENT_LEFT = 499  # the status that nginx made customary for it; nobody reads it


class ImageRequest(BaseModel):
    """What an image is asked for with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=400)]
    negative_prompt: Annotated[str, Field(max_length=400)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(ge=2, le=100)] = 25
    gate_step: Annotated[int, Field(ge=1, le=100)] = 10
    guidance_scale: Annotated[float, Field(gt=1.0, le=20.0, allow_inf_nan=False)] = 7.5

    @model_validator(mode="after")
    def _has_a_gated_step(self) -> ImageRequest:
        if self.gate_step >= self.steps:
            raise ValueError(f"gate_step {self.gate_step} of {self.steps} steps: expected less, for a step to be gated")
        return self


Generate = Callable[[ImageRequest], Image]


def generator(pipe: Any, **more: Any) -> Generate:
    """How a gated pipeline serves a request; it is called with ``more`` besides."""

    def generate(asked: ImageRequest) -> Image:
        result = pipe(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.steps,
            gate_step=asked.gate_step,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator().manual_seed(asked.seed),
            **more,
        )
        image: Image = result.images[0]
        return image

    return generate


class Queue:
    """Requests that take turns with the one pipeline, in the order in which they came.

    Attributes:
        counts: how many were accepted, finished, failed, left by their client, and refused since the queue was full.
    """

    def __init__(self, generate: Generate, length: int) -> None:
        self._generate = generate
        self._length = length
        self._inside = 0  # those that wait, and the one that is being served
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)
        self.counts: Counter[str] = Counter(accepted=0, finished=0, failed=0, left=0, refused=0)

    async def ask(self, asked: ImageRequest, request: Request) -> Image:
        """The image, once it is this request's turn.

        Raises:
            HTTPException: the queue is full, generating failed, or the client has left.
        """
        if self._inside > self._length:
            self.counts["refused"] += 1
            raise HTTPException(503, "Too many requests are waiting. Try again later.", {"Retry-After": "5"})
        self._inside += 1
        self.counts["accepted"] += 1
        answer, leaving = asyncio.ensure_future(self._served(asked)), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.counts["left"] += 1
                raise HTTPException(_CLIENT_LEFT)
        finally:  # also where the service itself is being stopped
            self._inside -= 1
            leaving.cancel()
            answer.cancel()
        error = answer.exception()
        if error is not None:
            self.counts["failed"] += 1
            raise HTTPException(500, f"Generating failed: {type(error).__name__}: {error}") from error
        self.counts["finished"] += 1
        return answer.result()

    async def _served(self, asked: ImageRequest) -> Image:
        async with self._turn:
            # What has begun in the thread is not interrupted; the next one then waits for it there.
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, asked)

    def close(self) -> None:
        """Let what has begun come to its end, and nothing more."""
        self._thread.shutdown(cancel_futures=True)


async def _left(request: Request) -> None:
    """Wait until the client of this request goes away; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def application(
    pipe: Any, generate: Generate, *, queue_length: int = 32, body_seconds: float = MOST_SECONDS
) -> FastAPI:
    """The service.

    Args:
        pipe: the pipeline; its tokenizer says which words it knows.
        generate: makes an image, in a thread of its own.
        queue_length: how many requests may wait.
        body_seconds: how long the body of a request may take to arrive.
    """
    queue = Queue(generate, queue_length)
    # A tokenizer keeps how it pads from call to call: that of the pipeline is for the thread that generates.
    tokenizer = copy.deepcopy(pipe.tokenizer)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="tgate_fx", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=_MOST_BYTES, seconds=body_seconds)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent, which need not be anything that JSON can hold: an infinity, half a character.
        reasons = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": [each.encode("ascii", "replace").decode() for each in reasons]}, 422)

    @app.post("/images", response_class=Response)
    async def images(asked: ImageRequest, request: Request) -> Response:
        _check(tokenizer, asked)
        image = await queue.ask(asked, request)
        png = io.BytesIO()
        image.save(png, "PNG")
        return Response(png.getvalue(), media_type="image/png")

    @app.get("/health")
    async def health() -> dict[str, int]:
        return dict(queue.counts)

    return app


def _check(tokenizer: Any, asked: ImageRequest) -> None:
    """Refuse what the pipeline was not trained on; most would rather have it refused than drawn wrongly."""
    for text in filter(None, (asked.prompt, asked.negative_prompt)):
        unknown = unknown_words(tokenizer, text)
        if unknown:
            raise HTTPException(422, f"Words that the embedded pipeline was not trained on: {', '.join(unknown)}.")
        tokens, most = len(tokenizer(text).input_ids), tokenizer.model_max_length
        if tokens > most:
            raise HTTPException(422, f"The text has {tokens} tokens: expected at most {most}, for more are not read.")


def ready(artifact: Path | None, *, compiled: bool = True) -> Any:
    """The embedded pipeline, gated, with all graphs that it will need; from an artifact, made if it is not there."""
    pipe: Any = demo.load()
    pipe.set_progress_bar_config(disable=True)
    if not compiled:
        return tgate_fx.gate(pipe)
    if artifact is None:
        tgate_fx.compile(pipe)
    else:
        if not artifact.exists():
            tgate_fx.save(tgate_fx.compile(pipe), artifact, height=SIZE, width=SIZE)
            tgate_fx.restore(pipe)
        tgate_fx.load(pipe, artifact)
    tgate_fx.warmup(pipe, height=SIZE, width=SIZE)
    return pipe


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Loaded; made by tgate_fx.save if it is not there yet. Without it, compiled anew.",
)
@click.option("--compile/--no-compile", "compiled", default=True)
def main(host: str, port: int, artifact: Path | None, compiled: bool) -> None:
    """Serve images of the embedded pipeline."""
    pipe = ready(artifact, compiled=compiled)
    uvicorn.run(application(pipe, generator(pipe)), host=host, port=port, http=headers_within(MOST_SECONDS))


if __name__ == "__main__":
    main()
