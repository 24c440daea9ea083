"""Owns the benchmarks: what is measured (cases/), against whom (targets.py), how (runner.py), and how it is shown.

It is never imported by dpool or needed to use it. Run by people: python -m benchmarks --help.
"""
