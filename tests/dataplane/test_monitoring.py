"""Alert rules and dashboard: read by promtool, and by a real Prometheus that scrapes a real engine. What they
ask for must be there, and the alerts must fire when they should.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import DPDK_INTERFACES, Gateway, new_gateway
from tests.lab import Lab, run, wait_until
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "dataplane/monitoring"
METRIC = re.compile(r"\bdsnat_[a-z_]+\b")

PROMETHEUS = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: dsnat
    static_configs: [{{targets: ["127.0.0.1:9732"]}}]
"""

# series of a minute each, and the alerts that must stand at `at`
CASES: list[tuple[str, dict[str, str], str, set[str]]] = [
    (
        "all is well",
        {'dsnat_up{job="dsnat"}': "1x20", 'dsnat_equation_holds{job="dsnat"}': "1x20"},
        "10m",
        set(),
    ),
    ("the equation", {"dsnat_equation_holds": "0x20"}, "10m", {"DsnatEquationBroken"}),
    ("without DPDK", {"dsnat_degraded": "1x20"}, "10m", {"DsnatDegraded"}),
    (
        "the peer is gone",
        {"dsnat_sync_configured": "1x20", "dsnat_sync_connected": "0x20"},
        "10m",
        {"DsnatPeerNotHeard"},
    ),
    (
        "there is no peer",
        {"dsnat_sync_configured": "0x20", "dsnat_sync_connected": "0x20"},
        "10m",
        set(),
    ),
    ("the engine is down", {"dsnat_up": "0x20"}, "10m", {"DsnatDown"}),
    (
        "a pool runs out",
        {
            'dsnat_pool_mappings{instance="a",pool="p",protocol="udp"}': "50000x30",
            'dsnat_pool_mappings{instance="a",pool="p",protocol="tcp"}': "100x30",
            'dsnat_pool_ports{instance="a",pool="p",mapping="endpoint-independent"}': "60000x30",
        },
        "20m",
        {"DsnatPoolNearlyEmpty"},
    ),
    ("a pool is out", {'dsnat_pool_no_port_total{pool="p"}': "0+60x30"}, "20m", {"DsnatPoolExhausted"}),
    (
        "roles flap",
        {'dsnat_vrrp_master{address="198.51.100.1"}': "1 0 1 0 1 0 1 1 1 1 1 1 1"},
        "8m",
        {"DsnatRoleFlaps"},
    ),
    (
        "two masters",
        {f'dsnat_vrrp_master{{instance="{one}",address="198.51.100.1"}}': "1x20" for one in "ab"},
        "10m",
        {"DsnatTwoMasters"},
    ),
    ("drops", {'dsnat_reason_packets_total{reason="tx_full"}': "0+6000x30"}, "20m", {"DsnatDrops"}),
    ("expected noise", {'dsnat_reason_packets_total{reason="no_session"}': "0+6000x30"}, "20m", set()),
    (
        "records are lost",
        {'dsnat_log_records_lost_total{collector="192.0.2.10:4739",cause="queue_full"}': "0x5 0+9x9"},
        "9m",
        {"DsnatLogRecordsLost"},
    ),
]


def expressions() -> Iterator[str]:
    """Of the dashboard, as Grafana would ask."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; run `make setup`")
def test_promtool_takes_the_rules() -> None:
    run(["promtool", "check", "rules", str(MONITORING / "alerts.yml")])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; run `make setup`")
def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    alerts = sorted(set(re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text())))
    for name, series, at, firing in CASES:
        lines = [f"rule_files: ['{MONITORING / 'alerts.yml'}']", "evaluation_interval: 1m", "tests:"]
        lines += ["  - interval: 1m", "    input_series:"]
        lines += [f"      - {{series: '{key}', values: '{value}'}}" for key, value in series.items()]
        lines += ["    promql_expr_test:"]
        for alert in alerts:
            found = f"count(ALERTS{{alertname='{alert}',alertstate='firing'}}) or vector(0)"
            samples = f"[{{value: {int(alert in firing)}}}]"
            lines += [f'      - {{expr: "{found}", eval_time: {at}, exp_samples: {samples}}}']
        path = tmp_path / "case.yml"
        path.write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


@pytest.fixture
def gateway(lab: Lab, program: Callable[[str], Path]) -> Iterator[Gateway]:
    text = (
        f"engine: {{workers: 1, max_sessions: 10000}}\n{DPDK_INTERFACES}"
        "pools:\n"
        "  - {name: follows, addresses: 203.0.113.1, active_while: 198.51.100.1}\n"
        "  - {name: open, addresses: 203.0.113.8/29, mapping: endpoint-independent}\n"
        "zones:\n"
        "  - {source: 100.64.0.0/16, pool: follows}\n"
        "  - {source: 100.65.0.0/16, pool: open}\n"
        'logging: [{protocol: ipfix, collector: "127.0.0.1:4739", destinations: on}]\n'
        f"sync: {{peer: 127.0.0.2, listen: 127.0.0.1, key: 'file:{lab.directory}/sync.key'}}\n"
    )
    key = lab.directory / "sync.key"  # a peer that is not there
    key.write_text("07" * 32)
    key.chmod(0o600)
    made = new_gateway(lab, program("dsnatd"), text)
    yield made
    made.close()


class Prometheus:
    def __init__(self, gateway: Gateway) -> None:
        self.space = gateway.space
        directory = gateway.file.parent
        argv = (sys.executable, "-m", "dsnatctl", "metrics", "--socket", str(gateway.socket))
        self.sidecar = self.space.start("env", f"PYTHONPATH={ROOT / 'dataplane'}", *argv, log="metrics.log")
        config = directory / "prometheus.yml"
        config.write_text(PROMETHEUS.format(rules=MONITORING / "alerts.yml"))
        options = {
            "config.file": config,
            "storage.tsdb.path": directory / "tsdb",
            "web.listen-address": "127.0.0.1:9090",
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        self.program = self.space.start("prometheus", *flags, log="prometheus.log")
        wait_until("Prometheus to have figures", lambda: self.query("dsnat_up"), deadline_s=60)

    def ask(self, path: str, **arguments: str) -> Any:
        url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        text = self.space.run("curl", "-s", "--noproxy", "*", url, check=False)
        return json.loads(text) if text.startswith("{") else {"status": "error", "error": text}

    def query(self, expression: str) -> list[Any]:
        answer = self.ask("query", query=expression)
        return list(answer.get("data", {}).get("result", ()))


@pytest.mark.net
def test_prometheus_finds_all_that_the_dashboard_and_the_rules_ask_for(gateway: Gateway) -> None:
    prometheus = Prometheus(gateway)
    gateway.client.run("ping", "-c", "3", "-i", "0.1", SERVER)
    assert int(prometheus.query('up{job="dsnat"}')[0]["value"][1]) == 1
    rules = (MONITORING / "alerts.yml").read_text()
    wanted = {name for text in (rules, *expressions()) for name in METRIC.findall(text)}
    there = set(prometheus.ask("label/__name__/values")["data"])
    assert wanted - there == set()
    for expression in expressions():
        answer = prometheus.ask("query", query=expression)
        assert answer["status"] == "success", (expression, answer)

    def judged() -> bool:
        groups = prometheus.ask("rules")["data"]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return len(found) == rules.count("- alert:") and all(rule["health"] == "ok" for rule in found)

    wait_until("every rule to be judged", judged)
    metadata = prometheus.ask("metadata")["data"]
    assert {name for name in there if name.startswith("dsnat_") and name.endswith("_total")} <= {
        name for name, kinds in metadata.items() if kinds[0]["type"] == "counter"
    }


@pytest.mark.net
def test_prometheus_and_the_engine_agree_on_what_was_translated(gateway: Gateway) -> None:
    prometheus = Prometheus(gateway)
    gateway.client.run("ping", "-c", "5", "-i", "0.1", SERVER)
    expression = 'sum(dsnat_sessions_created_total{protocol="icmp"})'
    created = gateway.counters()["traffic"]["icmp"]["sessions_created"]
    assert created >= 1

    def agrees() -> bool:
        found = prometheus.query(expression)
        return bool(found) and int(found[0]["value"][1]) == created

    wait_until("the figure to arrive", agrees)
    assert int(prometheus.query('dsnat_vrrp_master{address="198.51.100.1"}')[0]["value"][1]) == 1
    assert int(prometheus.query("sum(dsnat_allocation_duration_seconds_count)")[0]["value"][1]) >= created
