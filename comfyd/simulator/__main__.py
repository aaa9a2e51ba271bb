"""`python -m comfyd.simulator`. Holds nothing but the call."""

import sys

from comfyd.simulator.command import main

if __name__ == "__main__":
    sys.exit(main())
