"""What the makers say of each accelerator: memory, peak rates, links. Not measured, not a model.

Rates are those of one JAX device. "Link" figures are one way. Nothing here is a promise that a
program reaches them: see `roofline.py` for what is made of them.
"""

import dataclasses
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device.

  `memory`, bytes: what XLA may use, as it says itself when a program is too big (TPU), or what the
  driver reports (GPU). `links`: of the torus, for one axis in both directions; or to the switch.
  """

  name: str
  platform: Literal["tpu", "gpu", "cpu"]
  memory: float  # bytes
  flops: float  # bf16, dense, per second
  bandwidth: float  # of the HBM, bytes per second
  link: float  # TPU: ICI, one link, one way; GPU: NVLink of one GPU, one way; bytes per second
  network: float  # to other hosts or slices, of one device, one way; bytes per second
  host: float  # to the memory of the host (PCIe), one way; bytes per second
  torus: int = 0  # number of axes of the ICI torus; 0: a switch
  wraps: int = 0  # an axis of this size (or a multiple) has its ends joined; 0: none
  devices: int = 1  # JAX devices of one chip
  largest: int = 0  # chips of the largest slice that is sold; 0: no limit of the kind


# TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, tables "key specifications": bf16 peak, HBM
# bandwidth, largest slice, bidirectional ICI bandwidth of a chip (400, 1200, 800, 1200 GB/s over 4,
# 6, 4, 6 ports). Memory is the "available HBM" in libtpu's own message. The network to other slices
# is 50 Gbit/s a chip (v5p) and 6.4 Tbit/s a pod of 256 (v5e); v6e and TPU7x: taken as 100 Gbit/s.
# PCIe: 16 lanes of generation 3 to 5, shared by some chips; 16 GB/s is a cautious round figure.
# GPUs: NVIDIA's data sheets of H100 SXM, H200 SXM and DGX B200: dense bf16, HBM, NVLink (900 and
# 1800 GB/s both ways together), one 400 Gbit/s adapter for each GPU (also Movie Gen, section 4.1),
# PCIe generation 5. Memory is what nvidia-smi shows (81559, 143771 and 183359 MiB).
CHIPS = {
  "v5e": Chip("TPU v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 50e9, 3.1e9, 16e9, 2, 16, 1, 256),
  "v5p": Chip("TPU v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 100e9, 6.25e9, 16e9, 3, 4, 1, 6144),
  "v6e": Chip("TPU v6e", "tpu", 31.25 * GIB, 918e12, 1638e9, 100e9, 12.5e9, 16e9, 2, 16, 1, 256),
  # Two devices a chip (2307 TFLOP/s, 7380 GB/s, 192 GiB), which share its six links.
  "tpu7x": Chip("TPU7x", "tpu", 94.75 * GIB, 1153.5e12, 3690e9, 50e9, 6.25e9, 16e9, 3, 4, 2, 9216),
  "h100": Chip("H100 SXM", "gpu", 79.65 * GIB, 989e12, 3350e9, 450e9, 50e9, 64e9),
  "h200": Chip("H200 SXM", "gpu", 140.40 * GIB, 989e12, 4800e9, 450e9, 50e9, 64e9),
  "b200": Chip("B200", "gpu", 179.06 * GIB, 2250e12, 8000e9, 900e9, 50e9, 64e9),
  # Simulated devices: they share the host's memory, and their speed says nothing.
  "cpu": Chip("simulated on the CPU", "cpu", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}

# What XLA needs to know of a GPU to compile for it: the fields of its GpuDeviceInfoProto, as the
# driver reports them for these cards. (multiprocessors, compute capability, clock in GHz, L2 bytes)
GPU_CORES = {
  "h100": (132, (9, 0), 1.98, 52_428_800),
  "h200": (132, (9, 0), 1.98, 52_428_800),
  "b200": (148, (10, 0), 1.965, 132_644_864),
}


def gpu_target_config(name: str) -> str:
  """XLA's GpuTargetConfigProto of a GPU, in text form (see `GPU_CORES`)."""
  chip = CHIPS[name]
  cores, (major, minor), clock, l2 = GPU_CORES[name]
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {clock}
  device_memory_size: {int(chip.memory)}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {l2}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{chip.name}"
"""
