"""`python -m peft_fast` and the `peft-fast` script."""

import sys

from peft_fast.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
