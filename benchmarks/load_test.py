"""A load test of benchmarks/serve.py over loopback, with faults.

    python -m benchmarks.load_test

Some clients ask for images as they should and compare them with those that the pipeline makes alone; others leave
before their image is done, send what cannot be served, or ask for an image at which generating fails. In the end every
request must have had its own answer, and the service must still serve. Writes benchmarks/results/load_test.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import uvicorn
from PIL import Image

from tgate_fx.bench.machine import machine
from tgate_fx.demo.scenes import random_scene

from .request_limits import headers_within
from .serve import MOST_SECONDS, Generate, ImageRequest, application, generator, ready

RESULTS = Path(__file__).parent / "results" / "load_test.json"
BAD: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": ""},
    {"prompt": "a red cat on a hill"},
    {"prompt": 7},
    {"prompt": "a red star", "steps": 0},
    {"prompt": "a red star", "steps": "many"},
    {"prompt": "a red star", "guidance_scale": -1.0},
    {"prompt": "a red star", "gate_step": 0},
    {"prompt": "a red star", "steps": 8, "gate_step": 8},
    {"prompt": "a red star", "size": 9},
    {"prompt": "a red star", "guidance_scale": math.inf},
    {"prompt": "a red star", "guidance_scale": math.nan},
    {"prompt": "a red star \ud800"},
    {"prompt": "a red star", "\ud800": 1},
    {"prompt": "a red star " * 30},  # more tokens than the text encoder reads
    {"prompt": "a red star " * 100},
)
_PATIENCE = 60.0  # seconds until a request without an answer is an error
_FAILS = 2**62  # the seed at which generating fails
_ENDED = {"finished", "failed", "left"}


def load(pipe: Any, requests: int, clients: int, *, steps: int, seed: int = 0) -> dict[str, Any]:
    """Serve this pipeline to that many clients at once, until all requests are answered.

    Returns:
        How many requests of each kind there were, with the ``seconds`` of the good ones (median, 95th percentile,
        most), images ``a_second``, and what the service counted.

    Raises:
        AssertionError: a request had no answer, or not its own.
    """
    rng = random.Random(seed)
    plans = [_plan(rng, steps) for _ in range(requests)]
    generate = generator(pipe)
    expected = {_key(body): _pixels(generate(ImageRequest(**body))) for kind, body in plans if kind == "good"}
    with serving(pipe, _failing(pipe)) as address:
        started = time.perf_counter()
        answers = asyncio.run(_run(address, plans, clients))
        elapsed = time.perf_counter() - started
        after = httpx.post(f"{address}/images", json=a_request(steps), timeout=_PATIENCE)
        counts = _settled_counts(address)
    assert after.status_code == 200, "the service no longer serves"
    seconds = []
    for (kind, body), (status, content, took) in zip(plans, answers, strict=True):
        assert status == {"good": 200, "bad": 422, "failing": 500, "leaving": None}[kind], (kind, body, status, content)
        if kind == "good":
            seconds.append(took)
            assert np.array_equal(_decoded(content), expected[_key(body)]), f"not the image of {body}"
    kinds = Counter(kind for kind, _ in plans)
    assert counts["accepted"] == sum(counts[name] for name in _ENDED), counts
    assert counts["finished"] >= kinds["good"] + 1
    assert counts["failed"] == kinds["failing"]
    return {
        "requests": dict(kinds),
        "clients": clients,
        "steps": steps,
        "a_second": len(seconds) / elapsed,
        "seconds": {
            "median": statistics.median(seconds),
            "95th percentile": float(np.percentile(seconds, 95)),
            "most": max(seconds),
        },
        "counted_by_the_service": counts,
    }


def a_request(steps: int) -> dict[str, Any]:
    """A request as it should be."""
    return {"prompt": random_scene(random.Random(1)).caption(random.Random(1)), "steps": steps, "gate_step": 2}


def _plan(rng: random.Random, steps: int) -> tuple[str, dict[str, Any]]:
    """What one client does, and what it sends."""
    kind = rng.choices(["good", "leaving", "bad", "failing"], [6, 2, 2, 1])[0]
    if kind == "bad":
        return kind, rng.choice(BAD)
    body = {
        "prompt": random_scene(rng).caption(rng),
        "seed": _FAILS if kind == "failing" else rng.randrange(2**31),
        "steps": steps + rng.randrange(3),
        "gate_step": rng.randint(1, steps - 1),
        "guidance_scale": rng.uniform(1.5, 12.0),
    }
    return kind, body


def _failing(pipe: Any) -> Generate:
    """How the pipeline serves a request, but for one seed: there it raises in the middle of the generation."""

    def fail(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            raise RuntimeError("on purpose")
        return values

    generate, generate_and_fail = generator(pipe), generator(pipe, callback_on_step_end=fail)
    return lambda asked: (generate_and_fail if asked.seed == _FAILS else generate)(asked)


@contextlib.contextmanager
def serving(
    pipe: Any,
    generate: Generate,
    queue_length: int = 10_000,
    *,
    header_seconds: float = MOST_SECONDS,
    body_seconds: float = MOST_SECONDS,
) -> Iterator[str]:
    """The service on a free port of this machine, in a thread; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = application(pipe, generate, queue_length=queue_length, body_seconds=body_seconds)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", http=headers_within(header_seconds)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the service did not start")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def _run(address: str, plans: list[tuple[str, dict[str, Any]]], clients: int) -> list[Any]:
    turn = asyncio.Semaphore(clients)
    limits = httpx.Limits(max_connections=None)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=address, timeout=_PATIENCE, limits=limits, headers=headers) as client:

        async def ask(kind: str, body: dict[str, Any]) -> tuple[int | None, bytes, float]:
            async with turn:
                started = time.perf_counter()
                if kind == "leaving":
                    patience = random.Random(body["seed"]).uniform(0.02, 1.0)  # while it waits, or is served
                    with contextlib.suppress(httpx.TimeoutException):
                        await client.post("/images", json=body, timeout=patience)
                    return None, b"", 0.0
                answer = await client.post("/images", content=json.dumps(body))
                return answer.status_code, answer.content, time.perf_counter() - started

        return await asyncio.gather(*[ask(kind, body) for kind, body in plans])


def _settled_counts(address: str) -> dict[str, int]:
    """What the service counted, once it has nothing left to do."""
    counts: dict[str, int] = {}
    for _ in range(200):
        counts = httpx.get(f"{address}/health").json()
        if counts["accepted"] == sum(counts[name] for name in _ENDED):
            break
        time.sleep(0.05)
    return counts


def _key(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)


def _pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"))


def _decoded(png: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(png)) as image:
        return _pixels(image)


@click.command()
@click.option("--requests", default=200, show_default=True)
@click.option("--clients", default=8, show_default=True, help="Requests at once.")
@click.option("--steps", default=10, show_default=True, help="Of an image, and up to two more.")
@click.option("--artifact", type=click.Path(path_type=Path), help="Made by tgate_fx.save.")
@click.option("--compile/--no-compile", "compiled", default=True)
def main(requests: int, clients: int, steps: int, artifact: Path | None, compiled: bool) -> None:
    """Load-test the service."""
    measured = load(ready(artifact, compiled=compiled), requests, clients, steps=steps)
    RESULTS.write_text(json.dumps({**measured, "machine": machine()}, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
