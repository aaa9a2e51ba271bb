"""Files that clients bring, each under the digest of its content; never a name or a type that a client gave.

What is on its way in lies beside the uploads, and becomes one only when it is whole, synced and looked at.
"""

from comfyd.uploads.uploads import (
    REFERENCE,
    Received,
    Upload,
    Uploads,
    open_uploads,
    parse_reference,
    too_large,
    too_many_pixels,
)

__all__ = [
    "REFERENCE",
    "Received",
    "Upload",
    "Uploads",
    "open_uploads",
    "parse_reference",
    "too_large",
    "too_many_pixels",
]
