"""deploy/compose.yaml and what it starts: files that exist, a server that can do no harm, metrics that there are."""

import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from containers import instructions
from servers import ask

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def test_files_that_it_mounts_exist(services):
    for name, service in services.items():
        mounted = [volume.split(":")[0] for volume in service.get("volumes", []) if volume.startswith(".")]
        assert all((DEPLOY / path).is_file() for path in mounted), name
    build = services["memedge"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Containerfile"
    for path in DEPLOY.rglob("*.yml"):
        yaml.safe_load(path.read_text())


def test_the_server_may_do_nothing_but_serve(services):
    gate = services["memedge"]
    assert gate["read_only"] and gate["tmpfs"] == ["/tmp"] and gate["cap_drop"] == ["ALL"]
    assert gate["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    # Images of the OCI's format have no health check of their own, so it stands here too.
    check = dict(instructions(DEPLOY / "Containerfile"))["HEALTHCHECK"].partition("CMD ")[2]
    assert gate["healthcheck"]["test"] == ["CMD", *json.loads(check)]


def test_prometheus_scrapes_the_server(services):
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in services and services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    """With their labels, as a server that has answered and refused says them."""
    assert ask(server.url, ["the left luggage sign", "a green star on a hill"]).status_code == 200
    assert ask(server.url, []).status_code == 422
    labels: dict[str, set[str]] = {}
    for line in httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines():
        if found := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            labels.setdefault(found[1], set()).update(re.findall(r'(\w+)="', found[2] or ""))
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    source = yaml.safe_load((DEPLOY / "grafana/datasources.yml").read_text())["datasources"][0]
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        for expression in (target["expr"] for target in panel["targets"]):
            (grouped,) = {*re.findall(r"by \(([\w, ]+)\)", expression)} or {""}
            for name, selected in re.findall(r"(memedge_\w+)(?:\{(.*?)\})?", expression):
                wanted = {*re.findall(r"(\w+)=", selected), *re.findall(r"\w+", grouped)}
                assert name in labels and wanted <= labels[name], expression
                asked.add(name)
    assert {"memedge_requests_total", "memedge_request_seconds_bucket", "memedge_rejected_total"} <= asked
