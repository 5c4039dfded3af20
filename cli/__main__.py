"""`python -m vqguard.cli`: how `torchrun -m` and `accelerate launch -m` start the program."""

import sys

from vqguard.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
