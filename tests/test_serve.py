"""The service of benchmarks/serve.py under the load test that goes with it."""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL.Image import Image

from benchmarks.load_test import BAD, a_request, load, serving
from benchmarks.serve import ImageRequest, generator, ready
from tests import tiny
from tgate_fx import demo

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def pipe() -> object:
    return ready(None, compiled=False)


@pytest.mark.slow
def test_nothing_is_lost_or_mixed_up_under_load_with_faults(pipe: object) -> None:
    measured = load(pipe, 24, 6, steps=3)
    assert set(measured["requests"]) == {"good", "bad", "leaving", "failing"}


def test_bad_requests_are_refused_with_a_reason(pipe: object) -> None:
    with serving(pipe, generator(pipe)) as address:
        for body in BAD:
            answer = httpx.post(f"{address}/images", content=json.dumps(body), headers=JSON)
            assert answer.status_code == 422, body
            assert answer.json()["detail"]
        answer = httpx.post(f"{address}/images", content=b"{not json", headers=JSON)
        assert answer.status_code == 422
        for content in (b'{"seed": ' + b"1" * 5000 + b"}", b"[" * 20000, b'{"prompt": "\xff"}'):
            answer = httpx.post(f"{address}/images", content=content, headers=JSON)
            assert answer.status_code == 400
            assert answer.json()["detail"]
        assert httpx.get(f"{address}/health").json()["accepted"] == 0


def test_bodies_without_an_end_are_refused(pipe: object) -> None:
    def forever(part: bytes, pause: float) -> Iterator[bytes]:
        while True:
            yield part
            time.sleep(pause)

    with serving(pipe, generator(pipe), body_seconds=0.5) as address:
        url = f"{address}/images"
        assert httpx.post(url, content=b" " * 2**20, headers=JSON).status_code == 413
        for part, pause, status in ((b" " * 2**12, 0.0, 413), (b" ", 0.1, 408)):
            try:
                answer = httpx.post(url, content=forever(part, pause), headers=JSON, timeout=10)
            except (httpx.WriteError, httpx.RemoteProtocolError):  # it answered and closed while this was still sending
                continue
            assert answer.status_code == status
            assert "expected at most 65536" in answer.json()["detail"]
        assert httpx.get(f"{address}/health").json()["accepted"] == 0
        assert httpx.post(url, json=a_request(3), timeout=60).status_code == 200


def test_connections_whose_headers_do_not_arrive_are_closed(pipe: object) -> None:
    with serving(pipe, generator(pipe), header_seconds=0.5) as address:
        place, request = httpx.URL(address), b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
        for whole in (b"", request):  # the first request's headers, and those of a later one
            with socket.create_connection((place.host, place.port or 0), timeout=10) as client:
                client.sendall(whole)
                if whole:
                    assert client.recv(4096).startswith(b"HTTP/1.1 200")
                client.sendall(request[:20])
                started, rest = time.monotonic(), b""
                while part := client.recv(4096):
                    rest += part
                assert 0.3 < time.monotonic() - started < 5
                assert rest.count(b"HTTP/1.1 ") <= 1  # nothing for what is not whole
        time.sleep(0.6)
        assert httpx.post(f"{address}/images", json=a_request(3), timeout=60).status_code == 200


def test_slow_generations_are_not_cut_off_by_the_limit_of_headers(pipe: object) -> None:
    generate = generator(pipe)

    def slowly(asked: ImageRequest) -> Image:
        time.sleep(0.5)
        return generate(asked)

    with serving(pipe, slowly, header_seconds=0.2) as address, httpx.Client(timeout=60) as client:
        for _ in range(2):
            assert client.post(f"{address}/images", json=a_request(3)).status_code == 200


def test_a_full_queue_is_said_so(pipe: object) -> None:
    """One request is being served, one waits, and the third is told to come again."""
    go_on = threading.Event()
    generate = generator(pipe)

    def slowly(asked: ImageRequest) -> Image:
        go_on.wait()
        return generate(asked)

    with serving(pipe, slowly, queue_length=1) as address, ThreadPoolExecutor(2) as clients:
        answers = []
        for accepted in (1, 2):
            answers.append(clients.submit(httpx.post, f"{address}/images", json=a_request(3), timeout=60))
            while httpx.get(f"{address}/health").json()["accepted"] < accepted:
                time.sleep(0.01)
            time.sleep(0.1)  # until the first one is taken out of the queue
        third = httpx.post(f"{address}/images", json=a_request(3))
        go_on.set()
        assert third.status_code == 503
        assert third.headers["Retry-After"]
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_clients_that_leave_take_no_place_in_the_queue(pipe: object) -> None:
    """Nor is an image made for them, unless it was begun."""
    go_on, made = threading.Event(), []
    generate = generator(pipe)

    def slowly(asked: ImageRequest) -> Image:
        go_on.wait()
        made.append(asked.seed)
        return generate(asked)

    def request(seed: int, patience: float) -> httpx.Response:
        return httpx.post(f"{address}/images", json={**a_request(3), "seed": seed}, timeout=patience)

    with serving(pipe, slowly, queue_length=2) as address, ThreadPoolExecutor(2) as clients:
        first = clients.submit(request, 0, 60)
        while httpx.get(f"{address}/health").json()["accepted"] < 1:
            time.sleep(0.01)
        for seed in range(1, 6):
            with pytest.raises(httpx.TimeoutException):
                request(seed, 0.1)
            while httpx.get(f"{address}/health").json()["left"] < seed:
                time.sleep(0.01)
        last = clients.submit(request, 6, 60)
        while httpx.get(f"{address}/health").json()["accepted"] < 7:
            time.sleep(0.01)
        go_on.set()
        assert (first.result().status_code, last.result().status_code) == (200, 200)
        assert made == [0, 6]


def with_a_small_unet(pipe: Any) -> Any:
    config = {name: pipe.unet.config[name] for name in ("sample_size", "cross_attention_dim")}
    torch.manual_seed(0)
    parts = {**pipe.components, "unet": tiny.unet(**config, **tiny.ONE_BLOCK)}
    return type(pipe)(**parts, requires_safety_checker=False)


@pytest.mark.slow
@pytest.mark.inductor
def test_it_serves_from_an_artifact_as_the_eager_pipeline_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load", functools.partial(with_a_small_unet, demo.load()))  # compiles fast
    pipe = ready(None, compiled=False)
    made = ready(tmp_path / "artifact")
    measured = load(made, 24, 6, steps=3)
    assert set(measured["requests"]) == {"good", "bad", "leaving", "failing"}
    again = ready(tmp_path / "artifact")
    asked = ImageRequest(**a_request(4))
    expected, *images = [np.asarray(generator(each)(asked), dtype=float) for each in (pipe, made, again)]
    assert np.array_equal(*images)
    assert np.abs(images[0] - expected).max() <= 1
