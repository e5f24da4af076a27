"""The launchers: clean by shellcheck, what they would run, what they do after each exit code."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mgen_jax import distributed
from tests.launch import slurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/**/*.sh"))
FLAGS = ["--config=experiments/t2v_1b.py", "--workdir=/shared/runs/a b", '--note=say "hi" \\ & go']


def shell(*command, **environment):
  return subprocess.run(
    command,
    env={**os.environ, **environment},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
  beside = Path(sys.executable).parent / "shellcheck"
  checker = str(beside) if beside.exists() else shutil.which("shellcheck")
  check = [checker, "-x", "-P", "."] if checker else ["bash", "-n"]
  done = shell(*check, script)
  assert done.returncode == 0, done.stdout + done.stderr


LAUNCHERS = [s for s in SCRIPTS if not s.endswith(("common.sh", "xla_flags.sh"))]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_what_the_first_lines_say(script):
  done = shell(script, "--help")
  assert done.returncode == 0, done.stderr
  first, *lines = done.stdout.splitlines()
  assert first.endswith(":") and script in done.stdout  # what it does, and then a command
  assert "SBATCH" not in done.stdout and not any(line.startswith("#") for line in lines)
  assert len(lines) > 3


def test_a_dry_run_prints_the_command_as_one_could_type_it():
  done = shell("launch/run.sh", "--dry-run", *FLAGS, PLATFORM="gpu", PYTHON="python3.11")
  assert done.returncode == 0, done.stderr
  *settings, command = done.stdout.splitlines()
  assert shlex.split(command) == ["python3.11", "-m", "mgen_jax.main", *FLAGS]
  assert "--xla_gpu_enable_latency_hiding_scheduler=true" in settings[0]


def test_ones_own_flags_come_after_those_of_the_launcher_and_so_win():
  mine = "--xla_gpu_enable_triton_gemm=true"
  done = shell("launch/run.sh", "--dry-run", *FLAGS, PLATFORM="gpu", XLA_FLAGS=mine)
  (flags,) = (line for line in done.stdout.splitlines() if line.startswith("XLA_FLAGS="))
  assert flags.rindex(mine) > flags.index("--xla_gpu_enable_triton_gemm=false")


def test_xla_knows_the_flags():
  """It aborts on one that it does not know; those of GPUs are known to every build."""
  program = ". launch/xla_flags.sh gpu && exec $PYTHON -c 'import jax; print(jax.devices())'"
  done = shell("bash", "-c", program, PYTHON=sys.executable)
  assert done.returncode == 0 and "Cpu" in done.stdout, done.stderr


def test_every_setting_is_explained():
  lines = (ROOT / "launch/xla_flags.sh").read_text().splitlines()
  for number, line in enumerate(lines):
    if re.match(r"\s+--xla", line):
      before = lines[number - 1].strip()
      assert before.startswith(("#", "--xla")), line


def test_slurm_runs_one_process_a_node():
  done = shell("launch/slurm.sh", "--dry-run", *FLAGS, PYTHON="python3")
  assert done.returncode == 0, done.stderr
  command = shlex.split(done.stdout.splitlines()[-1])
  assert command[:2] == ["srun", "--kill-on-bad-exit=1"]
  assert command[-len(FLAGS) - 4 :] == ["python3", "-m", "mgen_jax.main", "--cluster=slurm", *FLAGS]


def test_a_container_on_slurm():
  done = shell("launch/slurm.sh", "--dry-run", *FLAGS, CONTAINER="image.sqsh")
  assert "--container-image=image.sqsh" in shlex.split(done.stdout.splitlines()[-1])


def fake_python(tmp_path, *codes):
  """A "python" that exits with one code after another, and counts."""
  path = tmp_path / "python"
  path.write_text(
    "#!/usr/bin/env bash\n"
    f"echo x >> '{tmp_path}/starts'\n"
    f"codes=({' '.join(map(str, codes))})\n"
    f"exit ${{codes[$(wc -l < '{tmp_path}/starts') - 1]}}\n"
  )
  path.chmod(0o755)
  return str(path)


def starts(tmp_path):
  return (tmp_path / "starts").read_text().count("x")


@pytest.mark.parametrize(
  ("codes", "last", "times"),
  [
    ((0,), 0, 1),
    ((143, 75, 137, 0), 0, 4),  # preempted, alone, killed: each goes on
    ((134, 2), 2, 2),  # a fault that the user can fix
    ((1,), 1, 1),  # a bug
    ((130,), 130, 1),  # Ctrl-C
  ],
)
def test_what_is_started_again(tmp_path, codes, last, times):
  python = fake_python(tmp_path, *codes)
  done = shell(
    *("launch/run.sh", *FLAGS), PYTHON=python, PLATFORM="cpu", RESTART_DELAY="0", QUICK_SECONDS="0"
  )
  assert done.returncode == last and starts(tmp_path) == times
  assert done.stderr.count("start number") == times - 1  # none of them is silent


def test_what_fails_at_once_three_times_is_given_up(tmp_path):
  python = fake_python(tmp_path, *[134] * 9)
  done = shell("launch/run.sh", *FLAGS, PYTHON=python, PLATFORM="cpu", RESTART_DELAY="0")
  assert done.returncode == 134 and starts(tmp_path) == 3
  assert "giving up" in done.stderr


def test_a_signal_is_handed_on_and_nothing_is_started_again(tmp_path):
  python = tmp_path / "python"
  python.write_text(
    "#!/usr/bin/env bash\n"
    f"trap 'echo saved >> {tmp_path}/log; exit 143' TERM\n"
    f"echo began >> {tmp_path}/log\n"
    "while :; do sleep 0.05; done\n"
  )
  python.chmod(0o755)
  process = subprocess.Popen(
    ["launch/run.sh", *FLAGS],
    env={**os.environ, "PYTHON": str(python), "PLATFORM": "cpu", "RESTART_DELAY": "0"},
    cwd=ROOT,
    stderr=subprocess.DEVNULL,
  )
  log = tmp_path / "log"
  while not log.exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 143
  assert log.read_text().split() == ["began", "saved"]


@pytest.mark.parametrize(
  ("codes", "last", "requeued"), [((75, 0), 0, ""), ((143,), 0, "requeue 7")]
)
def test_a_slurm_job_that_was_asked_to_stop_goes_back_in_the_queue(tmp_path, codes, last, requeued):
  environment = slurm.install(tmp_path, tasks=1, job=7)
  environment |= {"PYTHON": fake_python(tmp_path, *codes), "RESTART_DELAY": "0"}
  done = shell("launch/slurm.sh", *FLAGS, **environment)
  assert done.returncode == last, done.stderr
  log = tmp_path / "scontrol.log"
  assert (log.read_text().strip() if log.exists() else "") == requeued


def manifest(*command, **environment):
  done = shell("launch/gke/submit.sh", "--dry-run", *command, **environment)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


JOB = {"IMAGE": "registry.example/mgen_jax:1", "NODES": "4", "CLAIM": "films"}
SLICE = {"ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4", "CHIPS": "4", "SLICES": "2"}


def test_the_pods_of_a_jobset_find_each_other():
  job = manifest("gpu", "run-1", *FLAGS, **JOB)
  (worker,) = job["spec"]["replicatedJobs"]
  spec = worker["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  (container,) = spec["template"]["spec"]["containers"]
  assert container["args"] == FLAGS
  given = {entry["name"]: entry["value"] for entry in container["env"]}
  found = distributed.choose({**given, "JOB_COMPLETION_INDEX": "3"})
  assert found == distributed.Cluster("jobset", "run-1-worker-0-0.run-1:8476", 4, 3)


def test_slices_of_tpus():
  job = manifest("tpu", "run-1", *FLAGS, **JOB, **SLICE)
  (slices,) = job["spec"]["replicatedJobs"]
  assert slices["replicas"] == 2
  pod = slices["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["containers"][0]["args"] == ["--cluster=tpu", *FLAGS]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_pod_leaves_restarts_to_the_jobset_and_a_users_fault_ends_it(platform):
  job = manifest(platform, "run-1", *FLAGS, **JOB, **SLICE)
  assert job["spec"]["failurePolicy"]["maxRestarts"] == 50
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and 2 in rule["onExitCodes"]["values"]
  assert not {75, 134, 137, 143} & set(rule["onExitCodes"]["values"])
  env = spec["template"]["spec"]["containers"][0]["env"]
  assert {"name": "RESTART_CODES", "value": ""} in env


def test_restarts_can_be_left_to_others(tmp_path):
  python = fake_python(tmp_path, 143, 0)
  done = shell("launch/run.sh", *FLAGS, PYTHON=python, PLATFORM="cpu", RESTART_CODES="")
  assert done.returncode == 143 and starts(tmp_path) == 1


def test_tpu_vms():
  where = {"TPU": "slice", "ZONE": "us-east5-a", "PROJECT": "films"}
  done = shell("launch/tpu_vm.sh", "--dry-run", "run", *FLAGS, **where)
  command = shlex.split(done.stdout)
  assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-east5-a"]
  assert "--worker=all" in command and "--project=films" in command
  (remote,) = (word for word in command if word.startswith("--command="))
  run = remote.split("launch/run.sh ")[1].split(">>")[0]
  assert shlex.split(run) == ["--cluster=tpu", *FLAGS]
  for what in ("setup", "stop"):
    assert shell("launch/tpu_vm.sh", "--dry-run", what, **where).returncode == 0


def test_xpk():
  where = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "TPU_TYPE": "v5p-512", "IMAGE": "i:1"}
  done = shell("launch/xpk.sh", "--dry-run", "films", *FLAGS, **where, SLICES="2")
  command = shlex.split(done.stdout)
  assert command[:4] == ["xpk", "workload", "create", "--workload=films"]
  assert {"--tpu-type=v5p-512", "--num-slices=2", "--max-restarts=50"} <= set(command)
  assert shlex.split(command[-1])[-len(FLAGS) :] == FLAGS


@pytest.mark.parametrize(
  ("command", "words"),
  [
    (["launch/run.sh"], "name an experiment"),
    (["launch/slurm.sh", *FLAGS], "there is no allocation"),
    (["launch/tpu_vm.sh", "run"], "TPU is not set"),
    (["launch/xpk.sh", "a", *FLAGS], "CLUSTER is not set"),
    (["launch/gke/submit.sh", "npu", "a"], "'npu' is not gpu or tpu"),
    (["launch/gke/submit.sh", "gpu", "A_b", *FLAGS], "'A_b' is no name"),
    (["launch/gke/submit.sh", "gpu", "a", *FLAGS], "IMAGE is not set"),
  ],
)
def test_what_is_missing_is_one_sentence(command, words):
  done = shell(*command)
  assert done.returncode == 2 and words in done.stderr
  assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_the_container_has_what_its_file_copies():
  lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
  copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
  kept = (ROOT / ".dockerignore").read_text().splitlines()
  for name in copied:
    assert (ROOT / name).exists() and f"!{name}" in kept, name
  assert [line.split()[1] for line in lines if line.startswith("FROM ")] == ["python:3.12-slim"]
  (entry,) = (line for line in lines if line.startswith("ENTRYPOINT "))
  assert os.access(ROOT / "launch" / "run.sh", os.X_OK) and '"launch/run.sh"' in entry
