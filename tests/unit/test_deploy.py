"""The files under deploy/ fit their schemas, each other, and the server's settings, metrics and probes."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from benchmarks import sizing
from serving import metrics
from serving.settings import PREFIX, Settings
from serving.worker.graceful_shutdown import ABORT_SECONDS
from tests.golden_data import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.30", "1.37")


def read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def rendered(overlay: str) -> list[dict[str, Any]]:
    """What kustomize makes of an overlay, as far as these use it: JSON patches and image tags."""
    folder = KUBERNETES / "overlays" / overlay
    (kustomization,) = read(folder / "kustomization.yaml")
    (base,) = read(KUBERNETES / "base" / "kustomization.yaml")
    documents = [document for name in base["resources"] for document in read(KUBERNETES / "base" / name)]
    for patch in kustomization["patches"]:
        (target,) = [
            d
            for d in documents
            if d["kind"] == patch["target"]["kind"] and d["metadata"]["name"] == patch["target"]["name"]
        ]
        for operation in yaml.safe_load(patch["patch"]):
            apply(target, operation)
    (image,) = kustomization["images"]
    for container in containers(documents):
        assert container["image"] == image["name"]
        container["image"] += f":{image['newTag']}"
    return documents


def apply(document: dict[str, Any], operation: dict[str, Any]) -> None:
    *parents, last = [part.replace("~1", "/") for part in operation["path"].strip("/").split("/")]
    parent: Any = document
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    assert (last in parent) == (operation["op"] == "replace")
    parent[last] = operation["value"]


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for d in documents if d["kind"] in ("Deployment", "Job")]


def containers(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for pod in pods(documents) for c in [*pod["containers"], *pod.get("initContainers", [])]]


def one(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def server(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = one(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_fits_the_schema_of_its_kind(overlay: str, version: str) -> None:
    documents = rendered(overlay)
    assert {d["kind"] for d in documents} >= {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Job", "NetworkPolicy", "PersistentVolumeClaim",
        "PodDisruptionBudget", "Service",
    }  # fmt: skip
    for document in documents:
        kubernetes_validate.validate(copy.deepcopy(document), version, strict=True)


def test_a_misspelled_field_would_be_noticed() -> None:
    deployment = one(rendered("gpu"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, whose kustomize this compares with, is not here")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same_of_an_overlay(overlay: str) -> None:
    result = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, timeout=60, check=True
    )
    theirs = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(result.stdout)}
    ours = {(d["kind"], d["metadata"]["name"]): d for d in rendered(overlay)}
    assert theirs.keys() == ours.keys()
    for key, document in theirs.items():
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        assert without_names(document) == without_names(ours[key])


def without_names(value: Any) -> Any:
    """Without the label that kustomize adds to everything, and the maps that contained nothing else."""
    if isinstance(value, dict):
        kept = {k: without_names(v) for k, v in value.items() if k != "app.kubernetes.io/name"}
        return {k: v for k, v in kept.items() if not (k in ("labels", "matchLabels", "podSelector") and v == {})}
    return [without_names(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_with_the_least_privileges(overlay: str) -> None:
    documents = rendered(overlay)
    assert pods(documents)
    assert containers(documents)
    for pod in pods(documents):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
    for container in containers(documents):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_requests_in_flight_may_finish_before_a_pod_is_killed(overlay: str) -> None:
    """Kubernetes kills at the end of the grace period, which begins before preStop does."""
    documents = rendered(overlay)
    settings = Settings.from_environment(one(documents, "ConfigMap")["data"])
    pause = int(server(documents)["lifecycle"]["preStop"]["exec"]["command"][1])
    allowed = one(documents, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert allowed >= pause + settings.grace_seconds + ABORT_SECONDS


def test_probes_use_the_health_endpoints() -> None:
    """/livez answers during a start of any length, and fails once loading has failed; tests/e2e/test_probes.py sends
    these to a server."""
    container = server(rendered("gpu"))
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_puts_its_address_into_the_environment(overlay: str) -> None:
    assert one(rendered(overlay), "Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_gpu_overlay_requests_one_gpu_and_the_cpu_overlay_none() -> None:
    assert server(rendered("gpu"))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in json.dumps(rendered("cpu"))


def test_the_model_that_is_served_is_the_one_that_is_imported_and_waited_for() -> None:
    documents = rendered("gpu")
    tag = one(documents, "ConfigMap")["data"]["CHATGLM_MODEL"]
    file = f"models/{tag.replace(':', '/')}/model.yaml"
    deployment = one(documents, "Deployment")["spec"]["template"]["spec"]
    assert file in " ".join(deployment["initContainers"][0]["command"])
    (importing,) = one(documents, "Job")["spec"]["template"]["spec"]["containers"]
    assert file in importing["command"][-1]
    assert f"--name {tag}" in importing["command"][-1]


def metric_names() -> set[str]:
    """As Prometheus shows them, without the suffixes of histograms."""
    found = [value for value in vars(metrics).values() if isinstance(value, Counter | Gauge | Histogram)]
    return {f.name + ("_total" if isinstance(each, Counter) else "") for each in found for f in each.describe()}


def test_the_autoscaler_uses_metrics_that_exist() -> None:
    asked = {m["pods"]["metric"]["name"] for m in one(rendered("gpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]}
    assert asked == {"chatglm_num_requests_running", "chatglm_num_requests_waiting"}
    assert asked <= metric_names()
    (adapter,) = read(KUBERNETES / "prometheus-adapter.yaml")
    pattern = re.search(r'__name__=~"([^"]+)"', adapter["rules"]["custom"][0]["seriesQuery"])
    assert pattern is not None
    assert all(re.fullmatch(pattern[1], name) for name in asked)


def test_compose_mounts_what_there_is_and_sets_what_exists() -> None:
    (compose,) = read(DEPLOY / "compose.yaml")
    for name in ("cpu", "cuda"):
        service = compose["services"][name]
        assert service["profiles"] == [name]
        assert service["image"] == f"chatglm2:{name}"
        assert service["read_only"] is True
        assert {
            n for n in service["environment"] if n.removeprefix(PREFIX).lower() not in Settings.model_fields
        } == set()
        grace = float(service["environment"]["CHATGLM_GRACE_SECONDS"]) + ABORT_SECONDS
        assert float(service["stop_grace_period"].removesuffix("s")) > grace
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    mounted = [v.split(":")[0] for s in compose["services"].values() for v in s["volumes"] if v.startswith("./")]
    assert all((DEPLOY / source).exists() for source in mounted), mounted
    (prometheus,) = read(DEPLOY / "prometheus" / "prometheus.yml")
    assert all((DEPLOY / "prometheus" / Path(rule).name).is_file() for rule in prometheus["rule_files"])


def docker_has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return (
        subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=30).returncode == 0
    )


@pytest.mark.parametrize("profile", ["cpu", "cuda", "watch"])
def test_compose_itself_accepts_the_file(profile: str) -> None:
    if not docker_has_compose():
        pytest.skip("docker compose, which checks the file, is not here")
    command = ["docker", "compose", "--file", str(DEPLOY / "compose.yaml"), "--profile", profile, "config", "--quiet"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_dashboard_is_read_where_grafana_is_told_to_look() -> None:
    (provider,) = read(DEPLOY / "grafana" / "provisioning" / "dashboards" / "chatglm.yaml")
    (compose,) = read(DEPLOY / "compose.yaml")
    folder = provider["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1].startswith(f"{folder}/") for volume in compose["services"]["grafana"]["volumes"])


def test_the_sizes_in_the_operations_page_follow_from_the_shapes() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert sizing.tables() in page
    assert sizing.parameters()[0] + 2 * sizing.parameters()[1] + sizing.parameters()[2] == 6_243_584_000
    assert sizing.kv_bytes_per_token(2) == 28 * 1024


def test_what_tokens_cost_is_worked_out_from_a_result_file() -> None:
    report = {"results": [{"concurrency": 16, "figures": {"a": {"tokens_per_second": 1000.0}}}]}
    assert sizing.costs(report, price=3.6) == ["a, 16 at once: 1000 tokens/s, 1.00 per million tokens"]


def test_the_bentocloud_deployment_has_only_fields_that_exist() -> None:
    """BentoML ignores unknown names, so they are looked up in its schemas, which have no public name."""
    import attrs
    from bentoml._internal.cloud.schemas.modelschemas import DeploymentServiceConfig, DeploymentTargetHPAConf
    from bentoml._internal.cloud.schemas.schemasv2 import CreateDeploymentSchema
    from bentoml._internal.utils.cattr import bentoml_cattr

    (asked,) = read(DEPLOY / "bentocloud" / "deployment.yaml")
    read_back = bentoml_cattr.structure(asked, CreateDeploymentSchema)
    assert set(asked) <= {field.name for field in attrs.fields(CreateDeploymentSchema)}
    assert set(read_back.services) == {"chatglm2"}
    service = asked["services"]["chatglm2"]
    assert set(service) <= {field.name for field in attrs.fields(DeploymentServiceConfig)}
    assert set(service["scaling"]) <= {field.name for field in attrs.fields(DeploymentTargetHPAConf)}
    assert {env["name"].removeprefix(PREFIX).lower() for env in asked["envs"]} <= set(Settings.model_fields)


def alerts() -> list[dict[str, Any]]:
    (rules,) = read(DEPLOY / "prometheus" / "alerts.yml")
    return [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]


def test_every_alert_has_a_runbook() -> None:
    text = (REPOSITORY / "docs" / "runbooks.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"


def test_alerts_name_error_codes_that_exist_and_page_for_none_that_clients_cause() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "serving").glob("**/errors.py"))
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    named = {name for found in re.findall(r'code=~?"([^"]+)"', text) for name in found.split("|")}
    assert {name for name in named if f'"{name}"' not in code} == set()
    for alert in alerts():
        if alert["labels"]["severity"] == "critical":
            assert not re.search("request_timeout|rate_limit|invalid", alert["expr"]), alert
