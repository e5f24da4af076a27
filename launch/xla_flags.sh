# shellcheck shell=bash
# The compiler's and runtime's settings that matter for training here, and why. To be sourced; uses
# and exports XLA_FLAGS and LIBTPU_INIT_ARGS, in which what is there already comes last, and so wins.
#   . launch/xla_flags.sh gpu|tpu|cpu
# None of them changes results beyond rounding. Measure before and after you change one: they are
# tuned for large dense transformers with sharded parameters (FSDP), and XLA's defaults move.

case "${1:?gpu, tpu or cpu}" in
  gpu)
    flags=(
      # Schedules each collective (the gathers of parameters, above all) as early as its inputs are
      # there and its wait as late as possible, so that transfers hide behind matrix products.
      --xla_gpu_enable_latency_hiding_scheduler=true
      # Gathers of a layer's parameters and scatters of its gradients are joined up to so many bytes:
      # a few large transfers use the network, many small ones wait for its latency. About one layer
      # of the 30B in bf16; larger ones would hold several layers in memory at once.
      --xla_gpu_all_gather_combine_threshold_bytes=1073741824
      --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824
      # Gradients that are summed over the replicas, likewise.
      --xla_gpu_all_reduce_combine_threshold_bytes=1073741824
      # In a scan over layers: the gather of the next layer starts during this one, and the scatter
      # of the last one's gradients ends there.
      --xla_gpu_enable_pipelined_all_gather=true
      --xla_gpu_enable_pipelined_reduce_scatter=true
      # The layers' loop is unrolled by two, so that what is received for one layer need not be
      # copied to where the loop expects it.
      --xla_gpu_enable_while_loop_double_buffering=true
      # Matrix products by cuBLAS only: at these sizes Triton's are rarely faster, and trying them
      # out takes minutes of compilation.
      --xla_gpu_enable_triton_gemm=false
    )
    export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
    # The share of the memory that JAX takes at once. The rest is for NCCL and cuDNN, which do not
    # ask JAX: at 1.0 they fail.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
  tpu)
    flags=(
      # Collectives run beside computation, as parts of a fusion with it, over several steps of the
      # loop: how the gathers of FSDP hide on a TPU.
      --xla_tpu_enable_async_collective_fusion=true
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
      --xla_tpu_enable_async_collective_fusion_multiple_steps=true
      # The tensor core goes on while such a transfer is under way.
      --xla_tpu_overlap_compute_collective_tc=true
      # Gathers are split in a start and an end, which the two flags above need.
      --xla_enable_async_all_gather=true
      # Several slices: the sums of gradients over the data-center network overlap with the backward
      # pass, those of different sizes too. No effect within one slice.
      --xla_tpu_enable_data_parallel_all_reduce_opt=true
      --xla_tpu_data_parallel_opt_different_sized_ops=true
    )
    export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
    ;;
  cpu) flags=() ;;
  *)
    echo "xla_flags.sh: $1 is not gpu, tpu or cpu" >&2
    return 2
    ;;
esac
unset flags
# Programs that compile within a second are not worth a file of the cache (--compilation_cache of
# mgen_jax.main keeps the others in WORKDIR/compiled, where a restart finds them).
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}"
