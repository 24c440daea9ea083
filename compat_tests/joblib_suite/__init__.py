"""joblib's own tests, from the installed package, run against the backend "dpool"; see ../README.md.

Holds no line of joblib's code. Called by `python -m compat_tests --family joblib` and by pytest (test_joblib_suite.py).
"""
