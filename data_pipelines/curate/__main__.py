"""Curates a folder of videos: scores, decides, reports, and cuts the clips that are kept.

  python -m data_pipelines.curate --config=data_pipelines/curate/configs/movie_gen_720.py \\
    --input=videos --output=curated

The same command again does what is new, and goes on after an interruption. Any key of the config
can be set by a flag, like --config.text.max_score=0.5; a threshold only costs a query.

  --what-if=motion.min_at_30=1.5    what that would leave, beside what is; changes nothing
  --action=select                   only decide again, and write the report
  --action=verify                   read every byte of the results
  --checksums=SHA256SUMS            refuse files that are not what the list says
  --engine=ray --workers=64 --engine_options=auto                    on a Ray cluster
  --engine=beam --engine_options=--runner=DataflowRunner,--project=p on Beam's runners
"""

# This file imports nothing dear: workers, and the processes that decode, import it once more.
import importlib.util
import sys

_NEEDED = ("cv2", "duckdb", "faiss", "pdqhash", "pyarrow", "rapidocr", "simplejpeg")

if __name__ == "__main__":
  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if missing:
    text = f'curation needs the packages {", ".join(missing)}: pip install "mgen_jax[curate]".'
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
  from absl import flags

  from data_pipelines.curate import command
  from mgen_jax import cli

  command.define_flags()
  flags.adopt_module_key_flags(command)  # --help lists those of this file
  cli.run(command.main)
