"""A server of the command line: it runs until Ctrl-C, which is how it is meant to end."""

from __future__ import annotations

from http.server import HTTPServer

from pipeline.console import say


def serve_until_interrupted(server: HTTPServer) -> None:
    """Answer requests until SIGINT or SIGTERM, then close the socket."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.server_close()
