"""Tells MP3 and AAC streams from noise by two frames in a row; never looks further than it is given.

Frame headers after ISO 11172-3 section 2.4.2.3 and ISO 13818-7 section 6.2.
"""

from typing import Final

# kbit/s of layer III by the header's index; 0 is free format and 15 forbidden: neither is taken for sound
_RATES_1: Final = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_RATES_2: Final = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_SAMPLES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def is_mp3(head: bytes) -> bool:
    """Whether this start of a file is a frame of MPEG layer III, and another one follows, or the end."""
    length = _frame_length(head)
    return length > 0 and (len(head) <= length or _frame_length(head[length : length + 4]) > 0)


def is_adts(head: bytes) -> bool:
    """Whether this start of a file is an ADTS frame of AAC, and another one follows, or the end."""
    length = _adts_length(head)
    return length > 0 and (len(head) <= length or _adts_length(head[length : length + 7]) > 0)


def _frame_length(header: bytes) -> int:
    """Bytes of the frame that starts here; 0 if none does."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    rate = (_RATES_1 if version == 3 else _RATES_2)[header[2] >> 4] * 1000
    index = header[2] >> 2 & 3
    if version == 1 or index == 3 or rate == 0:
        return 0
    return (144 if version == 3 else 72) * rate // _SAMPLES[version][index] + (header[2] >> 1 & 1)


def _adts_length(header: bytes) -> int:
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or header[2] >> 2 & 15 > 12:
        return 0
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return length if length >= 7 else 0
