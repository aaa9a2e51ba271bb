"""Signed urls of Google Cloud Storage (version 4), made on this machine; never makes a request.

The driver has its own, which reads the private key anew for each url (30 ms of the event loop) and leads to
Google whatever the endpoint is. https://cloud.google.com/storage/docs/access-control/signing-urls-manually
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, urlencode

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from yarl import URL

REMEMBERED: Final = 4096
"""Urls that are kept to be given again."""
STEADY: Final = 300
"""Seconds, at most, that the same url is given again, but never more than a tenth of its life."""


class Signing:
    """What signs the urls of one bucket for a service account. Lives as long as its storage."""

    def __init__(self, email: str, key: rsa.RSAPrivateKey, root: str, bucket: str) -> None:
        self._email = email
        self._key = key
        self._root = URL(root)
        self._bucket = bucket
        self._signed = lru_cache(REMEMBERED)(self._sign)

    def url(self, name: str, now: int, seconds: int) -> str:
        """Where everybody can read this object for so many seconds, a tenth less at most; `now` is in ms.

        To sign takes a while, and browsers keep what is behind a url that they know: so it stays the same for
        some time, and is never good for longer than was asked for.
        """
        moment = now // 1000
        return self._signed(name, moment - moment % max(1, min(STEADY, seconds // 10)), seconds)

    def _sign(self, name: str, moment: int, seconds: int) -> str:
        at = datetime.fromtimestamp(moment, UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{at[:8]}/auto/storage/goog4_request"
        host = self._root.raw_authority
        path = f"{self._root.raw_path.rstrip('/')}/{self._bucket}/{quote(name, safe='/~')}"
        query = urlencode(  # in the order of its names, as it is signed
            {
                "X-Goog-Algorithm": "GOOG4-RSA-SHA256",
                "X-Goog-Credential": f"{self._email}/{scope}",
                "X-Goog-Date": at,
                "X-Goog-Expires": seconds,
                "X-Goog-SignedHeaders": "host",
            },
            quote_via=quote,
            safe="",
        )
        request = f"GET\n{path}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
        text = f"GOOG4-RSA-SHA256\n{at}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()).hex()
        return f"{self._root.scheme}://{host}{path}?{query}&X-Goog-Signature={signature}"


def signing(service: Mapping[str, Any], root: str, bucket: str) -> Signing | None:
    """What signs with these credentials; None for all but a service account's, which hold no key.

    Checks the key, which takes tens of milliseconds. Raises `ValueError` for one that cannot be used.
    """
    if service.get("type") != "service_account":
        return None
    email, pem = service.get("client_email"), service.get("private_key")
    if not isinstance(email, str) or not isinstance(pem, str):
        raise ValueError("no e-mail address or no private key")  # noqa: TRY004 - a file is wrong, not a type
    try:
        key = serialization.load_pem_private_key(pem.encode(), None)
    except (TypeError, UnsupportedAlgorithm) as error:  # it has a password, or is of a kind of its own
        raise ValueError("not a private key that can be used") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError("not an RSA key")  # noqa: TRY004 - see above
    return Signing(email, key, root, bucket)
