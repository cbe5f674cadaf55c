"""The engine's figures for Prometheus: a small sidecar that asks the control socket at each scrape.

    dsnatctl metrics --listen 0.0.0.0:9732

Nothing is kept between scrapes and nothing is walked session by session, so a scrape costs the same with ten
sessions and with ten million. When the engine cannot be reached the page says `dsnat_up 0`, which is the
alarm; it is not an HTTP error, because then the reason would be lost.

Series of single addresses are left out for pools of more than ADDRESSES_MAX, and zones behind the first
ZONES_MAX: a time series per address of a /16 helps nobody. The pool's own sums stay.

Names follow Prometheus: base units (seconds, bytes), `_total` on what only grows. Dashboard and alert rules
for them are in dataplane/monitoring/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dsnatctl.client import STRANGE, Engine, Json, Refused, Unreachable, strange

ADDRESSES_MAX = 1024
ZONES_MAX = 1024
GENERATION = "/etc/dsnat"  # a link to .../generations/N
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Page:
    """Collects samples by metric: the text format wants all of one together, under one HELP and TYPE."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, text: str, value: float, **labels: object) -> None:
        lines = self._lines.setdefault(name, [f"# HELP {name} {text}", f"# TYPE {name} {kind}"])
        marks = ",".join(f'{key}="{_escape(str(label))}"' for key, label in labels.items())
        lines.append(f"{name}{{{marks}}} {value}" if marks else f"{name} {value}")

    def counter(self, name: str, text: str, value: float, **labels: object) -> None:
        self.add(name, "counter", text, value, **labels)

    def gauge(self, name: str, text: str, value: float, **labels: object) -> None:
        self.add(name, "gauge", text, value, **labels)

    def histogram(
        self, name: str, text: str, buckets: list[tuple[str, int]], total: float, **labels: object
    ) -> None:
        """`buckets`: upper end and how many lie between it and the one before."""
        lines = self._lines.setdefault(name, [f"# HELP {name} {text}", f"# TYPE {name} histogram"])
        marks = "".join(f'{key}="{_escape(str(label))}",' for key, label in labels.items())
        count = 0
        for end, n in buckets:
            count += n
            lines.append(f'{name}_bucket{{{marks}le="{end}"}} {count}')
        lines.append(f"{name}_sum{{{marks[:-1]}}} {total}")
        lines.append(f"{name}_count{{{marks[:-1]}}} {count}")

    def text(self) -> str:
        return "".join(f"{line}\n" for lines in self._lines.values() for line in lines)


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def generation(link: str = GENERATION) -> int:
    """The number of the configuration that is in force; -1 when it is not kept in generations."""
    name = os.path.realpath(link).rsplit("/", 1)[-1]
    return int(name) if name.isdecimal() else -1


def page(answers: Mapping[str, Json]) -> str:
    """`answers`: status, workers, pools, zones, ports, counters, sync."""
    out = Page()
    out.gauge("dsnat_up", "1 when the engine answers.", 1)
    _status(out, answers["status"])
    for worker in answers["workers"]["workers"]:
        _worker(out, worker)
    for pool in answers["pools"]["pools"]:
        _pool(out, pool)
    _vrrp(out, answers["pools"]["pools"])
    for number, zone in enumerate(answers["zones"]["zones"][:ZONES_MAX], 1):
        labels = {"zone": number, "source": zone["source"], "destination": zone.get("destination", "any")}
        text = "Sessions that the zone has made."
        out.counter("dsnat_zone_sessions_created_total", text, zone["created"], **labels)
        text = "Sessions that the zone has refused."
        out.counter("dsnat_zone_sessions_refused_total", text, zone["refused"], **labels)
    for port in answers["ports"]["ports"]:
        _port(out, port)
    _nat_log(out, answers["counters"]["nat_log"])
    _sync(out, answers["sync"])
    return out.text()


def down(why: str) -> str:
    out = Page()
    out.gauge("dsnat_up", "1 when the engine answers.", 0)
    return f"# {why}\n{out.text()}"


def _status(out: Page, status: Json) -> None:
    labels = {"program": status["program"], "version": status["version"]}
    out.gauge("dsnat_build_info", "Always 1; the labels say what runs.", 1, **labels)
    if "uptime_s" in status:
        out.gauge("dsnat_uptime_seconds", "Since the engine started.", status["uptime_s"])
    out.gauge("dsnat_table_records_max", "Size of the session table.", status["max_sessions"])
    text = "1 while every packet is accounted for."
    out.gauge("dsnat_equation_holds", text, int(status["equation"]))
    text = "1 while the kernel keeps all ports because DPDK did not start."
    out.gauge("dsnat_degraded", text, int(status["degraded"]))
    text = "Number of the configuration in force; -1: not kept in generations."
    out.gauge("dsnat_configuration_generation", text, generation())


def _worker(out: Page, one: Json) -> None:
    worker = one["worker"]
    out.gauge("dsnat_worker_up", "1 when the worker answers.", int(one["answers"]), worker=worker)
    if not one["answers"]:
        return
    c = one["counters"]
    text = "Packets by what came of them; received + taken_over = the sum of the others + dropped + held."
    for result in ("received", "taken_over", "forwarded", "passed", "handed_over", "made"):
        out.counter("dsnat_packets_total", text, c[result], worker=worker, result=result)
    for cause, count in c["handed_over_by_cause"].items():
        text = "Packets handed to another worker, by cause."
        out.counter("dsnat_handed_over_packets_total", text, count, worker=worker, cause=cause)
    for reason, count in c["reasons"].items():
        text = "Packets that were dropped or passed, by reason; see `dsnatctl show counters`."
        out.counter("dsnat_reason_packets_total", text, count, worker=worker, reason=reason)
    out.counter("dsnat_dropped_packets_total", "Packets dropped, all reasons.", c["dropped"], worker=worker)
    out.gauge("dsnat_held_packets", "Packets that wait.", c["held"], worker=worker)
    out.gauge("dsnat_sessions", "Live sessions.", c["sessions"], worker=worker)
    text = "Records of the session table in use: sessions, mappings and permits."
    out.gauge("dsnat_table_records", text, c["records"], worker=worker)
    text = "Events that the journal was not told of, because there were too many."
    out.counter("dsnat_journal_events_lost_total", text, c["events_lost"], worker=worker)
    buckets = [
        ("+Inf" if end_ns is None else f"{end_ns / 1e9:g}", n) for end_ns, n in c["allocation"]["buckets"]
    ]
    text = "Time to give a new session its address and port, refusals included."
    spent_s = c["allocation"]["sum_ns"] / 1e9
    out.histogram("dsnat_allocation_duration_seconds", text, buckets, spent_s, worker=worker)
    for event in ("expired", "closed"):
        text = "Sessions by how they ended."
        out.counter("dsnat_sessions_ended_total", text, c[f"sessions_{event}"], worker=worker, how=event)
    for protocol, traffic in c["traffic"].items():
        labels = {"worker": worker, "protocol": protocol}
        text = "Sessions made."
        out.counter("dsnat_sessions_created_total", text, traffic["sessions_created"], **labels)
        for direction in ("out", "in"):
            text = "Packets translated; out is from inside to outside."
            count = traffic[f"packets_{direction}"]
            out.counter("dsnat_translated_packets_total", text, count, direction=direction, **labels)
            text = "IPv4 bytes translated; out is from inside to outside."
            count = traffic[f"bytes_{direction}"]
            out.counter("dsnat_translated_bytes_total", text, count, direction=direction, **labels)
    for key, name, text in (
        ("busy_ns", "dsnat_worker_busy_seconds_total", "Time with packets."),
        ("idle_ns", "dsnat_worker_idle_seconds_total", "Time without."),
    ):
        if key in one:
            out.counter(name, text, one[key] / 1e9, worker=worker)
    for key in ("bursts", "cycles", "sleeps"):
        if key in one:
            text = f"What the worker has had of {key}."
            out.counter(f"dsnat_worker_{key}_total", text, one[key], worker=worker)


def _pool(out: Page, pool: Json) -> None:
    name = pool["name"]
    text = "1 while the pool is in service here (see active_while)."
    out.gauge("dsnat_pool_active", text, int(pool["active"]), pool=name)
    out.gauge("dsnat_pool_addresses", "Addresses of the pool.", pool["n_addresses"], pool=name)
    out.gauge("dsnat_pool_addresses_draining", "Of them draining.", pool["n_draining"], pool=name)
    out.gauge("dsnat_pool_sessions", "Live sessions.", pool["sessions"], pool=name)
    text = "Public ports of the pool, for each protocol."
    out.gauge("dsnat_pool_ports", text, pool["n_ports"], pool=name, mapping=pool["mapping"])
    for protocol, count in pool["mappings"].items():
        text = "Endpoint-independent mappings: each holds one public port."
        out.gauge("dsnat_pool_mappings", text, count, pool=name, protocol=protocol)
    out.counter("dsnat_pool_sessions_created_total", "Sessions made.", pool["created"], pool=name)
    text = "Times that an address had no free port towards the remote."
    out.counter("dsnat_pool_no_port_total", text, pool["refused"], pool=name)
    for a in pool["addresses"]:
        labels = {"pool": name, "address": a["address"]}
        out.gauge("dsnat_address_sessions", "Live sessions.", a["sessions"], **labels)
        out.counter("dsnat_address_sessions_created_total", "Sessions made.", a["created"], **labels)
        out.counter("dsnat_address_no_port_total", text, a["refused"], **labels)


def _vrrp(out: Page, pools: list[Json]) -> None:
    """The gateway is master for an address that it holds; the pools that follow the address say so."""
    for address, active in {p["active_while"]: p["active"] for p in pools if "active_while" in p}.items():
        text = "1 while this gateway holds the VRRP address that pools follow (active_while)."
        out.gauge("dsnat_vrrp_master", text, int(active), address=address)


def _nat_log(out: Page, log: Json) -> None:
    for w in log["workers"]:
        for event, count in w["told"].items():
            text = "Events of the NAT log that the worker told."
            out.counter("dsnat_log_events_total", text, count, worker=w["worker"], event=event)
            text = "Events of the NAT log lost in the worker, because the log thread was too slow."
            lost = w["lost"][event]
            out.counter("dsnat_log_events_lost_total", text, lost, worker=w["worker"], event=event)
    for c in log["collectors"]:
        labels = {key: c[key] for key in ("collector", "protocol", "transport")}
        text = "1 while nothing says that the collector is away."
        out.gauge("dsnat_log_collector_up", text, int(c["up"]), **labels)
        text = "Records sent to the collector; over TCP those that it has acknowledged."
        out.counter("dsnat_log_records_sent_total", text, c["records_sent"], **labels)
        for cause, key in (("queue_full", "records_lost"), ("refused", "records_refused")):
            text = (
                "Records that the collector has missed: the queue was full, or its host refused them (UDP)."
            )
            out.counter("dsnat_log_records_lost_total", text, c[key], cause=cause, **labels)
        out.gauge("dsnat_log_queue_records", "Records that wait.", c["records_queued"], **labels)
        out.gauge("dsnat_log_queue_bytes", "Bytes that wait.", c["bytes_queued"], **labels)
        text = "Times that the network took less than there was."
        out.counter("dsnat_log_stalls_total", text, c["stalls"], **labels)
        text = "Connections made; over UDP how often the collector came back, and the first time."
        out.counter("dsnat_log_connections_total", text, c["connections"], **labels)


def _sync(out: Page, sync: Json) -> None:
    text = "1 when there is a peer to share sessions with."
    out.gauge("dsnat_sync_configured", text, int(sync["configured"]))
    for key, text in (
        ("connected", "1 while the peer is heard; 0 also without a peer."),
        ("in_sync", "1 while both tables are equal; 0 also without a peer."),
    ):
        out.gauge(f"dsnat_sync_{key}", text, int(sync.get(key, False)))
    if not sync["configured"]:
        return
    out.gauge("dsnat_sync_lag_seconds", "Age of the oldest change not yet told.", sync["lag_ms"] / 1000)
    out.gauge("dsnat_sync_waiting_sessions", "Changes that wait to be told.", sync["waiting"])
    out.gauge("dsnat_sync_differing_ranges", "Ranges of the table that differ.", sync["differences"])
    for key in ("told", "heard"):
        text = "Sessions told to the peer, and heard from it."
        out.counter("dsnat_sync_sessions_total", text, sync[key], direction=key)


def _port(out: Page, port: Json) -> None:
    if "up" not in port:
        return
    name = port["name"]
    out.gauge("dsnat_port_up", "1 with link.", int(port["up"]), port=name, role=port["role"])
    for direction in ("rx", "tx"):
        text = "Frames of the port."
        out.counter(
            "dsnat_port_packets_total", text, port[f"{direction}_packets"], port=name, direction=direction
        )
        text = "Bytes of the port."
        out.counter(
            "dsnat_port_bytes_total", text, port[f"{direction}_bytes"], port=name, direction=direction
        )
        text = "Frames with errors."
        out.counter(
            "dsnat_port_errors_total", text, port[f"{direction}_errors"], port=name, direction=direction
        )
    out.counter(
        "dsnat_port_missed_total", "Frames that the engine was too slow for.", port["rx_missed"], port=name
    )
    for direction in ("to", "from"):
        text = "Frames to and from the kernel's twin of the port."
        count = port[f"twin_{direction}_packets"]
        out.counter("dsnat_twin_packets_total", text, count, port=name, direction=direction)


def scrape(path: str) -> str:
    try:
        with Engine(path, timeout_s=5.0) as engine:
            shows = ("workers", "zones", "ports", "counters", "sync", "pools")
            requests: list[Json] = [{"cmd": "show", "what": what} for what in shows]
            requests[-1]["small"] = ADDRESSES_MAX
            *answers, status = engine.ask_all([*requests, {"cmd": "status"}])
            return page({"status": status, **dict(zip(shows, answers, strict=True))})
    except (Unreachable, Refused) as error:
        return down(str(error))
    except STRANGE as error:
        return down(strange(path, error))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], path: str) -> None:
        self.path = path
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "there is only /metrics here")
            return
        body = scrape(self.server.path).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is not worth a line in the journal."""
