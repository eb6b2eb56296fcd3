"""Dashboards and alerts ask for series that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from serving import metrics
from tests.golden_data import REPOSITORY

SERIES = re.compile(r"\b(?:chatglm|bentoml)_\w+")
SUFFIX = re.compile(r"_(?:bucket|sum|count)$")


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REPOSITORY / "deploy/grafana/dashboard.json").read_text(encoding="utf-8"))
    return content


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((REPOSITORY / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    targets = [target for panel in dashboard()["panels"] for target in panel["targets"]]
    return [target["expr"] for target in targets] + [rule["expr"] for rule in rules()]


def test_every_series_of_dashboard_and_alerts_exists() -> None:
    known = set(metrics.names())
    asked = {SUFFIX.sub("", name) for expression in expressions() for name in SERIES.findall(expression)}
    assert asked <= known, asked - known


def test_every_metric_of_the_engine_is_on_the_dashboard() -> None:
    shown = " ".join(expressions())
    hidden = {name for name in metrics.names() if name.startswith("chatglm_") and name not in shown}
    assert hidden <= {"chatglm_kv_cache_tokens", "chatglm_kv_cache_used_tokens"}


def test_panels_and_rules_are_complete() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for rule in rules():
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"])


def test_labels_have_few_values() -> None:
    for name in ("REQUEST_SUCCESS", "ERRORS", "HTTP_REQUESTS", "HTTP_SECONDS"):
        labels = set(getattr(metrics, name)._labelnames)
        assert labels <= {"finished_reason", "code", "endpoint", "http_response_code"}
