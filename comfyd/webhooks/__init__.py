"""Delivering webhooks: signed, tried again for three days, each receiver apart; never decides what is owed.

What is owed stands in the database (the outbox), and what is said in a message is for somebody else to write:
this package takes what is due, sends it, and records what came of it.
"""

from comfyd.webhooks.deliverer import Deliverer
from comfyd.webhooks.lanes import AT_ONCE
from comfyd.webhooks.sender import Render, Sender
from comfyd.webhooks.signing import Signatures, secret_of

__all__ = ["AT_ONCE", "Deliverer", "Render", "Sender", "Signatures", "secret_of"]
