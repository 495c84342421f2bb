"""The service of benchmarks/serve.py under the load test that goes with it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL.Image import Image

from benchmarks.load_test import BAD, a_request, load, serving
from benchmarks.serve import ImageRequest, generator, ready


@pytest.fixture(scope="module")
def pipe() -> object:
    return ready(None, compiled=False)


def test_nothing_is_lost_or_mixed_up_under_load_with_faults(pipe: object) -> None:
    measured = load(pipe, 24, 6, steps=3)
    assert set(measured["requests"]) == {"good", "bad", "leaving", "failing"}


def test_bad_requests_are_refused_with_a_reason(pipe: object) -> None:
    with serving(pipe, generator(pipe)) as address:
        for body in BAD:
            answer = httpx.post(f"{address}/images", json=body)
            assert answer.status_code == 422, body
            assert answer.json()["detail"]
        answer = httpx.post(f"{address}/images", content=b"{not json", headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert httpx.get(f"{address}/health").json()["accepted"] == 0


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
