"""Planning to draw samples: the denoising of a batch of them, with guidance, as one program.

It is the program of `mgen_jax.sample` up to the latents: every step of the solver, the text's
features as inputs. Not here: decoding the latents, and the encoders of the text.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mgen_jax import tasks
from mgen_jax.config import TrainStage
from mgen_jax.data.buckets import Bucket
from mgen_jax.errors import UserError
from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.parallel import rules
from mgen_jax.parallel.mesh import MeshConfig
from mgen_jax.planning.compile import Job, tree_bytes
from mgen_jax.planning.topologies import Topology
from mgen_jax.tasks import TextToVideo, text_to_video
from mgen_jax.training import state as state_lib

NOTE = (
  "Only the denoising is planned: the encoders of the text and the decoding of the latents are "
  "programs of their own."
)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """What a plan of sampling asks for beside the stage."""

  mesh: MeshConfig | None = None  # None: as `mgen_jax.sample` does, `sampling_mesh`
  samples: int | None = None  # drawn at a time; None: as few as the mesh can divide


def task_of(stage: TrainStage, name: str) -> TextToVideo:
  """The task of a stage whose model can be sampled.

  Raises:
    UserError: it is none.
  """
  task = tasks.make(stage.task)
  if not isinstance(task, TextToVideo):
    raise UserError(
      f"--stage={name} trains {stage.task.name}, whose sampling cannot be planned: name one of "
      "text_to_video, or leave --what=sample out."
    )
  return task


def job(
  stage: TrainStage, name: str, bucket: Bucket, devices: list[jax.Device], sampling: Sampling
) -> Job:
  """The program that draws a batch of samples of a bucket.

  Args:
    stage: that trains the model; its own mesh and batch play no part.
    name: of the stage.
    bucket: their shape.
    devices: what is planned for.
    sampling: mesh and number of samples.

  Raises:
    UserError: a mesh that does not fit the devices, samples that do not divide, a bucket that the
      model cannot take, a stage without a sampler. (Heads that the mesh does not divide are found
      by the model when it is traced.)
  """
  task = task_of(stage, name)
  try:
    task.config.check_bucket(bucket)
  except UserError as error:
    raise UserError(f"--bucket={bucket.name}: {error}") from error
  wanted = sampling.mesh or text_to_video.sampling_mesh(task.config.sampler, len(devices))
  mesh = mesh_lib.make_mesh(wanted, devices)
  axis = text_to_video.sample_axis(mesh)
  parts = mesh.shape["fsdp"]
  samples = parts if sampling.samples is None else sampling.samples
  if samples < 1 or samples % parts:
    raise UserError(
      f"--samples={samples} does not divide over the mesh axis fsdp={parts}: use "
      f"{max(1, round(samples / parts)) * parts}, or give the devices to other axes, like "
      f"--mesh=context={len(devices)}."
    )

  def program(params: Any, text: dict[str, jax.Array], seeds: jax.Array) -> jax.Array:
    keys = jax.vmap(lambda seed: state_lib.stream_key(seed, "sample", 0))(seeds)
    return task.sample(params, text, keys, bucket)

  layout = state_lib.param_shardings(task, mesh)
  params = state_lib.with_layout(state_lib.param_shapes(task), layout)

  def shape(shape, dtype):
    names = (axis,) + (None,) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(mesh, names, shape))

  specs = task.batch_spec(bucket, samples)
  text = {n: shape(spec.shape, spec.dtype) for n, spec in specs.items() if n != "latents"}
  seeds = shape((samples,), np.int32)
  sizes = {"parameters": tree_bytes(params), "optimizer": 0, "ema": 0}
  sizes["batch"] = tree_bytes((text, seeds))
  return Job(mesh, jax.jit(program), (params, text, seeds), sizes)


def record(task: TextToVideo, samples: int) -> dict[str, Any]:
  """What the JSON of a plan says of the sampler."""
  sampler = task.config.sampler
  return {
    "count": samples,
    "method": sampler.method,
    "num_steps": sampler.num_steps,
    "evaluations": text_to_video.evaluations(sampler),
    "guidance": sampler.guidance,
    "guidance_split": sampler.guidance_split,
    "dtype": sampler.dtype,
  }


def meshes(
  stage: TrainStage, name: str, bucket: Bucket, topology: Topology
) -> Iterator[MeshConfig]:
  """Every mesh that divides heads and tokens evenly: those that split an example by context first,
  as they keep each matrix product whole, then those that draw more samples at a time."""
  task = task_of(stage, name)
  replica = text_to_video.sampling_mesh(task.config.sampler, topology.size).replica
  rest = topology.size // replica
  sizes = [1]
  while rest % (2 * sizes[-1]) == 0:
    sizes.append(2 * sizes[-1])
  heads, tokens = task.config.model.heads, task.tokens(bucket)
  for tensor in sizes:
    for fsdp in sizes:
      context, odd = divmod(rest, tensor * fsdp)
      if not odd and context and heads % tensor == 0 and tokens % (context * tensor) == 0:
        yield MeshConfig(replica, fsdp, context, tensor)


def flags(mesh: MeshConfig) -> str:
  """The flag that asks for a mesh."""
  named = [f"{axis}={getattr(mesh, axis)}" for axis in mesh_lib.AXES if getattr(mesh, axis) > 1]
  return "--mesh=" + (",".join(named) or "fsdp=1")
