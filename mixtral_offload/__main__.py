"""`python -m mixtral_offload` is `mixtral-offload`."""

import sys

from .cli import main

sys.exit(main())
