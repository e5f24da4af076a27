"""Converts weights of others: safetensors to folders of ours, and back.

  python -m mgen_jax.convert --source=google_ul2 --out=weights/ul2 --dtype=bfloat16
  python -m mgen_jax.convert --source=metaclip-bigG --tower=text --positions=256 --out=weights/clip
  python -m mgen_jax.convert --source=google_ul2 --encoder=ul2 --dry_run
  python -m mgen_jax.convert --source=stable-diffusion/vae --out=weights/image_ae
  python -m mgen_jax.convert --source=DiT-XL-2-256x256.safetensors --out=weights/dit
  python -m mgen_jax.convert --source=weights/ul2 --out=exported

A source of safetensors (a file, or a folder of one or of several with an index) becomes a folder
with one Orbax checkpoint and a manifest of SHA-256: T5, CLIP and LLaMA as transformers writes them,
AutoencoderKL, Latte and PixArt as diffusers does, DiT and Latte as they were released. Which it is
stands in its config.json, or is seen from its names. A source of ours becomes safetensors under the
names that it came with, the same bit for bit unless --dtype changed them. Tensors pass one by one,
each in chunks; --mesh makes the chunks the shards of those who will read them. Whatever is missing,
has another shape or is not known is listed, and nothing is written. The tokenizer's file comes
along.

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
from mgen_jax.encoders import families as encoder_families
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.weights import families, folders, stored, transfer
from mgen_jax.weights import match as match_lib

FAMILIES = {**encoder_families.FAMILIES, **families.FAMILIES}
_GIB = 2**30


def define_flags(values: flags.FlagValues) -> None:
  """The flags of this command."""
  to = {"flag_values": values}
  flags.DEFINE_string("source", None, "Safetensors (folder or file), or a folder of ours.", **to)
  flags.DEFINE_string("out", None, "Folder to write; must not exist.", **to)
  flags.DEFINE_string("encoder", None, "What the source must hold, like ul2.", **to)
  flags.DEFINE_enum("tower", None, ["text", "vision"], "Of a CLIP that has both.", **to)
  flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Default: as in the files.", **to)
  flags.DEFINE_integer("positions", None, "Stretch a CLIP text tower to so many, like 256.", **to)
  flags.DEFINE_string("mesh", None, "Of the readers, like fsdp=8,tensor=4; else: here.", **to)
  flags.DEFINE_float("shard_gib", 10.0, "Back to safetensors: size of one file.", 0.001, **to)
  flags.DEFINE_bool("dry_run", False, "Say what would be done, and write nothing.", **to)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """Reads the flags and converts."""
  del argv
  if values.source is None:
    raise UserError("--source is missing: name a folder of safetensors, or one converted before.")
  if values.out is None and not values.dry_run:
    raise UserError("--out is missing: name the folder to write, or add --dry_run.")
  began = time.perf_counter()
  if stored.is_stored(values.source):
    _export(values)
  else:
    _import(values)
  logging.info("took %.1f s", time.perf_counter() - began)


def _import(values: flags.FlagValues) -> None:
  source = folders.Source(values.source)
  matched = match_lib.match(source, FAMILIES, values.tower and f"clip_{values.tower}")
  transfer.check_floats(source, matched)
  mesh = _mesh(values.mesh)
  _show(source, matched, mesh, values.dtype)
  matched.complain(source.path)
  if values.encoder is not None:
    encoder_lib.check_name(values.encoder, matched.family.name, matched.config, source.path)
  if values.dry_run:
    logging.info("everything fits; nothing was written (--dry_run)")
    return
  with _bar("converting") as bar:
    made = transfer.save(
      source,
      matched,
      Path(values.out),
      mesh,
      dtype=values.dtype,
      positions=values.positions,
      progress=_progress(bar),
    )
  logging.info("wrote %s: %d parameters", made.folder, len(made.tensors))


def _mesh(text: str | None) -> jax.sharding.Mesh | jax.sharding.AbstractMesh:
  """Of the devices at hand, or of any number of others, of which nothing but the shape counts."""
  if text is None:
    return mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.local_devices())
  config = mesh_lib.parse(text)
  sizes = [max(1, getattr(config, axis)) for axis in mesh_lib.AXES]
  return jax.sharding.AbstractMesh(tuple(sizes), mesh_lib.AXES)


def _export(values: flags.FlagValues) -> None:
  found = stored.read(values.source, FAMILIES)
  if values.encoder is not None:
    encoder_lib.check_name(values.encoder, found.family.name, found.config, found.folder)
  for key in ("dtype", "positions", "tower", "mesh"):
    if values[key].value is not None:
      raise UserError(
        f"--{key} is of conversions from safetensors: {values.source} is one of ours."
      )
  logging.info(
    "%s holds a %s of %d parameters: %d tensors", found.folder, found.family.name,
    len(found.tensors), len(found.sources) + len(found.kept),
  )  # fmt: skip
  if values.dry_run:
    logging.info("nothing was written (--dry_run)")
    return
  with _bar("writing") as bar:
    written, same, count = transfer.export(
      found, Path(values.out), shard_bytes=int(values.shard_gib * _GIB), progress=_progress(bar)
    )
  logging.info("wrote %s", ", ".join(str(path) for path in written))
  logging.info("%d of %d tensors have the very bits that they came with", same, count)


def _show(
  source: folders.Source,
  matched: match_lib.Match,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  dtype: str | None,
) -> None:
  """The parameters, where they come from and how they are cut, as a table."""
  table = rich.table.Table(box=None)
  for column in ("parameter", "shape", "chunks", "from", "dtype"):
    table.add_column(column)
  for target in matched.targets:
    dtypes = collections.Counter(source.tensors[name].dtype for name in target.names)
    size, layered = transfer.kept_dtype(source, target, dtype).itemsize, target.rule.layered
    chunk = stored.chunk_shape(mesh, target.axes, target.shape, size, layered)
    first = target.rule.source.replace("{i}", "*")
    sizes = ("x".join(map(str, shape)) for shape in (target.shape, chunk))
    table.add_row(target.rule.target, *sizes, first, "/".join(dtypes))
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
