"""The numbers of all replicas on one page for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "merged"]


def merged(pages: dict[str, str]) -> bytes:
    """Every sample of every page, with its replica as a label.

    Args:
        pages: in Prometheus' text format, by the names of the replicas.
    """
    families: dict[str, Metric] = {}
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page):
            together = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                together.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]):
        self._families = families

    def describe(self):
        return []

    def collect(self):
        return self._families
