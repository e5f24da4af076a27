# The program and what it needs, for clusters: launch/README.md says how to build and start it.
#   docker build -t mgen_jax --build-arg EXTRA=cuda .      NVIDIA GPUs (CUDA comes with JAX's packages)
#   docker build -t mgen_jax --build-arg EXTRA=tpu .       TPUs
#   docker build -t mgen_jax --build-arg EXTRA=ui .        neither: a CPU
FROM python:3.12-slim

ARG EXTRA=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /mgen_jax

# First what changes rarely: the layer of the dependencies is kept while only code changes.
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY constraints constraints
RUN mkdir mgen_jax && touch mgen_jax/__init__.py && \
    pip install -e ".[$EXTRA]" -c constraints/py312.txt

COPY mgen_jax mgen_jax
COPY data_pipelines data_pipelines
COPY experiments experiments
COPY launch launch

# Not root: a run writes to --workdir only, and what is mounted there should be its user's.
RUN useradd --create-home --uid 1000 mgen
USER mgen

# PID 1 is launch/run.sh, which hands SIGTERM on, so that a pod that is taken away saves first.
ENTRYPOINT ["launch/run.sh"]
CMD ["--config=experiments/quickstart.py", "--workdir=/tmp/quickstart"]
