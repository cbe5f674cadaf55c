"""What one word of `fleet.yaml` may look like: names, addresses, times, keys.

Every pattern is narrow on purpose: what passes it can be written into a generated file without quoting
tricks, and render.py checks again. Each is a type for model.py: it takes text as it stands in the file, says
in one sentence what it should be, and gives editors its pattern. Most stay text; prefixes and addresses
become numbers that can be compared.
"""

from __future__ import annotations

import re
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function


class _Matching:
    """Text that matches in full, else a ValueError that says what it should be. Editors get the pattern
    too.
    """

    def __init__(self, pattern: str, what: str) -> None:
        self.pattern, self.what = pattern, what

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"this must be text: {self.what}")
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f'"{value}" is not {self.what}')
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^({self.pattern})$", "description": self.what}


_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"(\d{1,9})(ms|s|m|h|d)")


def milliseconds(duration: str) -> int:
    """`90s` -> 90000. The text was checked when it was read."""
    match = _DURATION.fullmatch(duration)
    assert match is not None, duration
    return int(match[1]) * _UNITS_MS[match[2]]


def _network(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("this must be a prefix such as 100.64.0.0/16")
    try:
        exact = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f'"{value}" is not a prefix such as 100.64.0.0/16') from None
    if not isinstance(exact, IPv4Network):
        raise ValueError(f"{value} is IPv6; zones and pools are IPv4")
    if str(exact) != value and value != str(exact.network_address):
        raise ValueError(f"{value} is not the start of its prefix; write {exact}")
    return exact


def _interface(value: Any) -> Any:
    if not isinstance(value, str) or "/" not in value:
        raise ValueError("this must be an address with its prefix length such as 100.64.0.1/24")
    try:
        return ip_interface(value)
    except ValueError:
        raise ValueError(
            f'"{value}" is not an address with its prefix length such as 100.64.0.1/24'
        ) from None


def _span(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("this must be an address, a range a.b.c.d-e.f.g.h or a prefix")
    span(value)
    return value


def span(text: str) -> tuple[int, int]:
    """First and last address of `203.0.113.7`, `203.0.113.8-203.0.113.15` or `203.0.113.64/28`."""
    try:
        if "-" in text:
            low, _, high = text.partition("-")
            first, last = int(IPv4Address(low)), int(IPv4Address(high))
        else:
            network = IPv4Network(text, strict=False)
            if str(network.network_address) != text.partition("/")[0]:
                raise ValueError(f"{text} is not the start of its prefix; write {network}")
            first, last = int(network.network_address), int(network.broadcast_address)
    except ValueError as error:
        if "start of its prefix" in str(error):
            raise
        raise ValueError(f'"{text}" is not an IPv4 address, a range a.b.c.d-e.f.g.h or a prefix') from None
    if last < first:
        raise ValueError(f"the range {text} ends before it starts; swap its ends")
    return first, last


def _ports(value: Any) -> Any:
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("this must be a port range such as 1024-65535")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{value} is not a port range within 1-65535")
    return value


def _workers(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64):
        return value
    raise ValueError("this must be auto or a number of workers from 1 to 64")


def _host(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return str(ip_address(value))
        except ValueError:
            if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", value):
                return value
    raise ValueError("this must be an address or a host name")


Name = Annotated[
    str,
    _Matching(r"[A-Za-z][A-Za-z0-9_-]{0,30}", "a name (a letter, then letters, digits, _ and -; at most 31)"),
]
InterfaceName = Annotated[
    str,
    _Matching(
        r"[A-Za-z][A-Za-z0-9_.-]{0,14}",
        "an interface name (a letter, then letters, digits, _ . and -; at most 15)",
    ),
]
Duration = Annotated[str, _Matching(_DURATION.pattern, "a time such as 500ms, 60s, 5m or 2h")]
Prefix = Annotated[
    IPv4Network, PlainValidator(_network), PlainSerializer(str), WithJsonSchema({"type": "string"})
]
Destination = Annotated[
    str, BeforeValidator(lambda value: value if value == "default" else str(_network(value)))
]
Address = Annotated[
    IPv4Interface | IPv6Interface,
    PlainValidator(_interface),
    PlainSerializer(str),
    WithJsonSchema({"type": "string"}),
]
Span = Annotated[str, BeforeValidator(_span)]
Ports = Annotated[str, BeforeValidator(_ports)]
Workers = Annotated[int | str, BeforeValidator(_workers)]
Host = Annotated[str, BeforeValidator(_host)]
PublicKey = Annotated[
    str,
    _Matching(
        r"(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)|rsa-sha2-(256|512)|ssh-rsa|sk-ssh-ed25519@openssh\.com)"
        r" [A-Za-z0-9+/]{16,}={0,3}( [A-Za-z0-9@._+-]{1,64})?",
        "a public key line: its type, its base64 text, perhaps a comment",
    ),
]
HostKey = Annotated[
    str,
    _Matching(
        r"ssh-ed25519 [A-Za-z0-9+/]{16,}={0,3}( [A-Za-z0-9@._+-]{1,64})?",
        "an ed25519 host key (the line in the gateway's ssh_host_ed25519_key.pub)",
    ),
]
SecretRef = Annotated[
    str,
    _Matching(
        r"(env:[A-Za-z_][A-Za-z0-9_]*|file:[^\x00-\x1f]+|age:[^\x00-\x1f]+)",
        "a reference to a secret (env:NAME, file:PATH or age:PATH); the secret itself never stands here",
    ),
]
Device = Annotated[
    str,
    _Matching(
        r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]|net_[a-z0-9_]{1,24}(,[A-Za-z0-9_=:./-]+)*",
        'a PCI address such as "0000:00:03.0" or a DPDK virtual device such as net_tap0,iface=tap0',
    ),
]
Endpoint = Annotated[
    str,
    _Matching(
        r"(\d{1,3}\.){3}\d{1,3}(:[1-9]\d{0,4})?", 'an IPv4 address and a port, such as "192.0.2.10:4739"'
    ),
]
As = Annotated[int, Field(ge=1, le=4_294_967_295)]
Weight = Annotated[int, Field(ge=0, le=100)]
