"""The device mesh: its axes, how it is built from a config, and the one that is in use.

Axes, outermost first (the innermost is the one whose devices talk most):

  replica   whole copies of the model; only gradients cross it (between slices or pods)
  fsdp      parameters, optimizer state and EMA are sharded, the batch is split
  context   tokens of one example are split; parameters are sharded over it too
  tensor    heads and hidden units are split (Megatron style), norms by tokens

Not here: which array dimension goes to which axis (see `rules.py`).
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils

from mgen_jax.errors import ConfigError, UserError
from mgen_jax.parallel import rules

AXES = ("replica", "fsdp", "context", "tensor")
_current: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar(
  "mgen_mesh", default=None
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1, allowed once, takes the devices that are left."""

  replica: int = 1
  fsdp: int = -1
  context: int = 1
  tensor: int = 1

  def sizes(self, devices: int) -> tuple[int, ...]:
    """The four axis sizes for a number of devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = [self.replica, self.fsdp, self.context, self.tensor]
    text = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ConfigError(
        f"mesh ({text}): sizes are 1 or more, and one of them may be -1 (the rest)."
      )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
      sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
      nearest = math.gcd(known, devices)
      raise ConfigError(
        f"mesh ({text}) does not multiply to the {devices} devices at hand: set one size to -1, "
        f"or the others to a product that divides {devices} (for instance {nearest})."
      )
    return tuple(sizes)


def parse(text: str, flag: str = "--mesh") -> MeshConfig:
  """Reads "context=4,tensor=2": axes that are not named are 1, but fsdp takes what is left.

  Raises:
    UserError: it cannot be read; `flag` is where it came from.
  """
  sizes = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name.strip() not in AXES or not re.fullmatch(r"-?[1-9]\d*", size.strip()):
      raise UserError(
        f'{flag}={text} cannot be read at "{part}": write sizes of {", ".join(AXES)}, like '
        f"{flag}=context=4,tensor=2."
      )
    sizes[name.strip()] = int(size)
  return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh over `devices` (all of the job's by default), laid out for the network they are on.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.sizes(len(devices))
  if devices[0].platform == "cpu":  # simulated devices have no topology to respect
    grid = np.asarray(devices).reshape(sizes)
  else:
    # An axis of 4 on a torus of 8 x 8 x 8 takes a part of one physical axis.
    grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=auto)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[jax.sharding.Mesh]:
  """Traces what is inside for `mesh`: its axes, the rules table and its platform's kernels."""
  token = _current.set(mesh)
  try:
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
      yield mesh
  finally:
    _current.reset(token)


def current() -> jax.sharding.Mesh | None:
  """The mesh in use, or None."""
  return _current.get()


def platform() -> str:
  """The platform of the mesh in use ("cpu", "gpu", "tpu"); without one, the default backend's."""
  mesh = _current.get()
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def shards(*axes: str) -> int:
  """Into how many parts the mesh in use splits what lies over `axes`; 1 without a mesh."""
  mesh = _current.get()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Into how many parts a batch is split: the global batch must be a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in rules.BATCH_AXES)
