"""What this package promises of its answers, tried at length.

`pytest tests/reliability` runs each check in a short form, `python -m tests.reliability.run` in full; that
one keeps the record in benchmarks/results/reliability.json, from which the README's table is made.
"""
