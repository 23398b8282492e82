"""Serves the chat page: on this machine only, or to visitors who have a token; and without any other request.

The page's policy (Content-Security-Policy) lets a browser ask only this server, whatever a model writes into an answer.
"""

from __future__ import annotations

import secrets
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kto_jax.config import ConfigError
from kto_jax.thumbs.page import CSS

LOCAL = ("127.0.0.1", "localhost", "::1")
COOKIE = "kto_jax_chat"
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src "
    "'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'self'"
)
_GRACE_SECONDS = 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
      ConfigError: the address or the port cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port} cannot be listened on: {error}. Allowed: an address of this machine, and a "
            "port that no other program has, or 0 for any. Set --port."
        ) from error
    return listening


def serve(page: gr.Blocks, listening: socket.socket, host: str, token: str) -> None:
    """Serves the page until the process is told to end.

    Args:
      page: from `ChatPage.build`.
      listening: from `listen`.
      host: the address that it listens on.
      token: what visitors must have; "" for none, which only this machine may be served with.
    """
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/{f'?token={token}' if token else ''}", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        make_app(page, host, token), log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listening])


def make_app(page: gr.Blocks, host: str, token: str) -> FastAPI:
    """The page behind its checks: the token, the host, and where a request comes from."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, is_local=host in LOCAL)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options: dict[str, Any] = {"footer_links": [], "run_history": False, "ssr_mode": False, "enable_monitoring": False}
    return gr.mount_gradio_app(
        app, page, "/", server_name=host, theme=theme, css=CSS, show_error=True, pwa=False, mcp_server=False, **options
    )


class Guard:
    """Refuses requests, and adds headers to answers, without holding back what is streamed.

    Args:
      app: what is guarded.
      token: what visitors must have; "" for none.
      is_local: whether only this machine may ask.
    """

    def __init__(self, app: ASGIApp, token: str, is_local: bool) -> None:
        self._app, self._token, self._is_local = app, token, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 (it is ASGI's)
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refused = _refusal(HTTPConnection(scope), self._token, self._is_local)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await (refused or self._app)(scope, receive, send_with_headers)


def _refusal(request: HTTPConnection, token: str, is_local: bool) -> Response | None:
    """The answer to a request that is refused or sent on; None lets it through."""
    host = request.headers.get("host", "")
    if is_local and urlsplit(f"//{host}").hostname not in LOCAL:
        # Another site whose name was made to lead here.
        return PlainTextResponse("This page is for this machine alone.\n", 403)
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return PlainTextResponse("Requests from other sites are refused.\n", 403)
    if not token or _is_equal(request.cookies.get(COOKIE, ""), token):
        return None
    if _is_equal(request.query_params.get("token", ""), token):
        response = RedirectResponse(request.url.path, 303)
        response.set_cookie(COOKIE, token, httponly=True, samesite="lax")
        return response
    return PlainTextResponse("The token is missing or wrong. Open the address that the program printed.\n", 401)


def _is_equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
