"""Masquerading: one nftables table of our own, replaced as a whole.

Each rule bears its network as a comment, which is what it is known by again (nft(8), libnftables-json(5)).
"""

from __future__ import annotations

import json
from typing import Any

TABLE = "gcs"
LIST = ["nft", "-j", "list", "table", "inet", TABLE]
LOAD = ["nft", "-f", "-"]
NO_TABLE = "No such file or directory"
"""What LIST says where there is none."""

FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


def ruleset(networks: tuple[str, ...]) -> bytes:
    """Commands for LOAD, carried out as one: the table with exactly these; without any there is none."""
    # A table is declared before it is deleted, since deleting one that is not there is an error.
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}"]
    if networks:
        lines += [f"table inet {TABLE} {{", " chain postrouting {"]
        lines += ["  type nat hook postrouting priority srcnat; policy accept;"]
        for each in networks:
            ip = "ip6" if ":" in each else "ip"
            lines.append(f'  {ip} saddr {each} {ip} daddr != {each} masquerade comment "{each}"')
        lines += [" }", "}"]
    return "".join(f"{line}\n" for line in lines).encode()


def parse(output: bytes) -> tuple[str, ...]:
    """The networks that are masqueraded, of what LIST prints."""
    try:
        items: list[Any] = json.loads(output)["nftables"]
        rules = [item["rule"] for item in items if "rule" in item]
        return tuple(str(rule["comment"]) for rule in rules if "comment" in rule)
    except (ValueError, KeyError, TypeError):
        return ()


def forwarding(networks: tuple[str, ...]) -> dict[str, str]:
    """The sysctls that let packets of these networks through."""
    return {FORWARDING[6 if ":" in each else 4]: "1" for each in networks}
