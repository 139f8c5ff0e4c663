"""The flow graph on disk: `nodes.parquet`, `edges.parquet`, `pairs.parquet`, `warnings.json`;
written and read checked.

The schemas below are the normative ones (docs/formats.md repeats them in words). Strings that
repeat are dictionary encoded; evidence that was not gathered is null. Reading names every missing
or mistyped column at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from featureflow.errors import Command, Problem, UserError
from pipeline.artifact import SCHEMAS

KIND, SCHEMA = "link", SCHEMAS["link"]
_NAME = pa.dictionary(pa.int32(), pa.string())
NODES = pa.schema(
    {
        "site": _NAME,
        "layer": pa.int16(),
        "kind": _NAME,
        "latent": pa.int32(),
        "alive": pa.bool_(),
        "density": pa.float32(),
        "s_residual": pa.float32(),
        "s_mlp": pa.float32(),
        "s_attention": pa.float32(),
        "class": _NAME,
        "class_fixed": _NAME,
        "n_predecessors": pa.int32(),
        "n_successors": pa.int32(),
        "birth_layer": pa.int16(),
        "death_layer": pa.int16(),
        "persistence": pa.int16(),
        "birth_stepwise": pa.int16(),
        "death_stepwise": pa.int16(),
        "birth_agreement": pa.float32(),
        "death_agreement": pa.float32(),
        "ends_agreement": pa.float32(),
        "community": pa.int32(),
    }
)
EDGES = pa.schema(
    {
        "source_site": _NAME,
        "source_latent": pa.int32(),
        "target_site": _NAME,
        "target_latent": pa.int32(),
        "relation": _NAME,
        "rank": pa.int16(),
        "forward_rank": pa.int16(),
        "cosine": pa.float32(),
        "margin": pa.float32(),
        "mutual": pa.bool_(),
        "p_cosine": pa.float32(),
        "p_active": pa.float32(),
        "p_rival": pa.float32(),
        "p_partner": pa.float32(),
        "p_value": pa.float32(),
        "q_value": pa.float32(),
        "related": pa.bool_(),
        "kept": pa.bool_(),
        "pearson": pa.float32(),
        "jaccard": pa.float32(),
        "causal_success": pa.float32(),
        "causal_change": pa.float32(),
        "causal_n": pa.int32(),
    }
)
_COUNTS = pa.list_(pa.int32())
PAIRS = pa.schema(
    {
        "source_site": _NAME,
        "target_site": _NAME,
        "relation": _NAME,
        "gap": pa.int16(),
        "start": _NAME,
        "null": _NAME,
        "n_targets": pa.int32(),
        "n_links": pa.int32(),
        "n_links_kept_all_ranks": pa.int32(),
        "n_mutual": pa.int32(),
        "n_same_number": pa.int32(),
        "cosine_median": pa.float64(),
        "margin_median": pa.float64(),
        "null_median": pa.float64(),
        "null_p99": pa.float64(),
        "threshold": pa.float64(),
        "n_above_fixed": pa.int32(),
        "hub_skewness": pa.float64(),
        "hub_largest": pa.int32(),
        "pearson_median": pa.float64(),
        "pearson_median_kept": pa.float64(),
        "jaccard_median": pa.float64(),
        "pearson_best_median": pa.float64(),
        "pearson_chance_p99": pa.float64(),
        "agreement": pa.float64(),
        "histogram": _COUNTS,
        "null_histogram": _COUNTS,
    }
)
_SCHEMAS = {"nodes": NODES, "edges": EDGES, "pairs": PAIRS}
_OLD = {"p_firing": "p_active"}  # names of earlier versions
_MAY_BE_ABSENT = {"edges": ("p_partner", "related", "causal_success", "causal_change", "causal_n")}


@dataclass(frozen=True, kw_only=True)
class FlowTables:
    """The three tables as data frames, and the warnings of the run that made them."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    pairs: pd.DataFrame
    warnings: tuple[str, ...]


def write_tables(
    folder: Path, tables: Mapping[str, pd.DataFrame], warnings: tuple[str, ...]
) -> None:
    """Write `nodes`, `edges` and `pairs` and the warnings into an existing folder."""
    for name, schema in _SCHEMAS.items():
        frame = tables[name]
        frame = frame.assign(
            **{column: None for column in _MAY_BE_ABSENT.get(name, ()) if column not in frame}
        )
        table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
        parquet.write_table(table, folder / f"{name}.parquet", compression="zstd")
    (folder / "warnings.json").write_text(
        json.dumps(list(warnings), indent=1, ensure_ascii=False), encoding="utf-8"
    )


def read_tables(folder: Path) -> FlowTables:
    """Read and check all tables. Raises UserError naming each file and column that is wrong."""
    problems: list[Problem] = []
    frames = {
        name: _read(folder / f"{name}.parquet", schema, name, problems)
        for name, schema in _SCHEMAS.items()
    }
    if problems:
        raise UserError(
            "not a usable flow graph",
            where=str(folder),
            problems=tuple(problems),
            fix=Command("run", to="link"),
        )
    path = folder / "warnings.json"
    warnings = tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()
    return FlowTables(**frames, warnings=warnings)


def _read(path: Path, schema: pa.Schema, name: str, problems: list[Problem]) -> pd.DataFrame:
    try:
        table = parquet.read_table(path)
        table = table.rename_columns([_OLD.get(column, column) for column in table.column_names])
    except FileNotFoundError:
        problems.append(Problem(what="file missing", where=str(path)))
        return pd.DataFrame()
    except (OSError, pa.ArrowInvalid) as error:
        problems.append(
            Problem(what="cannot be read", where=str(path), found=str(error).splitlines()[0])
        )
        return pd.DataFrame()
    optional = _MAY_BE_ABSENT.get(name, ())
    for field in schema:
        if field.name not in table.schema.names:
            if field.name not in optional:
                problems.append(
                    Problem(
                        what="column missing",
                        where=f"{path}: {field.name}",
                        expected=str(field.type),
                    )
                )
        elif table.schema.field(field.name).type != field.type and not pa.types.is_dictionary(
            field.type
        ):
            found = str(table.schema.field(field.name).type)
            problems.append(
                Problem(
                    what="column type",
                    where=f"{path}: {field.name}",
                    expected=str(field.type),
                    found=found,
                )
            )
    return table.to_pandas(strings_to_categorical=False)
