"""The container files: linted, valid by their schemas, safe by default, and true to what they run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from ray.scripts import scripts as ray_scripts

from pipeline.cli import main
from pipeline.config import loading

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent

COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RAYJOB: dict[str, Any] = yaml.safe_load((DOCKER / "kuberay" / "rayjob.yaml").read_text())
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
GROUPS = {"head": CLUSTER["headGroupSpec"], **WORKERS}
COMMAND = re.compile(r"(?:^ *|-- +)(ood-pipeline (?:run|doctor|submit)\b.*?)(?: +#.*)?$", re.MULTILINE)


def required() -> dict[str, Requirement]:
    """What pyproject.toml asks for, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {found.name: found for found in map(Requirement, project["dependencies"])}


def parse(command: str) -> None:
    """Let the real command line read a command; raises for an unknown command or option."""
    program, name, *arguments = shlex.split(command)
    assert program == "ood-pipeline"
    typer.main.get_command(main.app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize("path", sorted(DOCKER.glob("Dockerfile*")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    found = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", sorted(DOCKER.glob("Dockerfile*")), ids=lambda path: path.name)
def test_an_image_does_not_run_as_root(path: Path) -> None:
    assert re.findall(r"^USER (.+)$", path.read_text(), re.MULTILINE) == ["1000"]


def test_the_images_install_versions_that_the_package_accepts() -> None:
    cpu = {found.name: found for found in map(Requirement, re.findall(r'"(torch.*?)"', dockerfile("cpu")))}
    assert cpu == {name: required()[name] for name in ("torch", "torchvision")}
    version = re.search(r"mlflow==(\S+)", dockerfile("mlflow"))
    assert version
    assert version[1] in required()["mlflow"].specifier
    assert CLUSTER["rayVersion"] in required()["ray"].specifier


def dockerfile(kind: str) -> str:
    return (DOCKER / f"Dockerfile.{kind}").read_text()


def test_the_build_context_is_what_the_wheel_needs(tmp_path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    for name in [line[1:] for line in lines if line.startswith("!")]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("path", sorted(DOCKER.glob("compose*.yaml")), ids=lambda path: path.name)
def test_compose_files_match_the_compose_specification(path: Path) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_ports_are_published_to_the_host_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265", "127.0.0.1:8333:8333"]
    assert all(service["networks"] for service in SERVICES.values())
    assert not any("network_mode" in service for service in SERVICES.values())


def test_secrets_come_from_the_environment_and_must_be_set() -> None:
    secrets = set(re.findall(r"\$\{(\w+):\?see \.env\.example\}", (DOCKER / "compose.yaml").read_text()))
    assert secrets == set(re.findall(r"^(\w+)=$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), name
    subprocess.run(["git", "check-ignore", "--quiet", "docker/.env"], cwd=ROOT, check=True)


def test_ray_asks_for_a_token_everywhere() -> None:
    for name in ("head", "worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_services_wait_for_services_that_say_when_they_are_ready() -> None:
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
        assert ":" in service["image"] or "build" in service


@pytest.mark.parametrize("name", ["head", "worker"])
def test_ray_knows_the_options_of_compose(name: str) -> None:
    assert SERVICES[name]["entrypoint"][:2] == ["ray", "start"]
    arguments = [*SERVICES[name]["entrypoint"][2:], *SERVICES[name]["command"]]
    plain = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", argument) for argument in arguments]
    given = ray_scripts.start.make_context("start", plain).params
    assert given["block"]
    assert (given["head"], given["num_cpus"]) == ((True, 0) if name == "head" else (False, 2))


@pytest.mark.filterwarnings("ignore")  # MLflow's own, on import
def test_mlflow_knows_the_options_and_variables_of_compose() -> None:
    import mlflow.cli
    import mlflow.environment_variables

    name, *arguments = SERVICES["mlflow"]["command"]
    command = mlflow.cli.cli.commands[name]
    given = command.make_context(name, list(arguments)).params
    uri = loading.load(str(DOCKER / "quickstart.yaml")).tracking.uri
    assert uri.removeprefix("http://") in given["allowed_hosts"].split(",")
    known = {option.envvar for option in command.params} | vars(mlflow.environment_variables).keys()
    assert {key for key in SERVICES["mlflow"]["environment"] if key.startswith("MLFLOW")} <= known


def test_the_quickstart_for_compose_uses_a_bucket_that_is_created() -> None:
    (buckets,) = [part for part in SERVICES["store"]["command"] if part.startswith("-bucket=")]
    workspace = loading.load(str(DOCKER / "quickstart.yaml")).workspace
    assert workspace.removeprefix("s3://").split("/")[0] in re.split("[=,]", buckets)


@pytest.mark.parametrize("name", GROUPS)
def test_pods_match_the_schema_of_kubernetes(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **GROUPS[name]["template"]}
    kubernetes_validate.validate(pod, "1.34", strict=True)


@pytest.mark.parametrize("name", GROUPS)
def test_pods_run_without_privileges_and_within_limits(name: str) -> None:
    spec = GROUPS[name]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    (container,) = spec["containers"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
    assert container["envFrom"] == [{"secretRef": {"name": "ood-credentials"}}]


def test_the_job_runs_a_command_that_exists_on_a_mounted_config() -> None:
    entrypoint = RAYJOB["spec"]["entrypoint"]
    parse(entrypoint)
    (container,) = GROUPS["head"]["template"]["spec"]["containers"]
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(Path(shlex.split(entrypoint)[2]).parent) in folders
    assert GROUPS["head"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_commands_in_the_documents_exist() -> None:
    page = (ROOT / "docs" / "containers.md").read_text("utf-8").replace("\\\n", "")
    commands = COMMAND.findall(re.sub(r"docker run .*ood-pipeline:\w+", "ood-pipeline", page))
    assert len(commands) == 4
    for command in commands:
        parse(command)
