"""The images' files and the compose file, read without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PINNED_IMAGE = re.compile(r"[a-z]+:\d+(\.\d+)+-[a-z-]+@sha256:[0-9a-f]{64}")
HADOLINT = Path(sys.executable).with_name("hadolint")
SECRETS = {"SEMIDS_AUTH", "SEMIDS_DATABASE_PASSWORD"}
VARIANTS = {
    "cpu": ["requirements-cpu.lock", "requirements-torch-cpu.lock"],
    "cuda": ["requirements-cuda.lock"],
}

each_service = pytest.mark.parametrize("name", sorted(SERVICES))
each_variant = pytest.mark.parametrize("variant", sorted(VARIANTS))


def test_the_compose_file_holds_what_its_schema_knows(tmp_path: Path) -> None:
    # Written anew: the validator's own reader need not know of merged keys.
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(COMPOSE))
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(not HADOLINT.exists(), reason="the linter of Dockerfiles is for Linux on x86-64")
def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    checked = subprocess.run([HADOLINT, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage of the Dockerfile, continued lines joined, comments dropped."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    instructions = [" ".join(line.split()) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]
    found: dict[str, list[str]] = {"": []}
    for instruction in instructions:
        if instruction.startswith("FROM "):
            found[instruction.split()[-1]] = [instruction]
        else:
            found[list(found)[-1]].append(instruction)
    return found


def locked(variant: str) -> dict[str, tuple[Version, list[str]]]:
    """Return version and digests of every package that a variant locks."""
    packages: dict[str, tuple[Version, list[str]]] = {}
    for file in VARIANTS[variant]:
        text = (DOCKER / file).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if line and not line.startswith("#"):
                requirement, *hashes = line.split()
                name, version = requirement.split("==")
                assert name not in packages
                packages[name] = (Version(version), hashes)
    return packages


# The compose file.


@each_service
def test_published_ports_are_on_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")
    assert SERVICES[name].get("network_mode") is None


def test_only_the_dashboard_is_published() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"server"}


def test_the_database_is_on_a_network_without_a_way_out_and_only_the_server_shares_it() -> None:
    assert COMPOSE["networks"]["data"]["internal"] is True
    assert SERVICES["database"]["networks"] == ["data"]
    assert {name for name, service in SERVICES.items() if "data" in service["networks"]} == {"database", "server"}


@each_service
def test_secrets_are_required_and_nowhere_but_in_the_environment(name: str) -> None:
    service = dict(SERVICES[name])
    environment = service.pop("environment")
    for variable, value in environment.items():
        if re.search(r"PASSWORD|AUTH_STRING", variable):
            assert re.fullmatch(r"\$\{(SEMIDS_AUTH|SEMIDS_DATABASE_PASSWORD):\?[^}]+\}", value)
        else:
            assert not any(secret in value for secret in SECRETS)
    assert not any(secret in yaml.safe_dump(service) for secret in SECRETS)


def test_server_asks_for_the_auth_string_that_clients_send() -> None:
    server = SERVICES["server"]["environment"]
    assert server["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    clients = [service["environment"] for name, service in SERVICES.items() if name not in {"server", "database"}]
    assert len(clients) == 3
    for client in clients:
        assert client["PREFECT_API_AUTH_STRING"] == server["PREFECT_SERVER_API_AUTH_STRING"]
        assert client["PREFECT_API_URL"] == f"http://server:{server['PREFECT_SERVER_API_PORT']}/api"


def test_dashboard_asks_the_published_port() -> None:
    server = SERVICES["server"]
    (port,) = server["ports"]
    published = port.removesuffix(f":{server['environment']['PREFECT_SERVER_API_PORT']}")
    assert server["environment"]["PREFECT_SERVER_UI_API_URL"] == f"http://{published}/api"
    # The options would leave the dashboard asking the default address.
    assert not any(word.startswith("--") for word in server["command"])


def test_server_keeps_its_data_in_the_database_that_is_made_for_it() -> None:
    server, database = SERVICES["server"]["environment"], SERVICES["database"]["environment"]
    assert server["PREFECT_SERVER_DATABASE_DRIVER"] == "postgresql+asyncpg"
    assert server["PREFECT_SERVER_DATABASE_HOST"] == "database"
    assert server["PREFECT_SERVER_DATABASE_NAME"] == database["POSTGRES_DB"]
    assert server["PREFECT_SERVER_DATABASE_USER"] == database["POSTGRES_USER"]
    assert server["PREFECT_SERVER_DATABASE_PASSWORD"] == database["POSTGRES_PASSWORD"]
    # Names of runs are not ASCII: in a database of another encoding, the server drops their events.
    assert "--encoding=UTF8" in database["POSTGRES_INITDB_ARGS"]


@each_service
def test_services_run_as_a_user_without_capabilities_on_read_only_files(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service
    assert "docker.sock" not in yaml.safe_dump(service)
    assert service["init"] is True


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"database"}))
def test_what_a_service_of_semids_writes_is_on_tmpfs_or_a_volume(name: str) -> None:
    service = SERVICES[name]
    mounted = {mount.split(":")[0] for mount in service["tmpfs"]}
    mounted |= {mount.split(":")[1] for mount in service.get("volumes", []) if isinstance(mount, str)}
    assert mounted >= {"/tmp", "/home/semids", "/state"}
    for mount in service["tmpfs"]:
        assert mount == "/tmp" or "uid=10001,gid=10001" in mount


@each_service
def test_images_are_built_here_or_pinned_by_tag_and_digest(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["image"] == f"semids:{service['build']['target']}"
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
    else:
        assert PINNED_IMAGE.fullmatch(service["image"])


@each_service
def test_services_start_again_answer_health_checks_and_have_a_memory_limit(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\$\{SEMIDS_\w+_MEMORY:-\d+g\}", service["deploy"]["resources"]["limits"]["memory"])
    if name == "deploy":
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"


def test_services_wait_for_what_they_need() -> None:
    assert SERVICES["server"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert SERVICES["deploy"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    for worker in ("worker", "worker-gpu"):
        assert SERVICES[worker]["depends_on"] == {
            "server": {"condition": "service_healthy"},
            "deploy": {"condition": "service_completed_successfully"},
        }


def test_volumes_are_named_and_used() -> None:
    used = {
        mount.split(":")[0]
        for service in SERVICES.values()
        for mount in service.get("volumes", [])
        if isinstance(mount, str)
    }
    assert used == set(COMPOSE["volumes"])


def test_only_the_gpu_worker_asks_for_devices_and_only_when_asked_for() -> None:
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    assert SERVICES["worker-gpu"]["build"]["target"] == "cuda"
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    for name in SERVICES.keys() - {"worker-gpu"}:
        assert "profiles" not in SERVICES[name]
        assert "reservations" not in SERVICES[name]["deploy"]["resources"]


def test_workers_serve_the_pool_by_its_name() -> None:
    for worker in ("worker", "worker-gpu"):
        assert SERVICES[worker]["command"][:5] == ["prefect", "worker", "start", "--pool", "semids-process"]


# The Dockerfile.


def test_base_images_are_pinned_by_tag_and_digest() -> None:
    found = stages()
    (argument,) = [line for line in found[""] if line.startswith("ARG PYTHON_IMAGE=")]
    assert PINNED_IMAGE.fullmatch(argument.removeprefix("ARG PYTHON_IMAGE="))
    for name, instructions in found.items():
        if name:
            assert instructions[0].split()[1] in {"${PYTHON_IMAGE}", *found}


@each_variant
def test_the_final_images_run_as_the_user_of_the_compose_file(variant: str) -> None:
    users = [line.split()[1] for line in stages()[variant] if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert stages()[variant][-1] == "USER 10001:10001"
    assert f"semids:{variant}" in {service["image"] for service in SERVICES.values()}
    assert {s["user"] for s in SERVICES.values() if s["image"] == f"semids:{variant}"} == {"10001:10001"}


@each_variant
def test_the_final_images_hold_packages_and_source_and_install_nothing(variant: str) -> None:
    found = stages()
    instructions = found[variant] + found["runtime"]
    assert found[variant][0] == f"FROM runtime AS {variant}"
    assert [line for line in instructions if line.startswith("COPY ")] == [
        f"COPY --from=packages-{variant} /opt/venv /opt/venv",
        "COPY --from=source /app /app",
    ]
    assert not any(re.search(r"\b(pip|apt-get|curl|wget)\b", line) for line in instructions)


def test_packages_are_installed_with_their_digests() -> None:
    installs = [line for lines in stages().values() for line in lines if "pip" in line and " install " in line]
    assert len(installs) == 3
    for line in installs:
        assert "--require-hashes --no-deps" in line
        assert re.search(r"--requirement requirements-[a-z-]+\.lock$", line)


def test_nothing_is_added_from_elsewhere_and_no_secret_is_an_argument() -> None:
    assert not any(line.startswith("ADD ") for lines in stages().values() for line in lines)
    for name in re.findall(r"^\s*ARG (\w+)", DOCKERFILE, re.MULTILINE):
        assert name in {"PYTHON_IMAGE", "TORCH_INDEX", "REVISION"}


def test_the_image_says_the_version_of_the_project() -> None:
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in DOCKERFILE


def test_the_context_holds_only_what_is_copied() -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if not rule.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    copied = {
        "docker/requirements-*.lock" if source.startswith("docker/") else source
        for lines in stages().values()
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed


def test_no_file_names_an_index() -> None:
    for path in sorted(DOCKER.iterdir()):
        if not path.is_file() or path.name == ".env":
            continue
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"\b(?:https?|file)://([\w.-]+)", text):
            assert address in {"127.0.0.1", "server"}, path.name
        if path.suffix == ".lock":
            # No option but the packages' digests: none that says where they come from.
            assert set(re.findall(r"^\s*(-[\w-]*)", text, re.MULTILINE)) == {"--hash"}, path.name


# The locks.


@each_variant
def test_every_locked_package_has_a_digest(variant: str) -> None:
    for name, (_, hashes) in locked(variant).items():
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes), name


@each_variant
def test_locks_agree_with_the_project(variant: str) -> None:
    packages = locked(variant)
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + extras["minilm"] + extras["s3"] + extras[{"cpu": "cpu", "cuda": "gpu"}[variant]]
    assert len(asked) >= 15
    for requirement in map(Requirement, asked):
        version, _ = packages[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: run `make lock`"


def test_the_server_finds_its_database_driver() -> None:
    assert "asyncpg" in locked("cpu")


def test_the_cpu_variant_has_nothing_of_cuda_and_the_cuda_variant_has() -> None:
    cuda = re.compile(r"(nvidia|cuda)-|triton$|faiss-gpu$")
    assert not [name for name in locked("cpu") if cuda.match(name)]
    assert [name for name in locked("cuda") if cuda.match(name)]
    assert str(locked("cpu")["torch"][0]) == f"{locked('cuda')['torch'][0]}+cpu"


def test_both_variants_lock_the_same_versions() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    for name in (cpu.keys() & cuda.keys()) - {"torch"}:
        assert cpu[name] == cuda[name], name
    assert cpu.keys() - cuda.keys() == {"faiss-cpu"}
