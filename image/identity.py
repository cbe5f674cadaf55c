"""Who a gateway is: host name, management interface, SSH host key, authorised keys.

An identity is made before the gateway first boots, and the public half of its host key goes where its
operator looks it up, so nobody ever has to trust a key on first use. It reaches the gateway as systemd
system credentials: SMBIOS strings for a virtual machine (boot.py), files on the ESP for a disk (flash.py).
The names are systemd's own where it has one (system.hostname, network.*, ssh.authorized_keys.root);
/usr/lib/dsnat/identity in the image reads the rest.
"""

from __future__ import annotations

import ipaddress
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """`host_key` is an OpenSSH private key; `management` is the MAC of the management NIC; `address` with
    its prefix length, or empty for DHCP.
    """

    hostname: str
    host_key: str
    host_key_public: str
    authorized_keys: str
    management: str
    address: str = ""
    gateway: str = ""

    def known_hosts(self, host: str, port: int = 22) -> str:
        """The line of a known_hosts file by which clients know this gateway from its birth."""
        name = host if port == 22 else f"[{host}]:{port}"
        return f"{name} {' '.join(self.host_key_public.split()[:2])}\n"

    def credentials(self) -> dict[str, str]:
        """Name and content of every credential."""
        lines = [
            "[Match]",
            f"PermanentMACAddress={self.management}",
            "",
            "[Network]",
            "LinkLocalAddressing=ipv6",
        ]
        if self.address:
            lines.append(f"Address={ipaddress.ip_interface(self.address)}")
            if self.gateway:
                lines.append(f"Gateway={ipaddress.ip_address(self.gateway)}")
        else:
            # Management must not become the way that translated packets leave by: a high metric, no name
            # servers.
            lines += ["DHCP=ipv4", "", "[DHCPv4]", "RouteMetric=4096", "UseDNS=no", "UseHostname=no"]
        return {
            "system.hostname": self.hostname,
            "network.link.10-management": f"[Match]\nPermanentMACAddress={self.management}\n\n"
            "[Link]\nName=mgmt0\nGenericReceiveOffload=no\nLargeReceiveOffload=no\n",
            "network.network.10-management": "\n".join([*lines, ""]),
            # The other NICs are left alone until a configuration says what they are for.
            "network.network.90-unconfigured": "[Match]\nName=mgmt0\n",
            "dsnat.ssh_host_ed25519_key": self.host_key,
            "ssh.authorized_keys.root": self.authorized_keys,
        }


def make_identity(
    hostname: str, authorized_keys: str, *, management: str, address: str = "", gateway: str = ""
) -> Identity:
    """A new identity with a host key of its own."""
    with tempfile.TemporaryDirectory(prefix="dsnat-identity-") as folder:
        key = Path(folder) / "key"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", hostname, "-f", str(key)], check=True
        )
        public = key.with_suffix(".pub").read_text()
        return Identity(hostname, key.read_text(), public, authorized_keys, management, address, gateway)
