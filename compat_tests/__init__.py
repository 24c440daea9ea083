"""CPython's own pool and executor tests, run against a drop-in; see README.md in this folder.

Holds no line of CPython's code: every test comes from the `test` package of the interpreter that runs it.
Called by `python -m compat_tests`, by pytest (test_compat.py, test_harness.py) and by sid.sh.
"""
