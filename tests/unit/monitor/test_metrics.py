"""Test the registry of metrics."""

import re

from hypermoe_ds.monitor.metrics import METRICS, PAGES, metric_of, metrics_tables
from hypermoe_ds.run_config import RunConfig


def test_metrics_have_unique_names_pages_and_a_remedy_for_bad_values() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {metric.page for metric in METRICS} == set(PAGES)
    assert [metric.name for metric in METRICS if bool(metric.bad) != bool(metric.remedy)] == []


def test_keys_with_an_item_belong_to_their_metric() -> None:
    assert metric_of("router_entropy/moe_layer_3") is metric_of("router_entropy")
    assert metric_of("valid_loss/a/b") is metric_of("valid_loss")
    assert metric_of("unknown_metric") is None


def test_settings_named_in_remedies_exist() -> None:
    named = re.findall(r"\b([a-z]+)\.([a-z_]+)\b", " ".join(f"{m.meaning} {m.bad} {m.remedy}" for m in METRICS))
    settings = [(section, key) for section, key in named if section in RunConfig.model_fields]
    assert len(settings) >= 10
    for section, key in settings:
        assert key in RunConfig.model_fields[section].annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]


def test_tables_list_each_metric_under_its_page() -> None:
    pages = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", metrics_tables(), re.S | re.M))
    assert list(pages) == list(PAGES.values())
    for metric in METRICS:
        [row] = [line for line in pages[PAGES[metric.page]].splitlines() if re.match(rf"\| `{metric.name}[`/]", line)]
        assert row.split(" | ")[1:3] == [metric.unit, metric.meaning]
