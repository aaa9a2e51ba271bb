"""The only way out for urls that clients give; never knows what they are for.

`Guard` says where such a url may lead. `open_client` opens the HTTP client that goes nowhere else: what it
judges is the address of every socket, right before that connects, so that no spelling, no answer of a name
server and no redirect can lead it past the guard.
"""

from comfyd.guard.client import GuardedClient, Lookup, Reply, open_client
from comfyd.guard.names import SystemNames
from comfyd.guard.policy import Guard, parse_allow

__all__ = ["Guard", "GuardedClient", "Lookup", "Reply", "SystemNames", "open_client", "parse_allow"]
