"""The intended differences from joblib's own tests: those that dpool does not pass, each with the reason.

Nothing that dpool should pass belongs here. A test that passes though listed here fails the run. Called by __main__.py,
for the target dpool only.
"""

from __future__ import annotations

_SEVERAL = "expects the refusal of loky's one executor: with dpool, several generators are consumed at once"
_NAMELESS = "looks for files or folders of stored arrays: dpool's have no name, so that nothing can be left behind"
_NESTED = "expects a warning that the nested call runs one job: in dpool, also below threads, it runs in parallel"

# The test's name, and why dpool does not mean to pass.
DIFFERENCES: tuple[tuple[str, str], ...] = (
    ("test_multiple_generator_call_separated_gc[generator-generator-dpool-True]", _SEVERAL),
    ("test_multiple_generator_call_separated_gc[generator-generator_unordered-dpool-True]", _SEVERAL),
    ("test_multiple_generator_call_separated_gc[generator_unordered-generator-dpool-True]", _SEVERAL),
    ("test_multiple_generator_call_separated_gc[generator_unordered-generator_unordered-dpool-True]", _SEVERAL),
    ("test_nested_parallel_warnings[dpool-multiprocessing-True]", _NESTED),
    ("test_nested_parallel_warnings[threading-dpool-True]", _NESTED),
    ("test_memmapping_leaks[dpool]", _NAMELESS),
    ("test_parallel_config_no_backend", _NAMELESS),
    ("test_parallel_isolated_temp_folders[dpool]", _NAMELESS),
    ("test_memmapping_temp_folder_thread_safety", _NAMELESS),
    ("test_child_raises_parent_exits_cleanly[dpool]", _NAMELESS),
)


def reason(test: str) -> str | None:
    """Why `test` (file::name[parameters]) is meant to fail, or None if it is meant to pass."""
    return _REASONS.get(test.partition("::")[2])


_REASONS = dict(DIFFERENCES)
