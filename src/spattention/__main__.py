"""`python -m spattention`, which is what `torchrun -m spattention` runs."""

import sys

from .cli import main

sys.exit(main())
