"""What workers run in the tests of the cluster; apart from them, so that a worker imports no
language model for it."""

import os
import signal
from pathlib import Path

from data.store import StoreWriter
from featureflow.errors import UserError
from tests.data.store.made import planted_rows, planted_tokens


def write_or_die(task: tuple[str, int]) -> int:
    """Writes a planted shard. Kills its own worker in the middle of shard 1, the first time."""
    url, shard = task
    writer = StoreWriter.attach(url)
    start, stop = writer.layout.rows_of_shard(shard)
    rows = {name: each[start:stop] for name, each in planted_rows().items()}
    marker = Path(url).parent / "died"
    with writer.open_shard(shard, planted_tokens(5000).part(start, stop)) as writing:
        writing.append({name: each[:700] for name, each in rows.items()})
        if shard == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        writing.append({name: each[700:] for name, each in rows.items()})
        writing.commit()
    return shard


def always_die(task: int):
    os.kill(os.getpid(), signal.SIGKILL)


def complain(task: int):
    if task == 2:
        raise UserError("this cannot be", where=f"shard {task}", fix="nothing")
    return task
