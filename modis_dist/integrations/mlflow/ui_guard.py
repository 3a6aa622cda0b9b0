"""Token check in front of the MLflow UI, because every user of a shared machine can connect to its loopback address.

``mlflow server`` gives this file to gunicorn as its configuration; ``post_worker_init`` is a hook of gunicorn. Under
gunicorn MLflow serves only its UI and tracking API, not its assistant, which runs shell commands.
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
    """Wrap the application of a worker in the token check."""
    worker.wsgi = guarded(worker.wsgi, token=os.environ[TOKEN], page=os.environ[PAGE])
    threading.Thread(target=_end_with_parent, name="modis-dist ui", daemon=True).start()


def _end_with_parent() -> None:
    """Kill the server's process group when `modis-dist ui`, which holds the other end of standard input, has ended."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def guarded(application: Application, *, token: str, page: str) -> Application:
    """Return the application behind a token, first as ``?token=``, which redirects to ``page``, then as a cookie."""

    def answer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        name = f"modis-ui-{environ['SERVER_PORT']}"  # browsers share cookies between ports
        if environ["PATH_INFO"] == "/health" or _same(_cookie(environ, name), token):
            return application(environ, start_response)
        if _same(parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0], token):
            cookie = f"{name}={token}; Path=/; HttpOnly; SameSite=Strict"
            start_response("303 See Other", [("Location", page), ("Set-Cookie", cookie)])
            return []
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"Open the complete address that `modis-dist ui` printed; it contains a token.\n"]

    return answer


def _cookie(environ: Environ, name: str) -> str:
    try:
        cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(name)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
