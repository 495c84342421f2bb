"""Requests within limits: headers of time, bodies of size and time, before anything of a body is parsed."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol


def headers_within(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, which itself has no such limit, but closing connections whose headers take longer.

    The first request's headers are waited for from the connection on, those of later ones from their first byte on.
    """

    class HeadersInTime(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # a request has begun: its headers are there
                self._stop_waiting()
            elif self._late is None and before.response_complete:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._late = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return HeadersInTime


class BodyLimit:
    """An ASGI application around another one, which is given bodies whole and never more than this.

    Args:
        app: the other one.
        most: bytes of a body; more is refused with 413, at once where the request says its length.
        seconds: how long a body may take to arrive; later is refused with 408.
    """

    def __init__(self, app: Any, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self._most:
            await self._refuse(413, f"The body has {said.decode('ascii', 'replace')} bytes", scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except asyncio.TimeoutError:
            await self._refuse(408, f"The body took more than {self._seconds:g} seconds", scope, receive, send)
            return
        if body is None:  # the client has left
            return
        if len(body) > self._most:
            await self._refuse(413, f"The body has more than {self._most} bytes", scope, receive, send)
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return parts.pop() if parts else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Any) -> bytes | None:
        """Read the body, or a little more than what is allowed; None if the client leaves."""
        body = b""
        while len(body) <= self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return body

    async def _refuse(self, status: int, what: str, scope: Any, receive: Any, send: Any) -> None:
        detail = f"{what}: expected at most {self._most}, within {self._seconds:g} seconds."
        response = JSONResponse({"detail": detail}, status, {"connection": "close"})
        await response(scope, receive, send)
