"""What a pod's containers find in /etc: hosts(5), hostname(5) and resolv.conf(5). Pure functions."""

from __future__ import annotations

from protocol.pods import Dns, HostsEntry

_LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def hosts(hostname: str, domainname: str, address: str, entries: tuple[HostsEntry, ...]) -> str:
    """``domainname`` may be empty, or what follows the first dot of ``hostname``."""
    short, _, rest = hostname.partition(".")
    domain = domainname or rest
    own = [f"{short}.{domain}", short] if domain else [hostname]
    if hostname not in own:
        own.insert(0, hostname)
    lines = [_line(address, own)]
    lines += [_line(entry.address, _with_short_names(entry.names, domain)) for entry in entries]
    return _LOCAL + "".join(lines)


def resolv_conf(dns: Dns) -> str:
    """Empty when there is nothing to say."""
    lines = [f"nameserver {address}\n" for address in dns.nameservers]
    for keyword, words in (("search", dns.search), ("options", dns.options)):
        if words:
            lines.append(f"{keyword} {' '.join(words)}\n")
    return "".join(lines)


def _with_short_names(names: tuple[str, ...], domain: str) -> list[str]:
    found = list(names)
    for name in names:
        short = name.removesuffix(f".{domain}") if domain else name
        if short != name and "." not in short:
            found.append(short)
    return list(dict.fromkeys(found))


def _line(address: str, names: list[str]) -> str:
    return f"{address}\t{' '.join(names)}\n"
