"""The backbone and the same maths in PyTorch agree, in values and in all gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgen_jax.models import backbone
from mgen_jax.models.backbone import Backbone, BackboneConfig

torch = pytest.importorskip("torch", reason="the parity tests need torch, of the extra test")

PAPER = BackboneConfig(
  layers=3,
  width=48,
  heads=4,
  mlp_width=96,
  in_channels=4,
  out_channels=4,
  max_positions=(3, 5, 6),
  context_widths=(24, 16, 8),
  dtype="float32",
  remat="none",
)
ARMS = {
  "paper": PAPER,
  "dit": backbone.dit_arm(PAPER),
  "options": dataclasses.replace(
    PAPER, qk_norm=True, cross_norm=True, kv_heads=2, positions="rotary", activation="gelu"
  ),
  "patches": dataclasses.replace(PAPER, patch=(2, 1, 2), norm="layer", remat="save_attention"),
}


def _random(tree, seed, scale=0.15):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), tree)


@pytest.mark.parametrize("arm", ARMS)
def test_values_and_gradients_are_those_of_the_torch_reference(arm):
  from benchmarks import torch_backbone

  config = ARMS[arm]
  model = Backbone(config)
  rng = np.random.default_rng(7)
  latents = rng.standard_normal((2, 2, 4, 6, 4)).astype(np.float32)
  time = np.array([0.2, 0.9], np.float32)
  texts = [rng.standard_normal((2, 5, w)).astype(np.float32) for w in config.context_widths]
  masks = [np.arange(5)[None] < np.array([[n], [5]]) for n in (3, 1, 2)]
  target = rng.standard_normal(latents.shape).astype(np.float32)
  inputs = (latents, time, texts, masks)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  params = _random(nn.unbox(shapes)["params"], 0)

  def loss(params):
    made = model.apply({"params": params}, *inputs)
    return jnp.square(made - target).mean(), made

  (_, made), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  twin = torch_backbone.Backbone(config)
  torch_backbone.load(twin, params)
  tensors = jax.tree.map(torch.tensor, inputs)
  made_twin = twin(*tensors)
  (made_twin - torch.tensor(target)).square().mean().backward()

  scale = float(made_twin.detach().abs().max())
  np.testing.assert_allclose(made, made_twin.detach().numpy(), rtol=1e-3, atol=1e-5 * scale)
  gradients = torch_backbone.to_torch(gradients, config.layers)
  names = dict(twin.named_parameters())
  assert set(names) == set(gradients)
  for name, parameter in names.items():
    expected = parameter.grad.numpy()
    size = np.abs(expected).max()
    # A bias of all keys shifts every score of a query alike and moves nothing.
    assert size > 0 or name.endswith("self_attention.key.bias"), name
    np.testing.assert_allclose(
      gradients[name], expected, rtol=1e-3, atol=1e-4 * size + 1e-7, err_msg=name
    )
