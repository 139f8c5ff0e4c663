"""A server of the command line: it runs until Ctrl-C, which is how it is meant to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.console import say

if TYPE_CHECKING:
    from pipeline.serve.guard import Server


def serve_until_interrupted(server: Server) -> None:
    """Answer requests until SIGINT or SIGTERM, then close the socket."""
    try:
        server.run()
    except KeyboardInterrupt:
        say("stopped")
