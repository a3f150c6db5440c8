"""Slurm scripts and KubeRay manifests: schema, options, commands, and what the scripts do."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlmed.core.config.composing import compose_config, unused_overrides
from rlmed.core.config.overrides import expand
from tests.root import ROOT

CLUSTER = ROOT / "examples" / "cluster"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
SBATCH = """
account array begin chdir clusters comment constraint contiguous cpus-per-gpu cpus-per-task deadline dependency error
exclude exclusive export gpus gpus-per-node gpus-per-task gres hint job-name kill-on-invalid-dep licenses mail-type
mail-user mem mem-per-cpu mem-per-gpu no-kill no-requeue nodelist nodes ntasks ntasks-per-gpu ntasks-per-node open-mode
output oversubscribe partition qos requeue reservation signal time wait-all-nodes
"""
"""Options that sbatch's manual has (Slurm 22.05), less those that a script should not set."""


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def schema() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the extra ray")
    text = Path(__file__).with_name("kuberay.schema.yaml").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(yaml.safe_load(text))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_one_of_kuberays(path: Path, schema: Any) -> None:
    schema.check_schema(schema.schema)
    assert [error.message for error in schema.iter_errors(read(path.name))] == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),  # Ray's parameters are strings
        (("spec", "workerGroupSpecs", 0, "replicas"), "2"),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 2),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "persistentVolumeClaim", "claim"), "disk"),
        (("metadata", "name"), "RLMed"),
    ],
)
def test_the_schema_refuses(place: tuple[str | int, ...], value: object, schema: Any) -> None:
    manifest: Any = read("raycluster.yaml")
    at = manifest
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert not schema.is_valid(manifest)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_holds_together(path: Path) -> None:
    """What the operator and Kubernetes check beyond the schema."""
    manifest = read(path.name)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)  # older Rays have no tokens
    pinned = re.search(r"^ray==(.*)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert spec["rayVersion"] == pinned[1]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        # a claimed disk belongs to root, unless the group of the image's user is named
        assert f"USER {pod['securityContext']['fsGroup']}\n" in DOCKERFILE
        for container in pod["containers"]:
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= {
                volume["name"] for volume in pod["volumes"]
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
            # driver, ranks and workers find the run folder, model and data at one path
            assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (image,) = images
    assert re.search(r":[\w.-]+$", image)
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )
    cluster = compose_config("train", ["cluster=ray_multinode"]).cluster
    assert gpus == cluster.rollout_workers + cluster.learner_ranks


def launches(path: Path) -> list[list[str]]:
    """Arguments of each `rlmed.launch` that a file names, comments included."""
    text = re.sub(r"\\\n#?\s*", " ", path.read_text(encoding="utf-8"))
    if path.suffix == ".yaml":
        entry = read(path.name)["spec"].get("entrypoint")
        found = [entry] if entry else re.findall(r"python -m rlmed\.launch .*", text)
        return [shlex.split(command)[3:] for command in found]
    preset = re.search(r"rlmed\.launch (cluster=\w+)", text)
    assert preset
    return [[preset[1], *shlex.split(line)] for line in re.findall(rf"sbatch examples/cluster/{path.name} (.*)", text)]


@pytest.mark.parametrize("path", [*MANIFESTS, *SCRIPTS], ids=lambda path: path.name)
def test_commands_compose(path: Path) -> None:
    found = launches(path)
    assert found
    for arguments in found:
        overrides = [word for word in expand(arguments, cuda=True) if not word.startswith("hydra.")]
        compose_config("train", overrides)
        assert [refusal.text for refusal in unused_overrides("train", overrides)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_its_options_are_sbatchs(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--nodes", "--time", "--requeue"} <= {option.partition("=")[0] for option in options}
    assert {option.partition("=")[0].removeprefix("--") for option in options} <= {*SBATCH.split()}
    # sbatch reads no further than the first command
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[command:] if line.startswith("#SBATCH")]


PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo "srun $*" >> "$LOG"; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"; printf "%s\\n" n1 n2',
    "hostname": 'case $1 in --ip-address) echo "$NAMED" ;; *) echo "$OTHER" ;; esac',
    "python": """\
case "$*" in
    -c*) echo 5ec4e7 ;;
    *health-check*) ;;
    *"start --head"*) echo "head $RAY_AUTH_TOKEN" >> "$LOG"; exec sleep ${HEAD_S:-60} ;;
    *start*) exec sleep 60 ;;
    *rlmed.launch*)
        echo "launch $*" >> "$LOG"
        [[ -z ${RUN_S:-} ]] || exec sleep "$RUN_S"
        statuses=($STATUSES)
        exit ${statuses[$(grep -c ^launch "$LOG") - 1]} ;;
esac""",
}
"""Stand-ins for Slurm's commands and for Python, which write down what they are asked."""


def run_script(folder: Path, name: str, statuses: str, **more: str) -> tuple[int, str, list[str]]:
    """Status of a script whose launches end with `statuses`, its stderr, and what it called."""
    programs, log = folder / "bin", folder / "log"
    programs.mkdir()
    for program, text in PROGRAMS.items():
        (programs / program).write_text(f"#!/bin/bash\n{text}\n")
        (programs / program).chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        **{"LOG": str(log), "STATUSES": statuses, "RUN": "/shared/run", "SLURM_JOB_ID": "17", "NAMED": "10.0.0.7"},
        **{"SLURM_JOB_NODELIST": "n[1-2]", "OTHER": "10.0.0.7"},
        **more,
    }
    done = subprocess.run(
        ["bash", str(CLUSTER / name), "steps=2"],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr, log.read_text().splitlines()


def test_the_script_starts_ray_on_all_nodes_and_repeats_a_run_that_lost_a_process(tmp_path: Path) -> None:
    # its name leads to the loopback, as on Debian: the network's address counts
    status, _, called = run_script(tmp_path, "slurm.sh", "3 0", NAMED="127.0.1.1", OTHER="fe80::1 10.0.0.7 172.17.0.1")
    assert status == 0
    starts = sorted(line for line in called if "scripts start" in line)
    assert len(starts) == 2
    assert "--address=10.0.0.7:20017" in starts[0]
    assert "--head --node-ip-address=10.0.0.7 --port=20017" in starts[1]
    assert "head 5ec4e7" in called
    assert [line for line in called if line.startswith("launch")] == 2 * [
        "launch -m rlmed.launch cluster=ray_multinode steps=2 cluster.address=10.0.0.7:20017"
        " hydra.run.dir=/shared/run resume=auto"
    ]


@pytest.mark.parametrize("name", ["slurm.sh", "slurm_one_node.sh"])
@pytest.mark.parametrize(("statuses", "tries", "status"), [("2", 1, 2), ("3 3 3 3", 3, 3), ("3 1", 2, 1)])
def test_other_failures_end_the_job(name: str, statuses: str, tries: int, status: int, tmp_path: Path) -> None:
    found, _, called = run_script(tmp_path, name, statuses)
    assert found == status
    assert sum(line.startswith("launch") for line in called) == tries


def test_the_heads_end_and_a_node_without_an_address_are_said(tmp_path: Path) -> None:
    for name, given, said in (
        ("dead", {"HEAD_S": "0.3", "RUN_S": "30"}, "Ray's head has ended"),
        ("bare", {"NAMED": "127.0.1.1", "OTHER": "::1"}, "n1 has no IPv4 address but the loopback's"),
    ):
        (tmp_path / name).mkdir()
        status, error, _ = run_script(tmp_path / name, "slurm.sh", "0", **given)
        assert status == 1
        assert said in error
