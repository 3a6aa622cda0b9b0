"""A token before the MLflow pages, since on a shared machine every user reaches its loopback address.

This is a configuration file of gunicorn, which ``mlflow server`` starts with it; ``post_worker_init`` is its hook.
Under gunicorn MLflow serves its pages and tracking API only: its assistant, which runs shell commands, is not there.
"""

import hmac
import os
import signal
import threading
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

TOKEN = "MODIS_UI_TOKEN"
PAGE = "MODIS_UI_PAGE"

threads = 4
control_socket_disable = True

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]


def post_worker_init(worker: Any) -> None:
    """Put the guard before what the worker serves."""
    worker.wsgi = guarded(worker.wsgi, token=os.environ[TOKEN], page=os.environ[PAGE])
    threading.Thread(target=_end_with_the_command, name="modis-dist ui", daemon=True).start()


def _end_with_the_command() -> None:
    """End the whole server, a process group of its own, once the command is gone, however it ended.

    Standard input is a pipe whose other end it holds.
    """
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def guarded(application: Application, *, token: str, page: str) -> Application:
    """The application for those who have the token: once as ``?token=``, which leads to ``page``, then as a cookie."""

    def answer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        name = f"modis-ui-{environ['SERVER_PORT']}"  # browsers do not keep the cookies of ports apart
        if environ["PATH_INFO"] == "/health" or _same(_cookie(environ, name), token):
            return application(environ, start_response)
        if _same(parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0], token):
            cookie = f"{name}={token}; Path=/; HttpOnly; SameSite=Strict"
            start_response("303 See Other", [("Location", page), ("Set-Cookie", cookie)])
            return []
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"Open the whole address that `modis-dist ui` printed: it holds a token.\n"]

    return answer


def _cookie(environ: Environ, name: str) -> str:
    try:
        found = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
