"""Decisions as a query over scores: which clips are kept, and by which rule each other one fails.

The rules come from the stages' thresholds and the scores from Parquet, so a new threshold costs a
query. Stages over the whole table (duplicates, resampling) belong to the decision: what they see is
what the rules before them keep, for a clip that is rejected anyway must not reject its twin.
Not here: counting what a decision did (`funnel`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from data_pipelines.curate import sources
from data_pipelines.curate.recipe import CLIP_KEYS, SOURCE_COLUMNS, Recipe
from data_pipelines.curate.stage import ROWS, Rule, SplitStage, Stage, TableStage
from data_pipelines.curate.store import CorruptPart, Store
from data_pipelines.curate.work import part_types
from mgen_jax.errors import UserError

# Of items that no rule rejects and that are not kept all the same.
NO_CLIP = "no_clip"  # nothing in the source is a clip
NOT_SCORED = "not_scored"  # a dear score that was not needed when it was computed: run again
_ITEM = ("source_id", "copy", "clip_id")


class Catalogue:
  """All scores of a run as one table: an item is a clip, or a source without any.

  A context manager. `add` the stages in the order of the recipe.
  """

  def __init__(self, store: Store, recipe: Recipe):
    self.store = store
    self.recipe = recipe
    self._errors: list[str] = []
    self._known: list[Stage] = []
    self._database = duckdb.connect()
    spill = _text(str(store.root / ".duckdb.part"))  # what does not fit into memory
    self._database.execute(f"SET threads = 2; SET temp_directory = {spill}")
    listed = sources.read(store.root).select([*SOURCE_COLUMNS, "partition"])
    self._replace("items", listed)

  def __enter__(self) -> "Catalogue":
    return self

  def __exit__(self, *exception) -> None:
    self._database.close()

  def add(self, stage: Stage, scores: pa.Table | None = None) -> None:
    """Joins the columns of a stage: from its committed parts, or from `scores` (clip_id, ...)."""
    if scores is None:
      self._read_parts(stage)
    else:
      self._replace("scores", scores)
    if isinstance(stage, SplitStage):
      self._database.execute(
        "CREATE OR REPLACE TABLE whole AS SELECT * FROM scores WHERE clip_id IS NULL;"
        "CREATE OR REPLACE TABLE scores AS SELECT * FROM scores WHERE clip_id IS NOT NULL"
      )
      self._join(stage, "source_id, copy", "scores", [*stage.columns, "clip_id"])
      self._join(stage, "source_id, copy", "whole", [])
    elif self.recipe.levels[stage.name] == "source":
      self._join(stage, "source_id, copy", "scores", list(stage.columns))
    else:
      self._join(stage, "clip_id", "scores", list(stage.columns))
    self._known.append(stage)

  def _read_parts(self, stage: Stage) -> None:
    version = self.recipe.versions[stage.name]
    commits = self.store.commits(stage.name, version, self.recipe.partitions)
    paths = [str(self.store.part_path(stage.name, version, c.partition)) for c in commits]
    types = part_types(self.recipe, stage)
    if not paths:
      self._replace("scores", pa.schema(list(types.items())).empty_table())
      return
    names = ", ".join(map(_quoted, types))
    try:
      self._database.execute(
        f"CREATE OR REPLACE TABLE scores AS SELECT {names} FROM read_parquet($1)", [paths]
      )
    except duckdb.BinderException as error:
      raise UserError(
        f"the scores in {self.store.root / f'{stage.name}@{version}'} lack a column"
        f" ({str(error).splitlines()[0]}): another version wrote them; delete that folder and run"
        " curation again."
      ) from error
    except duckdb.Error as error:
      raise CorruptPart(
        f"a part of {stage.name}@{version} in {self.store.root} cannot be read"
        f" ({str(error).splitlines()[0]}); delete that folder and run again."
      ) from error

  def _join(self, stage: Stage, keys: str, table: str, columns: Sequence[str]) -> None:
    """items := items LEFT JOIN table; faults become columns of their own."""
    fault = f"fault {len(self._errors)}"
    has_fault = "error_code" in self._columns(table)
    picked = [f"t.{_quoted(name)}" for name in columns]
    if has_fault:
      self._errors.append(fault)
      picked += [f"t.error_code AS {_quoted(fault)}", f"t.error AS {_quoted(fault + ' text')}"]
    condition = " AND ".join(f"i.{key} = t.{key}" for key in keys.split(", "))
    self._database.execute(
      f"CREATE OR REPLACE TABLE items AS SELECT i.*, {', '.join(picked)}"
      f" FROM items i LEFT JOIN {table} t ON {condition}"
    )

  def _columns(self, table: str) -> list[str]:
    return [row[0] for row in self._database.execute(f"DESCRIBE {table}").fetchall()]

  def _replace(self, name: str, table: pa.Table) -> None:
    self._database.register("given", table)
    self._database.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM given")
    self._database.unregister("given")

  def survivors(self, stage: Stage) -> pa.Table:
    """What a table stage sees: clip_id and its `needs` of the clips that all rules before it keep,
    in order of source and clip."""
    rules = [rule for _, rule in self.recipe.rules(before=stage.name)]
    kept = " AND ".join(["clip_id IS NOT NULL", f"({self._error()}) IS NULL", *map(_keeps, rules)])
    names = ", ".join(map(_quoted, dict.fromkeys(("clip_id", *stage.needs))))
    return self._query(f"SELECT {names} FROM items WHERE {kept} ORDER BY source_id, copy, clip_id")

  def keyed(self, scores: pa.Table) -> pa.Table:
    """`scores` of clips (clip_id, ...) with partition, source_id and copy, in order."""
    self._database.register("given", scores)
    table = self._query(
      "SELECT i.partition, i.source_id, i.copy, g.* FROM given g JOIN items i USING (clip_id)"
      " ORDER BY i.source_id, i.copy, clip_id"
    )
    self._database.unregister("given")
    return table

  def decide(self) -> pa.Table:
    """Every item with all scores (descriptors stay in their parts) and, in this order at the end:

    error_code, error: why a file or a clip could not be scored, or null.
    first_fail: its error, or the reason of the first rule in the order of Table 38 that it fails;
      `NO_CLIP` (where Table 38 looks at scenes), `NOT_SCORED`, or null if it is kept.
    fails: the reasons of all rules that it fails.
    keep: whether it is kept.
    """
    rules = ordered_rules(self.recipe)
    fails = [_reason(rule) for _, rule in rules]
    no_clip = f"CASE WHEN clip_id IS NULL THEN '{NO_CLIP}' END"
    scenes = list(ROWS).index("scene") + 1
    until_scene = sum(bool(r.row) and list(ROWS).index(r.row) < scenes for _, r in rules)
    missing = [f"{_quoted(rule.column)} IS NULL" for _, rule in rules] or ["false"]
    text = ", ".join(_quoted(name + " text") for name in self._errors)
    first = ", ".join(
      [
        "error_code",
        *fails[:until_scene],
        no_clip,
        *fails[until_scene:],
        f"CASE WHEN {' OR '.join(missing)} THEN '{NOT_SCORED}' END",
      ]
    )
    columns = dict.fromkeys(["partition", *SOURCE_COLUMNS, *CLIP_KEYS])
    scores = self.recipe.column_types()
    columns |= dict.fromkeys(name for name in scores if not _is_descriptor(scores[name]))
    known = set(self._columns("items"))
    names = ", ".join(_quoted(name) for name in columns if name in known)
    return self._query(
      f"WITH named AS (SELECT {names}, {self._error()} AS error_code,"
      f" COALESCE({text}) AS error FROM items),"
      f" judged AS (SELECT *, COALESCE({first}) AS first_fail,"
      f" list_filter([{', '.join(fails) or 'NULL'}]::VARCHAR[], lambda r: r IS NOT NULL) AS fails"
      " FROM named)"
      " SELECT *, first_fail IS NULL AS keep FROM judged ORDER BY source_id, copy, clip_id"
    )

  def _error(self) -> str:
    return f"COALESCE({', '.join(map(_quoted, self._errors)) or 'NULL'}, NULL)"

  def _query(self, text: str) -> pa.Table:
    return self._database.sql(text).to_arrow_table().combine_chunks()


def ordered_rules(recipe: Recipe) -> list[tuple[Stage, Rule]]:
  """All rules in the order of Table 38. Those of no row stand before its last two, which look at
  all clips, or after them if they look at all clips themselves."""
  places = list(ROWS)

  def place(pair: tuple[Stage, Rule]) -> float:
    stage, rule = pair
    if rule.row:
      return places.index(rule.row)
    late = recipe.phase_of(stage) > 0
    return len(places) if late else places.index("duplicates") - 0.5

  return sorted(recipe.rules(), key=place)


def score_tables(catalogue: Catalogue, stage: TableStage) -> pa.Table:
  """Runs a table stage on what is left; its columns with clip_id. Not added yet."""
  table = catalogue.survivors(stage)
  types = {"clip_id": pa.string()} | dict(stage.columns)
  if table.num_rows == 0:
    return pa.schema(list(types.items())).empty_table()
  made = stage.score(table)
  if made.num_rows != table.num_rows:
    raise ValueError(f"{stage.name} made {made.num_rows} rows out of {table.num_rows}")
  columns = [made[name].combine_chunks().cast(kind) for name, kind in stage.columns.items()]
  return pa.table([table["clip_id"], *columns], names=list(types))


def digest(table: pa.Table) -> str:
  """SHA-256 of a table's content."""
  sink = pa.BufferOutputStream()
  with pa.ipc.new_stream(sink, table.schema) as writer:
    writer.write_table(table.combine_chunks())
  return hashlib.sha256(sink.getvalue()).hexdigest()


def _is_descriptor(kind: pa.DataType) -> bool:
  """Embeddings and hashes: what stages compare, and nobody reads."""
  inner = kind.value_type if pa.types.is_list(kind) else kind
  return pa.types.is_binary(inner) or (inner is not kind and pa.types.is_float32(inner))


def _keeps(rule: Rule) -> str:
  """SQL: the score is there and enough."""
  column = f"CAST({_quoted(rule.column)} AS DOUBLE)"
  less, more = ("<", ">") if rule.strict else ("<=", ">=")
  bounds = [f"{column} {more} {_number(rule.at_least)}"] if rule.at_least is not None else []
  bounds += [f"{column} {less} {_number(rule.at_most)}"] if rule.at_most is not None else []
  return f"COALESCE({' AND '.join(bounds) or 'true'}, false)"


def _fails(rule: Rule) -> str:
  """SQL: the score is there and not enough."""
  return f"({_quoted(rule.column)} IS NOT NULL AND NOT {_keeps(rule)})"


def _reason(rule: Rule) -> str:
  """SQL: the reason if the rule fails, or null."""
  return f"CASE WHEN {_fails(rule)} THEN {_text(rule.reason)} END"


def _quoted(name: str) -> str:
  return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
  return "'" + value.replace("'", "''") + "'"


def _number(value: Any) -> str:
  return repr(float(value))


def thresholds_of(rule: Rule) -> str:
  """A rule in words: "motion > 2", "0.5 < mv_mean < 7", "text_score < 0.6"."""
  less, more = ("<", ">") if rule.strict else ("≤", "≥")
  if rule.at_least is not None and rule.at_most is not None:
    return f"{rule.at_least:g} {less} {rule.column} {less} {rule.at_most:g}"
  if rule.at_least is not None:
    return f"{rule.column} {more} {rule.at_least:g}"
  return f"{rule.column} {less} {rule.at_most:g}"


def counts(column: pa.ChunkedArray) -> Mapping[str, int]:
  """How often each value occurs, nulls left out, the most frequent first."""
  found: dict[str, int] = {}
  for value in column.to_pylist():
    if value is not None:
      found[value] = found.get(value, 0) + 1
  return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
