"""`featureflow serve` and `featureflow atlas serve`: the local servers, which run until Ctrl-C.

They need the packages of the extra `serve`, which are imported when one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import PATH, device_option, of_a_run
from pipeline.console import say
from pipeline.context import RunContext
from pipeline.run import Run


@click.command("serve")
@click.option("--host", default="127.0.0.1", help="elsewhere every file needs the printed token")
@click.option("--port", default=8765, help="port to listen on; 0 takes a free one")
@device_option
@of_a_run
def serve_atlas(host: str, port: int, device: str, folder: Path) -> None:
    """Serve the atlas on this machine with a live model: try a text, steer, side by side. Ctrl-C
    ends it."""
    from pipeline.serve.atlas_server import make_server
    from pipeline.serve.live import LiveAtlas

    live = LiveAtlas(Run.open(folder, context=RunContext(device=device)))
    server, address = make_server(live, host=host, port=port)
    say(f"open {address}")
    serve_until_interrupted(server)


@click.command()
@click.option(
    "--plan", "plan_paths", multiple=True, type=PATH, help="plan to offer by its file name"
)
@click.option("--host", default="127.0.0.1", help="address to listen on")
@click.option("--port", default=8089, help="port; 0 takes a free one")
@click.option(
    "--token",
    default="",
    help="token that requests must carry; needed for any address but this machine",
)
@device_option
@of_a_run
def serve(
    plan_paths: tuple[Path, ...], host: str, port: int, token: str, device: str, folder: Path
) -> None:
    """Answer OpenAI-style completion requests with the recipe's model; a request names a plan to be
    steered by it."""
    from pipeline.serve.endpoint import Endpoint, make_server

    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise click.UsageError("--token is needed to listen on an address that others can reach")
    names = [path.stem for path in plan_paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"two plans of one name: {', '.join(twice)}; rename a file")
    steering = Run.open(folder, context=RunContext(device=device)).steering
    plans = {path.stem: steering.read_plan(path) for path in plan_paths}
    endpoint = Endpoint(
        model=steering.model,
        saes=steering.saes,
        plans=plans,
        token=token,
        check=steering.check_plan,
    )
    server = make_server(endpoint, host=host, port=port)
    say(f"listening on {server.address}/v1; plans: {', '.join(plans) or 'none'}")
    serve_until_interrupted(server)


def serve_until_interrupted(server: Any) -> None:
    """Answer requests until SIGINT or SIGTERM, then close the socket."""
    try:
        server.run()
    except KeyboardInterrupt:
        say("stopped")
