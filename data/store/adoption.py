"""Taking over from an earlier store what is sound in it, so that fixing one shard costs one
shard."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data.store.checks import problems_of_shard
from data.store.layout import parse_layout, record_name
from data.store.places import LocalPlace
from data.store.records import ShardRecord, iter_problems_of_record, read_record
from data.store.writer import StoreWriter
from featureflow.errors import UserError


def adopt_shards(writer: StoreWriter, earlier: Path) -> list[int]:
    """Link the shards that `earlier`, a store of the same run, has whole into the store being
    written; every byte is compared with its record first. Both must be folders. Returns the shards;
    an unusable store gives none."""
    place = writer.place
    if not isinstance(place, LocalPlace) or not (earlier / "zarr.json").is_file():
        return []
    source = LocalPlace(earlier)
    adopted = []
    for shard in writer.missing_shards():
        record = _sound_record(source, writer, shard)
        if record is not None:
            _link_shard(source, place, record)
            adopted.append(shard)
    return adopted


def _sound_record(source: LocalPlace, writer: StoreWriter, shard: int) -> ShardRecord | None:
    try:
        layout = parse_layout(source.read("zarr.json"), where=source.url)
        record = read_record(source, shard)
    except UserError:
        return None
    if (
        record is None
        or layout.identity != writer.layout.identity
        or layout.n_rows != writer.layout.n_rows
    ):
        return None
    sizes = {name: size for name in record.files if (size := source.size(name)) is not None}
    if any(iter_problems_of_record(record, writer.layout, sizes)):
        return None
    return None if problems_of_shard(source.url, layout, record) else record


def _link_shard(source: LocalPlace, place: LocalPlace, record: ShardRecord) -> None:
    """Files are never changed in place, only replaced, so two stores may share them."""
    for name in record.files:
        temporary = place.temporary(name)
        try:
            os.link(source.root / name, temporary)
        except OSError:
            shutil.copyfile(source.root / name, temporary)
        place.publish(temporary, name)
    place.remove(record_name(record.shard))
    place.create(record_name(record.shard), record.to_json())
