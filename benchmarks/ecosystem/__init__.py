"""Programs that use transformers models, run on this package's models and compared with transformers' own.

    pip install -r benchmarks/ecosystem/requirements.txt
    python -m benchmarks.ecosystem.run

Each script runs one program twice: on the shipped model with offloaded experts, and on its twin (`twin.py`),
transformers' own model with the same weights. It prints a line for each check, and exits with 1 if a check
fails. A program that is not installed is skipped with a notice. `modelling_tests.py` runs transformers' own
tests.
"""

import os
import sys

# Everything here is local. Set before the programs are imported, and only if a script of this folder is the
# main program (argv is "-m" while Python looks for it): an import, as by the tests, changes no environment.
if sys.argv[0] == "-m":
    for _name, _value in (
        ("HF_HUB_OFFLINE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("GRADIO_ANALYTICS_ENABLED", "False"),
    ):
        os.environ.setdefault(_name, _value)
