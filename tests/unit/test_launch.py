"""The launch scripts start the right commands and refuse invalid input."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypermoe_ds.cluster.hosts import read_hostfile
from tests.helpers.launch_scripts import LAUNCH, REPOSITORY, SYSTEM, TRAIN, ZERO1, commands, launch, stub

PREFLIGHT = f"{REPOSITORY}/tools/preflight.py"
SSH = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
WITH_HOSTFILE = ("pdsh.sh", "openmpi.sh")
EVERY = (*WITH_HOSTFILE, "torchrun.sh", "slurm.sbatch", "local.sh")
TWO = "# two hosts\nnode1 slots=8\n\nnode2   slots=4  # half\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hostfile").write_text(TWO)
    stub(tmp_path / "venv/bin/python", "exit 0")
    return tmp_path


def variables(words: list[str]) -> dict[str, str]:
    """Return the variables that the `-x` options set."""
    pairs = [words[number + 1] for number, word in enumerate(words) if word == "-x"]
    return dict(pair.split("=", maxsplit=1) for pair in pairs)


def without_variables(words: list[str]) -> list[str]:
    """Return the words without the `-x NAME=VALUE` options."""
    values_at = {number + 1 for number, word in enumerate(words) if word == "-x"}
    return [word for number, word in enumerate(words) if word != "-x" and number not in values_at]


@pytest.mark.parametrize(
    ("arguments", "environment", "options", "train"),
    [
        (["--config", "r.yaml"], {}, ["--master_port", "29500"], [*ZERO1, "--config", "r.yaml"]),
        (["--config=r.yaml", "a.b=c d"], {"MASTER_ADDR": "ib1", "MASTER_PORT": "3"},
         ["--master_addr", "ib1", "--master_port", "3"], [*ZERO1, "--config=r.yaml", "a.b=c d"]),
        (["--config", "r.yaml", "--deepspeed_config=z.json"], {}, ["--master_port", "29500"],
         ["--config", "r.yaml", "--deepspeed_config=z.json"]),
    ],
)  # fmt: skip
def test_pdsh_runs_the_preflight_and_then_the_deepspeed_launcher(
    folder: Path, arguments: list[str], environment: dict[str, str], options: list[str], train: list[str]
) -> None:
    check, start = commands("pdsh.sh", *arguments, folder=folder, **environment)
    [file] = [word.removeprefix("DS_ENV_FILE=") for word in start if word.startswith("DS_ENV_FILE=")]
    assert check == ["python", PREFLIGHT, "--hostfile", "hostfile", "--environment", file.removesuffix(".pdsh"), *train]
    assert start == [
        "env", f"DS_ENV_FILE={file}", f"PDSH_SSH_ARGS_APPEND={SSH}",
        "deepspeed", "--log_level", "critical",
        "--force_multi", "--hostfile", "hostfile", "--launcher", "pdsh", *options, TRAIN, *train,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("hostfile", "ranks"),
    [("one slots=1\n", "1"), (TWO, "12"), ("# c slots=9\na slots=2\nb slots=3", "5")],
)
def test_mpirun_starts_a_rank_for_each_slot(folder: Path, hostfile: str, ranks: str) -> None:
    (folder / "hosts").write_text(hostfile)
    preflight, start = commands("openmpi.sh", "--hostfile", "hosts", "--config", "r.yaml", folder=folder)
    assert without_variables(start) == [
        "mpirun", "-n", ranks, "--hostfile", "hosts", "--bind-to", "none",
        "--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "plm_rsh_args", SSH,
        "python", "-u", TRAIN, *ZERO1, "--config", "r.yaml",
    ]  # fmt: skip
    assert preflight[:4] == ["python", PREFLIGHT, "--hostfile", "hosts"]
    assert sum(host.slots for host in read_hostfile(folder / "hosts")) == int(ranks)


FORWARDED = {
    "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "HYPERMOE_LOG_LEVEL": "INFO", "OMP_NUM_THREADS": "4",
    "DS_ACCELERATOR": "cpu", "PYTHONPATH": "/a b", "LD_LIBRARY_PATH": "/lib",
}  # fmt: skip


def test_only_the_listed_variables_are_forwarded(folder: Path) -> None:
    (folder / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nOWN=value=1\n")
    (folder / "home").mkdir()
    (folder / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=TRACE\nHOME_TOO=1")
    environment = {
        **FORWARDED,
        "HOME": str(folder / "home"),
        "SECRET_TOKEN": "x",
        "NCCL_EMPTY": "",
        "LANG": "C",
        "MY_NCCL_X": "1",
    }
    expected = {
        **FORWARDED,
        "NCCL_DEBUG": "WARN",
        "OWN": "value=1",
        "HOME_TOO": "1",
        "PATH": f"{folder}/venv/bin:{SYSTEM}",
        "MASTER_PORT": "29500",
    }
    expected |= {"HYPERMOE_SSH_OPTIONS": SSH, "HYPERMOE_VENV": str(folder / "venv")}
    [start] = commands("openmpi.sh", "--no-preflight", "--config", "r.yaml", folder=folder, **environment)
    assert variables(start) == expected
    done = launch("pdsh.sh", "--dry-run", "--config", "r.yaml", folder=folder, **environment)
    lines = [line.split(": ", maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("# ")]
    assert dict(line.split("=", maxsplit=1) for line in lines) == expected


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, "--nnodes 1 --node_rank 0 --nproc_per_node gpu --master_addr 127.0.0.1 --master_port 29500"),
        ({"NPROC_PER_NODE": "2", "MASTER_PORT": "7"},
         "--nnodes 1 --node_rank 0 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 7"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
         "--nnodes 2 --node_rank 1 --nproc_per_node gpu --master_addr a --master_port 29500"),
        ({"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "m",
          "PET_MASTER_PORT": "23456", "MASTER_ADDR": "m", "MASTER_PORT": "23456", "RANK": "2", "WORLD_SIZE": "24"},
         "--nnodes 3 --node_rank 2 --nproc_per_node 8 --master_addr m --master_port 23456"),
    ],
)  # fmt: skip
def test_torchrun_starts_the_ranks_of_this_host(folder: Path, environment: dict[str, str], options: str) -> None:
    preflight, start = commands("torchrun.sh", "--config", "r.yaml", folder=folder, **environment)
    assert start == ["torchrun", *options.split(), "--log_dir", "/dev/null", TRAIN, *ZERO1, "--config", "r.yaml"]
    assert preflight[:3] == ["python", PREFLIGHT, "--slots"]


@pytest.mark.parametrize("script", EVERY)
def test_help_prints_the_usage_and_a_missing_recipe_is_reported(folder: Path, script: str) -> None:
    usage = launch(script, "--help", folder=folder)
    assert usage.stdout.startswith("usage: ")
    assert "--dry-run" in usage.stdout
    assert ("--hostfile" in usage.stdout) == (script in WITH_HOSTFILE)
    assert usage.returncode == 0
    assert launch(script, "-h", folder=folder).stdout == usage.stdout
    bare = launch(script, "--dry-run", folder=folder)
    assert bare.stderr == f"{script}: --config: is missing; give a recipe, such as one of pretrain/recipes\n"
    assert bare.returncode == 2


BAD_LINES = ["node1", "node1 slots=0", "node1 slots=two", "node1:8", "node1 slots=8 gpus"]
BAD_LINES += [f"{name} slots=1" for name in ("-oProxyCommand=id", "--x", "^f", "/n/", "n[1-2]", "a,b", "$(id)", "`id`")]


@pytest.mark.parametrize("script", WITH_HOSTFILE)
@pytest.mark.parametrize("line", BAD_LINES)
def test_an_invalid_line_in_a_hostfile_is_reported(folder: Path, script: str, line: str) -> None:
    (folder / "hostfile").write_text(f"node0 slots=8\n{line}\n")
    done = launch(script, "--dry-run", "--config", "r.yaml", folder=folder)
    assert done.stderr == f"{script}: hostfile:2: '{line}' is not a host; write NAME slots=N\n"
    assert done.returncode == 2


@pytest.mark.parametrize("script", EVERY)
def test_a_dry_run_reports_an_error_in_the_recipe(folder: Path, script: str) -> None:
    (folder / "r.yaml").write_text("modle: {}\n")
    environment = {"HYPERMOE_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY)}
    done = launch(script, "--dry-run", "--config", "r.yaml", folder=folder, **environment)
    assert done.stderr == "error: r.yaml: modle: unknown key; did you mean 'model'?\n"
    assert done.returncode == 2
    assert [line for line in done.stdout.splitlines() if not line.startswith("# ")] == []


def test_a_dry_run_reports_a_batch_size_that_the_ranks_do_not_divide(folder: Path) -> None:
    words = ["--config", f"{REPOSITORY}/pretrain/recipes/quickstart.yaml", "train.global_batch_size=8"]
    environment = {"HYPERMOE_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    done = launch("openmpi.sh", "--dry-run", *words, folder=folder, **environment)
    assert done.returncode == 2
    assert "multiplied by 12 ranks, it does not divide train.global_batch_size=8" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", EVERY)
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("MASTER_ADDR", "-x", "not a host"),
        ("MASTER_ADDR", "$(id)", "not a host"),
        ("MASTER_PORT", "$(id)", "not a number"),
    ],
)
def test_an_invalid_rendezvous_address_is_refused(
    folder: Path, script: str, name: str, value: str, problem: str
) -> None:
    done = launch(script, "--dry-run", "--config", "r.yaml", folder=folder, **{name: value})
    assert (done.returncode, done.stderr[: done.stderr.index(";")]) == (2, f"{script}: {name}={value}: is {problem}")


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("pdsh.sh", {"HYPERMOE_HOSTFILE": "none"}, "none: no such hostfile; copy launch/hostfile.example"),
        ("pdsh.sh", {"NCCL_X": "1\n2"}, "NCCL_X: has more than one line and cannot be forwarded to other hosts"),
        (
            "pdsh.sh",
            {"DS_ENV_FILE": "hostfile"},
            "hostfile: '# two hosts' is not a variable; write one NAME=VALUE per line",
        ),
        ("pdsh.sh", {"HYPERMOE_VENV": "a b"}, "'a b': cannot be passed to other hosts; use a path of letters"),
        ("torchrun.sh", {"NNODES": "2"}, "NNODES=2: MASTER_ADDR is not set; set it to the host of NODE_RANK=0"),
    ],
)
def test_an_invalid_launch_environment_is_reported_in_one_line(
    folder: Path, script: str, environment: dict[str, str], message: str
) -> None:
    (folder / "a b").symlink_to("venv")
    done = launch(script, "--dry-run", "--config", "r.yaml", folder=folder, **environment)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{script}: {message}")
    assert done.returncode == 2


SLOTS = "the slots in the hostfile"
TORCHRUN = "NNODES and NPROC_PER_NODE"
SBATCH = "sbatch: --nodes, --ntasks-per-node and --gpus-per-node"


@pytest.mark.parametrize(
    ("script", "option", "remedy"),
    [
        *((script, "--bogus", "see --help") for script in EVERY),
        ("pdsh.sh", "--hostfiles", "see --help"),
        ("pdsh.sh", "--num_gpus", f"hosts and ranks are set by {SLOTS}"),
        ("openmpi.sh", "--num_gpus=2", f"hosts and ranks are set by {SLOTS}"),
        ("torchrun.sh", "--num_nodes", f"hosts and ranks are set by {TORCHRUN}"),
        ("torchrun.sh", "--hostfile", f"hosts and ranks are set by {TORCHRUN}"),
        ("local.sh", "--no-preflight", "see --help"),
        ("local.sh", "--num_nodes", "hosts and ranks are set by --num_gpus"),
        ("local.sh", "--hostfile", "hosts and ranks are set by --num_gpus"),
        ("slurm.sbatch", "--hostfile=h", f"hosts and ranks are set by {SBATCH}"),
    ],
)
def test_an_unknown_option_is_reported_before_anything_starts(
    folder: Path, script: str, option: str, remedy: str
) -> None:
    done = launch(script, "--config", "my.yaml", option, "2", folder=folder)
    assert (done.stdout, done.stderr) == ("", f"{script}: {option}: is not an option; {remedy}\n")
    assert done.returncode == 2


@pytest.mark.parametrize("option", ["--hostfile", "--config", "--deepspeed_config"])
def test_an_option_without_its_path_is_reported(folder: Path, option: str) -> None:
    done = launch("pdsh.sh", "--dry-run", option, folder=folder)
    assert (done.returncode, done.stderr) == (2, f"pdsh.sh: {option}: no file is given; add its path\n")


def test_a_virtual_environment_without_python_is_refused(folder: Path) -> None:
    done = launch("pdsh.sh", "--dry-run", "--config", "r.yaml", folder=folder, HYPERMOE_VENV="/nowhere")
    remedy = "set it to the environment that launch/setup.sh created, or unset it"
    assert done.stderr == f"pdsh.sh: HYPERMOE_VENV=/nowhere: has no bin/python; {remedy}\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("path", ["{venv}:/usr/bin:/bin", "/usr/bin:{venv}:/bin", "/usr/bin:/bin:{venv}"])
def test_the_forwarded_path_has_the_virtual_environment_once_and_first(folder: Path, path: str) -> None:
    venv = f"{folder}/venv/bin"
    done = launch("openmpi.sh", "--dry-run", "--config", "r.yaml", folder=folder, path=path.format(venv=venv))
    assert f": PATH={venv}:/usr/bin:/bin\n" in done.stdout


@pytest.mark.parametrize(("extra", "problem"), [({}, "not set"), ({"NPROC_PER_NODE": "gpu"}, "gpu")])
def test_torchrun_without_a_gpu_asks_for_the_number_of_ranks_before_anything_starts(
    folder: Path, extra: dict[str, str], problem: str
) -> None:
    environment = {"HYPERMOE_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", **extra}
    done = launch("torchrun.sh", "--config", "r.yaml", folder=folder, **environment)
    message = f"NPROC_PER_NODE: is {problem} and this host has no GPU; set it to the number of ranks on this host"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"torchrun.sh: {message}\n")


def test_torchrun_starts_a_rank_for_each_gpu(folder: Path) -> None:
    stub(folder / "venv/bin/torchrun", 'echo "$*" > started')
    # The stub for python exits with 0, as if it had found a GPU.
    done = launch("torchrun.sh", "--config", "r.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node gpu" in (folder / "started").read_text()


def test_a_failed_preflight_prevents_the_launch(folder: Path) -> None:
    for name in ("python", "deepspeed", "pdsh", "ssh"):
        stub(folder / "venv/bin" / name, f'echo "{name} $1" >> calls; exit 2')
    done = launch("pdsh.sh", "--config", "r.yaml", folder=folder)
    assert done.returncode == 2
    assert (folder / "calls").read_text() == f"python {PREFLIGHT}\n"


def test_the_example_hostfile_is_valid() -> None:
    assert [(host.name, host.slots) for host in read_hostfile(LAUNCH / "hostfile.example")] == [
        ("node1", 8),
        ("node2", 8),
    ]


# Slurm


JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]"}


def test_slurm_starts_a_task_for_each_gpu(folder: Path) -> None:
    stub(folder / "bin" / "scontrol", 'echo "$*" > asked; printf "n1\\nn2\\n"')
    arguments, path = ["--dry-run", "--config", "r.yaml"], f"{folder}/bin:{SYSTEM}"
    done = launch("slurm.sbatch", *arguments, folder=folder, path=path, HYPERMOE_REPOSITORY=str(REPOSITORY), **JOB)
    preflight, start = [shlex.split(line[1:]) for line in done.stdout.splitlines()]
    train = [*ZERO1, "--config", "r.yaml"]
    assert preflight == ["python", PREFLIGHT, "--slurm", *train]
    assert start == ["srun", "--mpi=none", "--kill-on-bad-exit=1", "--export=ALL", "python", "-u", TRAIN, *train]
    assert (folder / "asked").read_text() == "show hostnames n[1-2]\n"


def slurm_job(folder: Path, ranks: str, code: int = 75) -> tuple[subprocess.Popen[str], Path]:
    """Start slurm.sbatch as Slurm would, with a stub for srun, and wait until the stub runs.

    Args:
        folder: working directory.
        ranks: bash commands that the stub runs in place of the ranks.
        code: exit code of the stub after SIGUSR1.

    Returns:
        The process, and the path of the file that records each call of `scontrol` and each save.
    """
    stub(folder / "bin" / "scontrol", 'if [ "$1" = show ]; then echo n1; else echo "$*" >> calls; fi')
    stub(
        folder / "bin" / "srun", f'trap "echo saved >> calls; exit $CODE" USR1; echo $MASTER_ADDR $MASTER_PORT; {ranks}'
    )
    environment = {**JOB, "PATH": f"{folder}/bin:{SYSTEM}", "SLURM_SUBMIT_DIR": str(REPOSITORY), "HOME": str(folder)}
    environment["CODE"] = str(code)
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "--no-preflight", "--config", "r.yaml"],
        env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline()).startswith("+"):
        pass
    assert line == f"n1 {20000 + 123}\n"
    return process, folder / "calls"


def test_a_slurm_job_saves_and_is_requeued_before_its_time_limit(folder: Path) -> None:
    process, calls = slurm_job(folder, "for i in {1..600}; do sleep 0.1; done")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert calls.read_text() == "saved\nrequeue 123\n"
    assert process.returncode == 0


def test_a_slurm_job_whose_run_is_complete_is_not_requeued(folder: Path) -> None:
    process, calls = slurm_job(folder, "for i in {1..600}; do sleep 0.1; done", code=0)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert calls.read_text() == "saved\n"
    assert process.returncode == 0


@pytest.mark.parametrize("code", [0, 3])
def test_a_slurm_job_that_ends_early_is_not_requeued(folder: Path, code: int) -> None:
    process, calls = slurm_job(folder, f"exit {code}")
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not calls.exists()


# Kubernetes

# Fields that the manifests may use, from PyTorchJob v1 (training-operator 1.9) and MPIJob v2beta1 (mpi-operator 0.8).
# A schema is a type, a set of allowed values, a list with the schema of its items, or a mapping from keys to schemas.
# The key "*" matches any key.

CONTAINER = {
    "name": str, "image": str, "command": [str], "args": [str], "env": [{"name": str, "value": str}],
    "resources": {"limits": {"*": (int, str)}}, "volumeMounts": [{"name": str, "mountPath": str}],
}  # fmt: skip
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str},
    "emptyDir": {"medium": {"Memory", ""}, "sizeLimit": str},
}
POD = {
    "terminationGracePeriodSeconds": int,
    "securityContext": {"fsGroup": int},
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": {"spec": POD},
}
RUN_POLICY = {
    "cleanPodPolicy": {"All", "Running", "None"},
    "backoffLimit": int,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
}
SCHEMAS: dict[str, Any] = {
    "pytorchjob.yaml": {
        "apiVersion": {"kubeflow.org/v1"}, "kind": {"PyTorchJob"}, "metadata": {"name": str},
        "spec": {
            "nprocPerNode": str, "runPolicy": RUN_POLICY,
            "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
        },
    },
    "mpijob.yaml": {
        "apiVersion": {"kubeflow.org/v2beta1"}, "kind": {"MPIJob"}, "metadata": {"name": str},
        "spec": {
            "slotsPerWorker": int, "mpiImplementation": {"OpenMPI", "Intel", "MPICH"}, "sshAuthMountPath": str,
            "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"}, "runPolicy": RUN_POLICY,
            "mpiReplicaSpecs": {"Launcher": REPLICAS, "Worker": REPLICAS},
        },
    },
}  # fmt: skip


def mismatches(value: Any, schema: Any, where: str = "") -> list[str]:
    """Return the paths of the values in a manifest that do not match the schema."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{where}: {value!r}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [found for n, item in enumerate(value) for found in mismatches(item, schema[0], f"{where}[{n}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        unknown = [f"{where}.{key}: unknown" for key in value if key not in schema and "*" not in schema]
        known = [(key, schema.get(key, schema.get("*"))) for key in value if key in schema or "*" in schema]
        return unknown + [found for key, form in known for found in mismatches(value[key], form, f"{where}.{key}")]
    return [] if isinstance(value, schema) else [f"{where}: {value!r}"]


def manifest(name: str) -> Any:
    return yaml.safe_load((LAUNCH / "k8s" / name).read_text())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_manifest_uses_only_fields_that_its_operator_knows(name: str) -> None:
    assert mismatches(manifest(name), SCHEMAS[name]) == []


def test_an_unknown_field_and_a_wrong_type_in_a_manifest_are_found() -> None:
    wrong = manifest("pytorchjob.yaml")
    wrong["spec"]["nprocPerNode"] = 8
    wrong["spec"]["slots"] = 8
    assert mismatches(wrong, SCHEMAS["pytorchjob.yaml"]) == [".spec.slots: unknown", ".spec.nprocPerNode: 8"]


@pytest.mark.parametrize(
    ("name", "replicas", "launcher", "slots"),
    [
        ("pytorchjob.yaml", "pytorchReplicaSpecs", "Master", "nprocPerNode"),
        ("mpijob.yaml", "mpiReplicaSpecs", "Launcher", "slotsPerWorker"),
    ],
)
def test_a_manifest_starts_a_launch_script_with_a_rank_for_each_gpu(
    folder: Path, name: str, replicas: str, launcher: str, slots: str
) -> None:
    spec = manifest(name)["spec"]
    pods = {kind: part["template"]["spec"] for kind, part in spec[replicas].items()}
    [container] = pods[launcher]["containers"]
    assert container["command"][0] == "bash"
    script = Path(container["command"][1])
    environment = {item["name"]: item["value"] for item in container["env"]}
    arguments = [word.replace("/etc/mpi/", "") for word in container["args"]]
    start = commands(script.name, *arguments, folder=folder, **environment)[-1]
    assert start[-3:] == [
        "--config=/data/my.yaml",
        "--deepspeed_config=ds_configs/zero1.json",
        "run.dir=/data/runs/first",
    ]
    [worker] = pods["Worker"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == int(spec[slots])
    for pod in pods.values():
        mounted = {mount["name"] for part in pod["containers"] for mount in part["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in [mount["mountPath"] for mount in worker["volumeMounts"]]
    assert os.access(REPOSITORY / script, os.X_OK)
