"""The intended differences from joblib's own tests: those that dpool does not pass, each with the reason.

Nothing that dpool should pass belongs here. A test that passes though listed here fails the run. Called by __main__.py,
for the target dpool only.
"""

from __future__ import annotations

import os

from compat_tests.engines import INSIDE

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

_MAPPED = "looks for a numpy.memmap: a cluster's workers get large arrays read-only, but the file is on another machine"
_CAPACITY = "expects n_jobs=-1 of threads to be that of the default backend, which here is the cluster's"
_LOG = "looks for what multiprocessing logs when workers are started, which the nodes do"
_FILES = "expects workers to see the files of the program's machine"
_LOKY = "starts loky in a task: its processes look for modules on their own machine's disk"

# The same for a cluster,
ON_A_CLUSTER: tuple[tuple[str, str], ...] = (
    ("test_auto_memmap_on_arrays_from_generator[dpool]", _MAPPED),
    ("test_memmap_returned_as_regular_array[dpool]", _MAPPED),
    ("test_parallel_memmap2d_as_memmap_1d_base", _MAPPED),
    ("test_multithreaded_parallel_termination_resource_tracker_silent", _MAPPED),
    ("test_managed_backend_reuse_temp_folder[dpool]", _MAPPED),
    ("test_direct_mmap", _MAPPED),
    ("test_effective_n_jobs_None[negative-int-parallel_config]", _CAPACITY),
    ("test_effective_n_jobs_None[negative-int-parallel_backend]", _CAPACITY),
    ("test_parallel_with_interactively_defined_bound_method_loky", _LOG),
)
# and for one whose machines share no files.
ON_HOSTS: tuple[tuple[str, str], ...] = (
    ("test_parallel_call_cached_function_defined_in_jupyter[True]", _FILES),
    ("test_parallel_call_cached_function_defined_in_jupyter[False]", _FILES),
    ("test_concurrency_safe_write[dpool]", _FILES),
    ("test_nested_loop[dpool-loky]", _LOKY),
)


def reason(test: str) -> str | None:
    """Why `test` (file::name[parameters]) is meant to fail, or None if it is meant to pass."""
    name = test.partition("::")[2]
    found = _REASONS.get(name)
    if found is None and "DPOOL_ADDRESS" in os.environ:
        found = dict(ON_A_CLUSTER).get(name)
    if found is None and INSIDE in os.environ:
        found = dict(ON_HOSTS).get(name)
    return found


_REASONS = dict(DIFFERENCES)
