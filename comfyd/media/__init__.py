"""Looks into pictures, sounds and videos: what a file is, what it is like, converted, without its metadata.

Plain functions on paths, to be run in a thread; never a whole film in memory, never a network, and nothing
is raised but `MediaError`. libav and Pillow are loaded when a file needs them, not at the start.
"""

from comfyd.media.conversion import convert
from comfyd.media.endings import is_whole
from comfyd.media.facts import Facts, facts
from comfyd.media.kinds import Kind, Sniffed, sniff
from comfyd.media.stripping import strip

__all__ = [
    "Facts",
    "Kind",
    "Sniffed",
    "convert",
    "facts",
    "is_whole",
    "sniff",
    "strip",
]
