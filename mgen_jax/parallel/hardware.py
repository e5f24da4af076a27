"""Peak rates of accelerators, for model FLOPs utilisation (MFU). Not a performance model."""

import jax

# Dense bf16 peak, FLOP/s of one JAX device, by a substring of `device_kind` in lower case; the
# first match counts. From the makers' data sheets (without sparsity).
PEAK_BF16_FLOPS = (
  ("h200", 989e12),
  ("h100", 989e12),
  ("b200", 2250e12),
  ("a100", 312e12),
  ("tpu7x", 2307e12 / 2),  # two devices a chip
  ("tpu v6", 918e12),
  ("tpu v5 lite", 197e12),
  ("tpu v5e", 197e12),
  ("tpu v5", 459e12),
  ("tpu v4", 275e12),
)


def peak_flops(device: jax.Device) -> float | None:
  """Peak bf16 FLOP/s of a device, or None where it is not known (every CPU)."""
  kind = device.device_kind.lower()
  return next((peak for name, peak in PEAK_BF16_FLOPS if name in kind), None)
