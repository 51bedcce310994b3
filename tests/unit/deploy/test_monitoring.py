"""Alert rules and dashboard: their expressions can be parsed, and ask for metrics and labels that there are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from serving.observability.metrics import ServingMetrics
from serving.problems import PROBLEM_KINDS

DEPLOY = Path("deploy")
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
# Added by Prometheus when it scrapes, or, as `namespace` and `pod`, by its operator.
_LABELS_OF_SCRAPES = {"job", "instance", "namespace", "pod"}


def _labels_by_series() -> dict[str, set[str]]:
    """Every name that a scrape can hold -> its labels."""
    series: dict[str, set[str]] = {"up": set()}
    metrics = ServingMetrics()
    for metric in {m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)}:
        labels = set(metric._labelnames)
        (family,) = metric.describe()
        if isinstance(metric, Histogram):
            series |= {f"{family.name}_bucket": labels | {"le"}}
            series |= {f"{family.name}_{end}": labels for end in ("sum", "count")}
        else:
            series[f"{family.name}_total" if family.type == "counter" else family.name] = labels
    return series


SERIES = _labels_by_series()


def _panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def _expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in _panels():
        for target in panel["targets"]:
            # Grafana puts a duration in its place.
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def _selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    return found


def _groupings(expression: str) -> set[str]:
    return {name.strip() for names in re.findall(r"\bby \(([^)]*)\)", expression) for name in names.split(",")}


@pytest.mark.parametrize(("where", "expression"), [*_expressions()])
def test_an_expression_asks_for_what_there_is(where: str, expression: str) -> None:
    selectors = _selectors(expression)
    assert selectors, where
    labels = set(_LABELS_OF_SCRAPES)
    for selector in selectors:
        assert selector.name in SERIES
        labels |= SERIES[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in SERIES[selector.name] | _LABELS_OF_SCRAPES
            if matcher.name == "code":
                assert [code for code in PROBLEM_KINDS if re.fullmatch(matcher.value, code)], matcher.value
    assert _groupings(expression) <= labels


def test_the_check_would_find_a_wrong_name() -> None:
    (selector,) = _selectors("sum(rate(lookalike_request_total[5m]))")
    assert selector.name not in SERIES


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {selector.name for _, expression in _expressions() for selector in _selectors(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in SERIES}
    assert families == known


def test_alerts_are_whole_and_say_what_they_are_about() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"].endswith(".")
        # A label in a text must be one that the expression leaves.
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = _groupings(rule["expr"]) or ({"instance", "job"} if "sum(" not in rule["expr"] else set())
        assert used <= kept


def test_prometheus_reads_the_rules_and_scrapes_with_a_key() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert settings["rule_files"] == ["alerts.yaml"]
    (scrape,) = settings["scrape_configs"]
    assert scrape["job_name"] == "lookalike"  # as the rules have it
    assert scrape["metrics_path"] == "/metrics"
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    targets = [volume.removesuffix(":ro").rpartition(":")[2] for volume in services["prometheus"]["volumes"]]
    assert scrape["authorization"]["credentials_file"] in targets
    assert scrape["static_configs"][0]["targets"] == ["lookalike:8000"]


def test_panels_do_not_overlap_and_have_a_unit() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in _panels())
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
