"""`gated.py SOCKET CALL,CALL -m MODULE | SCRIPT [ARGUMENT...]`: become this, behind the gate of `gate.py`.

Runs in a process of its own, before anything of comfyd is imported; needs nothing but Python and Linux.
"""

import ctypes
import os
import platform
import runpy
import socket
import struct
import sys
from pathlib import Path
from typing import Final

NUMBERS: Final = {
    "x86_64": {"write": 1, "pwrite64": 18, "fsync": 74, "fdatasync": 75, "seccomp": 317},
    "aarch64": {"write": 64, "pwrite64": 68, "fsync": 82, "fdatasync": 83, "seccomp": 277},
}[platform.machine()]
CALLS: Final = {number: name for name, number in NUMBERS.items()}

NO_NEW_PRIVILEGES: Final = 38
SET_FILTER: Final = 1
NEW_LISTENER: Final = 8
ALLOW: Final = 0x7FFF0000
ASK: Final = 0x7FC00000

LOAD: Final = 0x20
EQUALS: Final = 0x15
RETURN: Final = 0x06


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def shut(names: list[str]) -> int:
    """From now on this thread and all that it starts ask before these calls; answers whom they ask."""
    code = [struct.pack("=HBBI", LOAD, 0, 0, 0)]  # the number of the call
    for name in names:
        code.append(struct.pack("=HBBI", EQUALS, 0, 1, NUMBERS[name]))
        code.append(struct.pack("=HBBI", RETURN, 0, 0, ASK))
    code.append(struct.pack("=HBBI", RETURN, 0, 0, ALLOW))
    held = ctypes.create_string_buffer(b"".join(code))
    program = _Program(len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(NUMBERS["seccomp"], SET_FILTER, NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def main() -> None:
    """Shut the gate, hand its key over, and become what was asked for."""
    channel, names, *arguments = sys.argv[1:]
    with socket.socket(fileno=int(channel)) as opened:
        listener = shut(names.split(","))
        socket.send_fds(opened, [b"k"], [listener])
    os.close(listener)
    sys.path[0] = str(Path.cwd())  # and not the folder of this file, which has a module of comfyd's name
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
