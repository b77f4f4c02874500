"""What this package promises of its answers, tried at length.

`pytest tests/reliability` runs each check in a short form; `python -m tests.reliability.run` runs them in full
and keeps the record in benchmarks/results/reliability.json, from which the README's table is made.
"""
