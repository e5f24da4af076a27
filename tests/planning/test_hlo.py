"""The parser reads real compiled programs: loops multiplied in, FLOPs and collectives exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgen_jax.parallel import mesh as mesh_lib
from mgen_jax.planning import costs, hlo
from mgen_jax.planning.hlo import Shape

LAYERS, STEPS, ROWS, WIDTH = 5, 3, 16, 32
SHAPE = {"replica": 1, "fsdp": 2, "context": 2, "tensor": 2}


@functools.cache
def mesh():
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=2, context=2, tensor=2), jax.devices()[:8])


def compiled(function, *shapes_and_specs, out=None):
  """The module of a jitted function of arrays with partition specs."""
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), PartitionSpec(*spec)))
    for shape, spec in shapes_and_specs
  ]
  out = None if out is None else NamedSharding(mesh(), PartitionSpec(*out))
  with jax.set_mesh(mesh()):
    return hlo.parse(jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text())


def collectives(found):
  return [(op.collective, op.times) for op in found.ops if op.collective is not None]


def test_flops_of_nested_scans_are_those_of_the_formula():
  def layer(x, w):
    return jnp.tanh(x @ w), None

  def step(x, _):
    return jax.lax.scan(layer, x, weights_of[0])[0], None

  weights_of = []

  def program(x, weights):
    weights_of[:] = [weights]
    return jax.lax.scan(step, x, None, length=STEPS)[0]

  module = compiled(program, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), ()))
  found = costs.costs_of(module, SHAPE)
  assert found.flops == STEPS * LAYERS * 2 * ROWS * WIDTH * WIDTH
  assert found.unknown_loops == ()


def test_flops_of_a_gradient_are_three_times_those_of_the_loss():
  def loss(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0].sum()

  module = compiled(jax.grad(loss), ((LAYERS, WIDTH, WIDTH), ()), ((ROWS, WIDTH), ()))
  forward = LAYERS * 2 * ROWS * WIDTH * WIDTH
  # The first layer's input needs no gradient, but the scan computes it for every layer alike.
  assert costs.costs_of(module, SHAPE).flops == 3 * forward


def test_flops_of_a_convolution_count_taps_that_meet_an_input():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )

  module = compiled(convolve, ((2, 10, 4), ()), ((3, 4, 6), ()))
  assert costs.costs_of(module, SHAPE).flops == 2 * 2 * 4 * 6 * (3 * 10 - 2)


def test_a_product_that_tpus_write_as_a_convolution_counts_as_the_product():
  # A batched product [4, 8, 16] x [4, 16, 32]: the batch is a dilated spatial dimension.
  attributes = "window={size=4 stride=3 pad=3_3 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
  lhs, rhs = Shape("f32", (4, 8, 16)), Shape("f32", (4, 16, 32))
  found = costs.convolution_flops(lhs, rhs, Shape("f32", (4, 8, 32)), attributes)
  assert found == 2 * 4 * 8 * 16 * 32


def test_a_gathered_matrix_is_found_on_its_axis_with_its_bytes():
  module = compiled(
    lambda x: x * 2, ((64, 128), ("fsdp", None)), out=(None, None)
  )  # sharded over fsdp in, whole out
  ((found, times),) = collectives(costs.costs_of(module, SHAPE))
  assert (found.kind, found.axes, found.size, times) == ("all-gather", ("fsdp",), 2, 1)
  assert found.bytes == 64 * 128 * 4
  assert found.wire == 64 * 128 * 4 // 2


def test_a_sum_over_a_split_dimension_is_found_on_both_axes():
  module = compiled(
    lambda x, w: x @ w,
    ((16, 64), (None, ("context", "tensor"))),
    ((64, 8), (("context", "tensor"), None)),
    out=(None, None),
  )
  ((found, _),) = collectives(costs.costs_of(module, SHAPE))
  assert (found.kind, found.axes, found.size) == ("all-reduce", ("context", "tensor"), 4)
  assert found.bytes == 16 * 8 * 4
  assert found.wire == 2 * found.bytes * 3 // 4


def test_a_collective_inside_a_scan_counts_for_every_iteration():
  def program(x, weights):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh(), PartitionSpec()))
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, weights)[0]

  module = compiled(
    program, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), (None, "fsdp", None)), out=()
  )
  found = collectives(costs.costs_of(module, SHAPE))
  sent = sum(one.wire * times for one, times in found if one.axes == ("fsdp",))
  assert sent == LAYERS * WIDTH * WIDTH * 4 // 2


def test_a_shift_along_an_axis_is_found_on_it():
  def shift(x):
    return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

  spec = PartitionSpec("tensor")
  module = compiled(
    jax.shard_map(shift, mesh=mesh(), in_specs=spec, out_specs=spec), ((8, 4), ("tensor",))
  )
  ((found, _),) = collectives(costs.costs_of(module, SHAPE))
  assert (found.kind, found.axes) == ("collective-permute", ("tensor",))
  assert found.bytes == found.wire == 4 * 4 * 4


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_every_way_to_write_groups_is_read(text, groups):
  np.testing.assert_array_equal(costs.replica_groups(f", {text}, dimensions={{0}}", 4), groups)


# As XLA writes them for TPU and GPU: what the CPU's compiler never shows.
TPU_LOOP = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,16], s32[])) -> (s32[], bf16[8,16], s32[]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%p), index=2
  %w = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%next, %y, %limit)
}

%condition (p.1: (s32[], bf16[8,16], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %trips = s32[]{:T(128)} constant(48)
  %init = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]{:T(128)}) tuple(%zero, %x.1, %trips)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_loop_without_annotation_is_read_from_its_condition():
  found = costs.costs_of(hlo.parse(TPU_LOOP), SHAPE)
  assert found.flops == 48 * 2 * 8 * 16 * 16
  # x is read and y written in main memory; the weights wait in the core's own (S(1)).
  assert sum(op.bytes for op in found.ops if op.flops) == 2 * 8 * 16 * 2


def test_attention_kernels_count_by_formula():
  b, n, s, h, d = 2, 64, 16, 4, 32
  q, k = f"bf16[{b},{n},{h},{d}]{{3,2,1,0}}", f"bf16[{b},{s},{h},{d}]{{3,2,1,0}}"
  lines = f"""HloModule m

ENTRY %main (q: bf16[], k: bf16[], v: bf16[]) -> f32[] {{
  %q = {q} parameter(0)
  %k = {k} parameter(1)
  %v = {k} parameter(2)
  %f = (bf16[{b},{h},{n},{d}]{{3,1,2,0}}, f32[{b},{h},{n}]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"
  %p = f32[{b},{h},{n}]{{2,1,0}} get-tuple-element(%f), index=1
  ROOT %g = ({q}, {k}, {k}, u8[0]{{0}}) custom-call(%q, %k, %v, %p), custom_call_target="__cudnn$fmhaSoftmaxBackward"
}}
"""  # noqa: E501
  found = costs.costs_of(hlo.parse(lines), SHAPE)
  forward, backward = (op.flops for op in found.ops)
  assert forward == 4 * b * h * n * s * d
  assert backward == 10 * b * h * n * s * d


def test_a_kernel_that_describes_itself_over_several_lines_is_read_whole():
  text = """HloModule m

ENTRY %main (q: bf16[2,4,64,32], k: bf16[2,4,128,32]) -> bf16[2,4,64,32] {
  %q = bf16[2,4,64,32]{3,2,1,0} parameter(0)
  %k = bf16[2,4,128,32]{3,2,1,0} parameter(1)
  %a = bf16[2,4,64,32]{3,2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}
  %b = bf16[2,4,64,32]{3,2,1,0} custom-call(%a, %k), custom_call_target="tpu_custom_call", metadata={op_name="splash_mha_dkv"}
  ROOT %c = bf16[2,4,64,32]{3,2,1,0} custom-call(%b, %k), custom_call_target="tpu_custom_call", metadata={op_name="else"}
}
"""  # noqa: E501
  found = costs.costs_of(hlo.parse(text), SHAPE)
  size = 2 * 4 * 64 * 128 * 32
  assert [op.flops for op in found.ops] == [4 * size, 8 * size, 0]
  assert found.unknown_kernels == ("tpu_custom_call (else)",)


def test_a_slice_of_an_all_reduce_is_a_reduce_scatter():
  text = """HloModule m

%scatter (p: bf16[64,8]) -> bf16[8,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %r = bf16[64,8]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], use_global_device_ids=true
  %c = s32[] constant(0)
  ROOT %s = bf16[8,8]{1,0} dynamic-slice(%r, %c, %c), dynamic_slice_sizes={8,8}
}

ENTRY %main (x: bf16[64,8]) -> bf16[8,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  ROOT %f = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""
  ((found, _),) = collectives(costs.costs_of(hlo.parse(text), SHAPE))
  assert found.kind == "reduce-scatter"
  assert found.axes == ("fsdp", "context", "tensor")
  assert found.wire == 64 * 8 * 2 * 7 // 8


def test_what_waits_in_the_hosts_memory_counts_by_the_part_that_moves():
  text = """HloModule m

%update (p: bf16[48,8,4], u: bf16[1,8,4], i: s32[]) -> bf16[48,8,4] {
  %p = bf16[48,8,4]{2,1,0:S(5)} parameter(0)
  %u = bf16[1,8,4]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = bf16[48,8,4]{2,1,0:S(5)} dynamic-update-slice(%p, %u, %i, %i, %i)
}

ENTRY %main (u: bf16[1,8,4], i: s32[]) -> bf16[1,8,4] {
  %u = bf16[1,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %h = bf16[48,8,4]{2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %gpu = ((bf16[48,8,4]{2,1,0:S(5)}, bf16[1,8,4]{2,1,0}, s32[]), bf16[48,8,4]{2,1,0:S(5)}, u32[]) fusion-start(%h, %u, %i), kind=kCustom, calls=%update
  %done = bf16[48,8,4]{2,1,0:S(5)} fusion-done(%gpu)
  %tpu = ((bf16[48,8,4]{2,1,0:S(5)}, bf16[1,8,4]{2,1,0}, s32[], s32[], s32[]), bf16[48,8,4]{2,1,0:S(5)}, u32[]) dynamic-update-slice-start(%done, %u, %i, %i, %i)
  %made = bf16[48,8,4]{2,1,0:S(5)} dynamic-update-slice-done(%tpu)
  %back = ((bf16[48,8,4]{2,1,0:S(5)}, s32[], s32[], s32[]), bf16[1,8,4]{2,1,0}, u32[]) dynamic-slice-start(%made, %i, %i, %i)
  ROOT %x = bf16[1,8,4]{2,1,0} dynamic-slice-done(%back)
}
"""  # noqa: E501
  part = 8 * 4 * 2
  found = costs.costs_of(hlo.parse(text), SHAPE)
  assert [op.host_bytes for op in found.ops] == [part, part, part]
  assert all(part <= op.bytes <= part + 12 for op in found.ops)  # and the indices
