"""What this computer is called in its networks."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Never reached: choosing a route sends nothing (RFC 5737 and RFC 3849 keep these for examples).
_FAR_AWAY = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def local_addresses() -> list[IPAddress]:
    """All addresses of this computer, loopback included; the one that reaches others first."""
    found = [address for family, far in _FAR_AWAY if (address := _outgoing(family, far))]
    found += _interface_addresses()
    found += [ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1")]
    return list(dict.fromkeys(found))


def lan_address() -> IPAddress:
    """The address under which others most likely reach this computer; IPv4 where there is one."""
    reachable = [address for address in local_addresses() if not address.is_loopback]
    reachable = [address for address in reachable if not address.is_link_local] or reachable
    reachable.sort(key=lambda address: address.version)  # stable: the outgoing one stays first
    return reachable[0] if reachable else ipaddress.IPv4Address("127.0.0.1")


def local_names() -> list[str]:
    """Names under which this computer may be known."""
    name = socket.gethostname().lower()
    if not name or name == "localhost":
        return ["localhost"]
    names = [name, name.partition(".")[0] + ".local", "localhost"]
    return list(dict.fromkeys(names))


def _outgoing(family: socket.AddressFamily, far: str) -> IPAddress | None:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((far, 9))
        return ipaddress.ip_address(probe.getsockname()[0])
    return None


def _interface_addresses() -> list[IPAddress]:
    """All addresses of all interfaces, IPv4 first; none where the system does not list them."""
    import ifaddr

    try:
        interfaces = list(ifaddr.get_adapters())
    except OSError:
        return []
    texts = [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]  # with flow and scope for IPv6
        for interface in interfaces
        for ip in interface.ips
    ]
    return sorted(map(ipaddress.ip_address, texts), key=lambda address: address.version)
