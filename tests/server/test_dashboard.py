"""The Grafana dashboard asks for metrics that there are, and for all of them."""

import json
import re
from pathlib import Path

from prometheus_client import generate_latest

from jaxserve.request import LoadedAdapter
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.recent import RecentLatencies
from tests.server.fake_engine import FakeEngine

DASHBOARD = Path(__file__).resolve().parents[2] / "dashboards" / "grafana.json"


def test_the_dashboard_shows_what_is_exported():
    engine = FakeEngine()
    engine.loras = {"a": LoadedAdapter(name="a", slot=0, generation=1, rank=4)}
    text = generate_latest(ServerMetrics(engine.stats, lambda: engine, RecentLatencies()).registry).decode()
    exported = set(re.findall(r"^(jaxserve:\w+)", text, re.M))
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = {name for p in panels for t in p["targets"] for name in re.findall(r"jaxserve:\w+", t["expr"])}
    assert asked <= exported
    families = {name for name in exported if not re.search(r"_(bucket|sum|count|created)$", name)}
    families |= {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == families
