"""Who may ask: ComfyUI's check of Host against Origin, and 0.33.0's of Sec-Fetch-Site.

Only a loopback Host is checked; nothing else about a request is.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from comfyd.simulator.options import Flavor


def refused(headers: Mapping[str, str], flavor: Flavor) -> bool:
    """Whether a request with these headers is answered with an empty 403."""
    if flavor.cross_site_refused and headers.get("Sec-Fetch-Site") == "cross-site":
        return True
    if "Host" not in headers or "Origin" not in headers:
        return False
    host = urlsplit(f"//{headers['Host'].lower()}")
    origin = urlsplit(headers["Origin"].lower())
    if not is_loopback(host.hostname) or not origin.hostname:
        return False
    if host.hostname != origin.hostname:
        return True
    return host.port is not None and origin.port is not None and host.port != origin.port


def is_loopback(host: str | None) -> bool:
    """Whether a Host names this machine itself."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
