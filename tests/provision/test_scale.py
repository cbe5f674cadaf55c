"""Five hundred gateways from one file: server doubles (paramiko, all in one process) with the real agent.

2 % are dead, 1 % show another host key, 1 % take two seconds for every answer. The run must name each of
them and leave all others with the change.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.provision.sshd import make_key

ROOT = Path(__file__).resolve().parents[2]
COUNT = 500


def fleet(found: list[dict[str, str]], identity: Path) -> str:
    lines = [
        "schema: 1",
        "defaults:",
        f"  ssh: {{user: root, identity: {identity}, connect_timeout: 60s}}",
        "  rollout: {failures: 1000, first_wave_percent: 10}",
        "pools:",
    ]
    lines += [f"  p{n}: {{addresses: [198.18.{n // 250}.{n % 250 + 1}]}}" for n in range(len(found))]
    lines.append("gateways:")
    for n, gateway in enumerate(found):
        own = f"192.0.{n // 250 + 2}.{n % 250 + 1}/24"
        lines += [
            f"  {gateway['name']}:",
            f"    management: {{address: 127.0.0.1, port: {gateway['port']}}}",
            f"    host_key: {gateway['key']}",
            "    interfaces:",
            "      inside0: {role: inside, path: nfqueue, addresses: [100.64.0.2/24]}",
            f"      outside0: {{role: outside, path: nfqueue, addresses: [{own}]}}",
            "    zones:",
            f"      - {{source: 100.64.0.0/24, pool: p{n}}}",
        ]
    return "\n".join(lines) + "\n"


def fleet_tool(file: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    begun = time.monotonic()
    argv = [sys.executable, "-m", "provision", "--file", str(file), *words, "--json", "--jobs", "64"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, time.monotonic() - begun


@pytest.mark.net
@pytest.mark.timeout(600)
def test_500_gateways_are_planned_and_pushed_and_each_one_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_key(tmp_path / "user")
    argv = [sys.executable, "-m", "tests.provision.double", str(COUNT), str(tmp_path)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as servers:
        assert servers.stdout is not None
        assert servers.stdin is not None
        try:
            found = json.loads(servers.stdout.readline())
            kinds = {gateway["name"]: gateway["kind"] for gateway in found}
            file = tmp_path / "fleet.yaml"
            file.write_text(fleet(found, tmp_path / "user"))
            planned, plan_s = fleet_tool(file, "plan")
            done, push_s = fleet_tool(file, "push", "--yes")
            peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10  # the servers still run
        finally:
            servers.stdin.close()
            servers.wait(30)
    plan = json.loads(planned.stdout)
    away = {name for name, kind in kinds.items() if kind in ("dead", "wrong-key")}
    assert {change["gateway"] for change in plan["changes"]} == kinds.keys() - away
    assert plan["unreached"].keys() == away
    assert planned.returncode == 3
    assert done.stdout.startswith("{"), done.stderr
    results = {r["gateway"]: r for r in json.loads(done.stdout)["results"]}
    assert len(results) == COUNT
    for name, result in results.items():
        expected = {"dead": "unreached", "wrong-key": "unreached"}.get(kinds[name], "confirmed")
        assert result["outcome"] == expected, result
        if kinds[name] == "wrong-key":
            assert "another host key" in result["text"]
    assert done.returncode == 3
    became = Counter(f"{kinds[name]} {result['outcome']}" for name, result in results.items())
    with capsys.disabled():
        print(
            f"\n{COUNT} gateways: plan {plan_s:.0f} s, exit {planned.returncode}; "
            f"push {push_s:.0f} s, exit {done.returncode}; at most {peak_mib} MiB; {dict(became)}"
        )
