"""A web server of a test's own, on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def _call(
    request: BaseHTTPRequestHandler, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    answer(request)


@contextmanager
def serving(**answers: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve within the block; the address is given.

    Args:
        answers: what answers each kind of request, such as do_GET.
    """

    def log_message(*_: Any) -> None:
        pass

    # Functions of their own: a method of some other object would not be given the request.
    methods = {name: partialmethod(_call, answer) for name, answer in answers.items()}
    handler = type("Handler", (BaseHTTPRequestHandler,), {**methods, "log_message": log_message})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
