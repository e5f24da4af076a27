"""Converts the weights of encoders: Hugging Face safetensors to folders of ours, and back.

  python -m mgen_jax.convert --source=google_ul2 --out=weights/ul2 --dtype=bfloat16
  python -m mgen_jax.convert --source=metaclip-bigG --tower=text --positions=256 --out=weights/clip
  python -m mgen_jax.convert --source=google_ul2 --encoder=ul2 --dry_run
  python -m mgen_jax.convert --source=weights/ul2 --out=exported

A source of safetensors (a file, or several with an index) with its config.json becomes a folder of
sharded Orbax checkpoints with a manifest of SHA-256; a source of ours becomes safetensors under the
names that it came with, the same bit for bit unless --dtype changed them. Tensors pass one by one:
no more than one parameter and one tensor are in memory. Whatever is missing, has another shape or
is not known is listed, and nothing is written. The tokenizer's file comes along.

Pickled weights (.bin, .pt) are refused: they can run code when they are read.
"""

import collections
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import rich.console
import rich.table
from absl import flags, logging
from rich import progress

from mgen_jax import cli
from mgen_jax.encoders import encoder as encoder_lib
from mgen_jax.encoders import files, weights
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules

_GIB = 2**30


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command."""
  to = {"flag_values": values}
  flags.DEFINE_string("source", None, "Folder to read: of safetensors, or one of ours.", **to)
  flags.DEFINE_string("out", None, "Folder to write; must not exist.", **to)
  flags.DEFINE_string("encoder", None, "What the source must hold, like ul2.", **to)
  flags.DEFINE_enum("tower", None, ["text", "vision"], "Of a CLIP that has both.", **to)
  flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Default: as in the files.", **to)
  flags.DEFINE_integer("positions", None, "Stretch a CLIP text tower to so many, like 256.", **to)
  flags.DEFINE_float("shard_gib", 10.0, "Back to safetensors: size of one file.", 0.001, **to)
  flags.DEFINE_bool("dry_run", False, "Say what would be done, and write nothing.", **to)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Reads the flags and converts."""
  del argv
  if values.source is None:
    raise UserError("--source is missing: name a folder of safetensors, or one converted before.")
  if values.out is None and not values.dry_run:
    raise UserError("--out is missing: name the folder to write, or add --dry_run.")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices())
  began = time.perf_counter()
  if weights.is_stored(values.source):
    _export(values, mesh)
  else:
    _import(values, mesh)
  logging.info("took %.1f s", time.perf_counter() - began)


def _import(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> None:
  with files.Source(values.source) as source:
    family = values.tower and f"clip_{values.tower}"
    matched = weights.match(source, family)
    _show(source, matched, mesh)
    matched.complain(source.folder)
    used = {name: source.tensors[name] for t in matched.targets for name in t.names}
    files.check_floats(source.folder, used)
    if values.encoder is not None:
      encoder_lib.check_name(values.encoder, matched.family, matched.config, source.folder)
    if values.dry_run:
      logging.info("everything fits; nothing was written (--dry_run)")
      return
    with _bar("converting") as bar:
      stored = weights.save(
        source,
        matched,
        Path(values.out),
        mesh,
        dtype=values.dtype,
        positions=values.positions,
        progress=_progress(bar),
      )
  logging.info("wrote %s: %d parameters", stored.folder, len(stored.tensors))


def _export(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> None:
  stored = weights.read_stored(values.source)
  if values.encoder is not None:
    encoder_lib.check_name(values.encoder, stored.family, stored.config, stored.folder)
  for key in ("dtype", "positions", "tower"):
    if values[key].value is not None:
      raise UserError(
        f"--{key} is of conversions from safetensors: {values.source} is one of ours."
      )
  sources = sum(len(entry["sources"]) for entry in stored.tensors.values())
  logging.info(
    "%s holds a %s of %d parameters: %d tensors", stored.folder, stored.family,
    len(stored.tensors), sources,
  )  # fmt: skip
  if values.dry_run:
    logging.info("nothing was written (--dry_run)")
    return
  with _bar("writing") as bar:
    written, same, count = weights.export(
      stored,
      Path(values.out),
      mesh,
      shard_bytes=int(values.shard_gib * _GIB),
      progress=_progress(bar),
    )
  logging.info("wrote %s", ", ".join(str(path) for path in written))
  logging.info("%d of %d tensors have the very bits that they came with", same, count)


def _show(source: files.Source, matched: weights.Match, mesh: jax.sharding.Mesh) -> None:
  """The parameters, where they come from and how they are split, as a table."""
  table = rich.table.Table(box=None)
  for column in ("parameter", "shape", "split over", "from", "dtype"):
    table.add_column(column)
  for target in matched.targets:
    layout = rules.sharding(mesh, target.axes, target.shape)
    dtypes = collections.Counter(source.tensors[name].dtype for name in target.names)
    first = target.rule.source.replace("{i}", "*")
    split = ", ".join(str(axes) for axes in layout.spec if axes) or "(whole)"
    table.add_row(
      target.rule.target, "x".join(map(str, target.shape)), split, first, "/".join(dtypes)
    )
  console = rich.console.Console(stderr=True, width=140)
  console.print(table)
  for kind in ("ignored", "unmapped", "missing", "misshaped"):
    names = getattr(matched, kind)
    if names:
      console.print(f"{len(names)} {kind}: {', '.join(names)}", markup=False, highlight=False)


def _bar(text: str) -> progress.Progress:
  bar = progress.Progress(console=rich.console.Console(stderr=True), transient=True)
  bar.add_task(text, total=None)
  return bar


def _progress(bar: progress.Progress):
  return lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  cli.run(main)
