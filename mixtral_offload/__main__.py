"""`python -m mixtral_offload` is `mixtral-offload`."""

import sys

from mixtral_offload.apps.cli import main

sys.exit(main())
