"""The cluster of docker/compose.yaml: whole, closed to the outside, and agreed with the files beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NODES = ("head", "worker")


def valid(path: Path) -> subprocess.CompletedProcess[str]:
    checker = str(Path(sys.executable).parent / "check-jsonschema")
    command = [checker, "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def option(node: str, name: str) -> str:
    (found,) = (word.partition("=")[2] for word in SERVICES[node]["entrypoint"] if word.startswith(f"--{name}="))
    return str(found)


def test_it_follows_the_schema_of_compose() -> None:
    done = valid(DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_the_schema_would_find_a_misspelt_key(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text((DOCKER / "compose.yaml").read_text().replace("shm_size", "shm_sise"))
    assert "shm_sise" in valid(tmp_path / "compose.yaml").stdout


def test_ports_are_published_to_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_every_node_wants_a_token_that_comes_from_a_file() -> None:
    assert COMPOSE["secrets"]["ray_token"].keys() == {"file"}
    for node in NODES:
        environment = SERVICES[node]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert SERVICES[node]["secrets"] == ["ray_token"]


def test_no_secret_is_written_down() -> None:
    for service in SERVICES.values():
        for name in service.get("environment", {}):
            assert not re.search(r"TOKEN|PASS|SECRET|KEY", name) or name.endswith("_PATH"), name
        assert "env_file" not in service


def test_nobody_can_log_in_to_grafana_which_has_no_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_workers_can_be_any_number() -> None:
    assert not SERVICES["worker"].keys() & {"container_name", "hostname", "ports"}
    assert SERVICES["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}


def test_a_node_drains_within_the_time_that_it_is_given() -> None:
    for node in NODES:
        grace_s = int(SERVICES[node]["stop_grace_period"].removesuffix("s"))
        drain_s = int(SERVICES[node]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 30 < drain_s <= grace_s - 10


def test_all_nodes_keep_runs_in_the_one_place_that_the_image_made_for_its_user() -> None:
    for node in NODES:
        assert SERVICES[node]["volumes"] == ["runs:/home/ray/runs"]
    assert "/home/ray/runs" in (DOCKER / "Dockerfile").read_text()


def test_nothing_has_more_rights_than_it_needs() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "user", "cap_add", "network_mode", "pid"}, name


@pytest.mark.parametrize("node", NODES)
def test_ray_knows_the_options_that_it_is_started_with(node: str) -> None:
    from ray.scripts.scripts import start

    words = SERVICES[node]["entrypoint"]
    assert words[:4] == ["tini", "--", "ray", "start"]
    known = {name for parameter in start.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words[4:]} <= known
    assert "--block" in words


def test_images_have_one_version_each() -> None:
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])
    for node in NODES:
        assert SERVICES[node]["image"] == "groundswell:${VARIANT:-cpu}"
        build = SERVICES[node]["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert build["args"].keys() == {"VARIANT"}


def test_prometheus_asks_every_node_where_it_exports_its_metrics() -> None:
    (scrape,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    assert found["names"] == list(NODES)
    assert {option(node, "metrics-export-port") for node in NODES} == {str(found["port"])}


def test_grafana_finds_prometheus_and_the_folder_of_dashboards() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "groundswell.yaml").read_text())["providers"]
    port = SERVICES["prometheus"]["ports"][0].split(":")[-1]
    assert (source["type"], source["url"]) == ("prometheus", f"http://prometheus:{port}")
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./grafana"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_every_file_that_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
