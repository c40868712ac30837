"""The files around the code agree with the code and with each other.

Docker, Kubernetes and AWS are not there in a test. Ray's own validator reads ray_cluster.yaml; the rest is checked for
what would otherwise be noticed on the first start: names, ports, paths, versions and sizes that must match.
"""

import re
from pathlib import Path

import jsonschema
import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from stormline.pipeline.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
GIB = 1 << 30


def canonical(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def cluster_settings() -> Settings:
    """Return the settings that ray_cluster.yaml gives in its last comment."""
    comment = (ROOT / "ray_cluster.yaml").read_text().partition("to go with these nodes:")[2]
    return Settings.model_validate(yaml.safe_load("\n".join(line[1:].strip() for line in comment.splitlines())))


# --- ray_cluster.yaml


@pytest.fixture
def cluster() -> dict:
    return prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))


def test_ray_cluster_when_read_by_ray_then_valid(cluster):
    validate_config(cluster)


def test_ray_cluster_when_a_key_is_mistyped_then_ray_refuses_it(cluster):
    cluster["available_node_types"]["gpu_worker"]["min_worker"] = 1

    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(cluster)


def test_ray_cluster_when_started_then_its_lanes_have_room(cluster):
    settings = cluster_settings()
    worker = cluster["available_node_types"]["gpu_worker"]

    wanted_gpus = settings.lanes.count * settings.ray.encode_num_gpus + settings.llm.replicas * settings.llm.num_gpus

    assert 0 < wanted_gpus <= worker["min_workers"] * worker["resources"]["GPU"]
    assert settings.lanes.count * settings.ray.encode_num_gpus <= 1  # all of them on one node's GPU
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"]["GPU"] == 0
    assert settings.output.path.is_relative_to("/mnt/stormline")
    assert any("/mnt/stormline:/mnt/stormline" in option for option in cluster["docker"]["run_options"])


def test_ray_version_when_named_in_a_file_then_the_pinned_one(cluster):
    kuberay = list(yaml.safe_load_all((ROOT / "infra/kuberay.yaml").read_text()))[-1]
    images = [cluster["docker"]["head_image"], cluster["docker"]["worker_image"]]

    assert [re.fullmatch(r"rayproject/ray:([\d.]+)-py311(-gpu)?", image)[1] for image in images] == [PINS["ray"]] * 2
    assert kuberay["spec"]["rayVersion"] == PINS["ray"]
    assert f"ray[default]=={PINS['ray']}" in (ROOT / "ray_cluster.yaml").read_text()


def test_kuberay_when_read_then_every_mount_has_its_volume():
    spec = list(yaml.safe_load_all((ROOT / "infra/kuberay.yaml").read_text()))[-1]["spec"]
    templates = [spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])]

    for template in templates:
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"] for c in template["spec"]["containers"] for mount in c["volumeMounts"]}
        assert mounts == volumes == {"output", "settings", "shm"}


# --- infra/compose.yaml, infra/stormline.yaml


@pytest.fixture
def container_settings() -> Settings:
    return load_settings(ROOT / "infra/stormline.yaml")


def listeners(variable: str) -> dict[str, str]:
    """Return name → host:port of one of Kafka's listener variables."""
    pairs = COMPOSE["services"]["kafka"]["environment"][variable].split(",")
    return dict(pair.split("://") for pair in pairs)


def test_compose_kafka_when_read_then_listeners_fit_together():
    environment = COMPOSE["services"]["kafka"]["environment"]
    listening, advertised = listeners("KAFKA_LISTENERS"), listeners("KAFKA_ADVERTISED_LISTENERS")
    protocols = dict(pair.split(":") for pair in environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))

    assert set(listening) == set(protocols) == set(advertised) | {environment["KAFKA_CONTROLLER_LISTENER_NAMES"]}
    assert environment["KAFKA_INTER_BROKER_LISTENER_NAME"] in advertised
    for name, address in advertised.items():
        assert address.rpartition(":")[2] == listening[name].rpartition(":")[2]
    assert environment["KAFKA_CONTROLLER_QUORUM_VOTERS"] == f"{environment['KAFKA_NODE_ID']}@kafka:29093"
    assert listening["CONTROLLER"].endswith(":29093")


def test_compose_stormline_when_started_then_finds_broker_topic_and_folders(container_settings):
    service = COMPOSE["services"]["stormline"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    topic_command = COMPOSE["services"]["create-topic"]["command"]

    assert container_settings.kafka.bootstrap_servers == listeners("KAFKA_ADVERTISED_LISTENERS")["INTERNAL"]
    assert [f"--topic={topic}" for topic in container_settings.kafka.topics] == [
        option for option in topic_command if option.startswith("--topic=")
    ]
    assert mounts["output"] == str(container_settings.output.path)
    assert (ROOT / "infra" / mounts.pop("./stormline.yaml")).name in DOCKERFILE.splitlines()[-1]
    assert set(mounts) <= set(COMPOSE["volumes"])


def test_compose_sizes_when_compared_then_enough(container_settings):
    environment = COMPOSE["services"]["kafka"]["environment"]
    options = dict(o.removeprefix("--").partition("=")[::2] for o in COMPOSE["services"]["create-topic"]["command"][1:])
    service = COMPOSE["services"]["stormline"]

    assert options["config"] == f"max.message.bytes={environment['KAFKA_MESSAGE_MAX_BYTES']}"
    assert environment["KAFKA_MESSAGE_MAX_BYTES"] == environment["KAFKA_REPLICA_FETCH_MAX_BYTES"] == 16 << 20
    assert int(options["partitions"]) >= container_settings.lanes.count
    assert int(service["shm_size"].removesuffix("gb")) * GIB > container_settings.ray.object_store_bytes
    assert int(service["stop_grace_period"].removesuffix("s")) >= container_settings.llm.timeout_s


def test_compose_services_when_read_then_start_in_order_and_stay_local():
    services = COMPOSE["services"]

    assert services["create-topic"]["depends_on"]["kafka"]["condition"] == "service_healthy"
    assert services["stormline"]["depends_on"]["create-topic"]["condition"] == "service_completed_successfully"
    assert services["kafka"]["environment"]["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert all(port.startswith("127.0.0.1:") for s in services.values() for port in s.get("ports", []))
    assert services["kafka"]["image"] == services["create-topic"]["image"]
    assert re.fullmatch(r"apache/kafka:\d+\.\d+\.\d+", services["kafka"]["image"])


# --- infra/Dockerfile


def test_dockerfile_when_built_then_copies_what_is_there_and_let_through():
    build = COMPOSE["services"]["stormline"]["build"]
    let_through = re.findall(r"^!(\S+)$", (ROOT / "infra/Dockerfile.dockerignore").read_text(), re.M)
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]

    assert (ROOT / "infra" / build["context"] / build["dockerfile"]).resolve() == ROOT / "infra/Dockerfile"
    assert sorted(copied) == sorted(let_through)
    assert all((ROOT / name).exists() for name in copied)
    assert {path.split("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()} <= set(copied)


def test_dockerfile_when_run_then_not_as_root_and_its_health_is_known():
    lines = DOCKERFILE.splitlines()
    python = re.search(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.M)

    assert [line for line in lines if line.startswith("USER ")] == ["USER stormline"]
    assert lines.index("USER stormline") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert python
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(python[1])


def test_container_command_when_its_settings_are_shown_then_accepted():
    from typer.testing import CliRunner

    from stormline.pipeline.cli import app

    command = re.search(r'^CMD \["run", "--settings", "/etc/stormline/(.+)"\]$', DOCKERFILE, re.M)
    assert command

    result = CliRunner().invoke(app, ["run", "--settings", str(ROOT / "infra" / command[1]), "--show-settings"])

    assert result.exit_code == 0, result.output
    assert "kafka:19092" in result.output


# --- pyproject.toml, constraints.txt


def test_packages_when_walked_then_each_is_in_the_wheel():
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    found = {
        ".".join(["stormline", *path.parent.relative_to(ROOT).parts])
        for folder in folders
        for path in (ROOT / folder).rglob("__init__.py")
    }

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_data_files_when_walked_then_each_is_in_the_wheel():
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packed = {ROOT / "infra" / "Dockerfile.dockerignore"}  # stands beside the Dockerfile for who builds an image
    for package, globs in patterns.items():
        top, *below = package.split(".")[1:]
        home = ROOT / folders[f"stormline.{top}"] / Path(*below)
        packed |= {path for glob in globs for path in home.glob(glob)}

    found = {
        path
        for folder in folders.values()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }

    assert found - packed == set()


def test_constraints_when_compared_then_pin_each_dependency_in_its_range():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["broker"] + extras["demo"] + extras["dev"]
    pins = {canonical(name): Version(version) for name, version in PINS.items()}

    for requirement in map(Requirement, wanted):
        if requirement.name != "stormline":
            assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement


def test_version_when_named_in_a_file_then_the_projects():
    version = PROJECT["project"]["version"]
    kuberay = (ROOT / "infra/kuberay.yaml").read_text()

    assert COMPOSE["services"]["stormline"]["image"] == f"stormline:{version}"
    assert set(re.findall(r"stormline:(\d[\d.]+)", kuberay + DOCKERFILE)) == {version}
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
