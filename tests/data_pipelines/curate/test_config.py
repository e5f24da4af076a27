"""The config of curation: every set resolves, and a wrong key says which one was meant."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("duckdb", reason="needs the extra: pip install mgen_jax[curate]")
pytest.importorskip("rapidocr", reason="needs the extra: pip install mgen_jax[curate]")

from data_pipelines.curate import config
from data_pipelines.curate import configs as named
from data_pipelines.curate.stage import ROWS
from mgen_jax.errors import ConfigError

NAMES = sorted(
  path.stem for path in Path(named.__file__).parent.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_set_resolves(name):
  made = importlib.import_module(f"data_pipelines.curate.configs.{name}").get_config()
  resolved = config.resolve(made)
  assert resolved.name == name
  recipe = resolved.recipe()
  assert {rule.row for _, rule in recipe.rules()} >= set(ROWS)  # every row of the paper's table
  assert all(len(version) == 12 for version in recipe.versions.values())


def test_the_strictest_set_has_the_papers_thresholds():
  made = config.resolve(
    importlib.import_module("data_pipelines.curate.configs.movie_gen_highres").get_config()
  )
  rules = {(rule.column, rule.at_least, rule.at_most) for _, rule in made.recipe().rules()}
  assert ("duration", 4.0, 120.0) in rules
  assert ("short_side", 768, None) in rules
  assert ("text_score", None, 0.6) in rules
  assert ("aesthetics", 4.0, None) in rules
  assert ("vmaf_motion_30", 2.0, None) in rules
  assert ("shots_per_second", None, 0.85) in rules
  assert made.split.min_seconds == 12.0 and made.split.max_seconds == 16.0
  assert made.aspect_mix.landscape == 0.8 and made.human_share.share == 0.6


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"txet": {}}, 'did you mean "text"'),
    ({"text": {"max_scroe": 0.5}}, 'did you mean "max_score"'),
    ({"text": {"max_score": "high"}}, "must be a number"),
    ({"off": ("txet",)}, 'did you mean "text"'),
    ({"off": ("scan",)}, "which no stage before it writes"),
    ({"partitions": 0}, "must be 1 or more"),
  ],
)
def test_a_wrong_key_or_value_is_named(values, words):
  with pytest.raises(ConfigError, match=words):
    config.resolve(config.complete(**values))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("motion.min_at_30", "write stage.key=value"),
    ("moton.min_at_30=1", 'did you mean "motion"'),
    ("motion.min_at_3=1", 'did you mean "min_at_30"'),
    ("motion.min_at_30=much", "is not a number"),
    ("scan.cut=0.2", "changes scores"),
  ],
)
def test_a_wrong_what_if_is_named(change, words):
  with pytest.raises(ConfigError, match=words):
    config.what_if(config.CurateConfig().recipe(), [change])


def test_a_what_if_keeps_every_version():
  recipe = config.CurateConfig().recipe()
  other = config.what_if(recipe, ["motion.min_at_30=1.5", "text.max_score=0.3"])
  assert other.versions == recipe.versions
  assert other.rules() != recipe.rules()


def test_the_seed_is_the_runs():
  one, other = config.CurateConfig(seed=1).recipe(), config.CurateConfig(seed=2).recipe()
  seeds = [stage.seed for stage in one.stages if hasattr(stage, "seed")]
  assert len(seeds) >= 4 and set(seeds) == {1}
  assert one.versions["split"] != other.versions["split"]
  assert one.versions["motion"] != other.versions["motion"]  # it scores other clips
  assert one.versions["probe"] == other.versions["probe"]
