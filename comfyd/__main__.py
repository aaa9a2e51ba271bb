"""`python -m comfyd`; never more than the command itself."""

import sys

from comfyd.cli import main

if __name__ == "__main__":
    sys.exit(main())
