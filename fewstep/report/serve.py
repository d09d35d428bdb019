"""The page of a run that goes on, made anew at each look, for browsers on this machine alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fewstep.report.page import render
from fewstep.report.record import read_all

REFRESH = 15
"""Seconds between two looks at a run that goes on."""


def server(runs: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """Answers on 127.0.0.1, at this port or any that is free; `serve_forever` is the caller's.

    Raises ValueError for folders that are no runs, and for a port that is taken.
    """
    read_all(runs)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page must not read a run through a name that it points to this machine.
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                return self.send_error(HTTPStatus.FORBIDDEN)
            if self.path != "/":
                return self.send_error(HTTPStatus.NOT_FOUND)
            records = read_all(runs)
            going = any(record.iteration < record.iterations for record in records)
            body = render(records, refresh=REFRESH if going else None).encode("utf-8")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Looks are no news."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise ValueError(f"--port {port} cannot be used: {error.strerror}; leave it out for a free one") from error


def serve(runs: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Answer until interrupted."""
    with server(runs, port) as page:
        say(f"http://127.0.0.1:{page.server_address[1]}/ shows it; Ctrl-C ends this")
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            say("")
