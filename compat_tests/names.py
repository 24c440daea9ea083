"""The tests known to exist, and which of them look inside a pool: the table that makes a silent change loud.

Says nothing of whether a target passes them; that is expected.py. A test found but not in this table is reported as
new (sort it in here), one in the table but not found fails. Called by __main__.py and, for the ids, by test_compat.py.
"""

from compat_tests.suites import CONTEXTS

# By suite: family and class. The start method's name is taken out of the class's. A question mark: not in every release
# of 3.11 to 3.15; a suite may be missing as a whole if all its tests have one.
_TEST_POOL = """
    test_apply test_async test_async_timeout test_context test_empty_iterable test_enter test_imap
    test_imap_handle_iterable_exception test_imap_unordered test_imap_unordered_handle_iterable_exception test_make_pool
    test_map test_map_async test_map_async_callbacks test_map_chunksize test_map_handle_iterable_exception
    test_map_no_failfast test_map_unplicklable test_release_task_refs test_resource_warning test_starmap
    test_starmap_async test_terminate test_traceback test_wrapped_exception
"""
_NAMES = {
    "pool/WithProcessesTestPool": _TEST_POOL,
    "pool/WithProcessesTestPoolWorkerErrors": "test_async_error_callback test_unpickleable_result",
    "pool/WithProcessesTestPoolWorkerLifetime": """
        test_pool_maxtasksperchild_invalid test_pool_worker_lifetime test_pool_worker_lifetime_early_close
        test_worker_finalization_via_atexit_handler_of_multiprocessing
    """,
    "pool/TestInitializers": "test_pool_initializer",
    "pool/TestStdinBadfiledescriptor": "test_pool_in_process",
    "pool/TestPoolNotLeakOnFailure": "test_release_unused_processes",
    "pool/MiscTestCase": "test_large_pool?",
    "manager/WithManagerTestPool": _TEST_POOL,
    "manager/TestSyncManagerTypes": "test_pool",
    "main/CmdLineTest": """
        test_basic_script test_basic_script_no_suffix test_directory test_directory_compiled test_ipython_workaround
        test_module_in_package test_module_in_package_in_zipfile test_module_in_subpackage_in_zipfile test_package
        test_package_compiled test_script_compiled test_zipfile test_zipfile_compiled
    """,
    "executor/AsCompletedTest": """
        test_correct_timeout_exception_msg test_duplicate_futures test_free_reference_yielded_future
        test_future_times_out? test_no_timeout test_zero_timeout?
    """,
    "executor/ExecutorDeadlockTest": """
        test_crash_at_task_unpickle test_crash_big_data? test_crash_during_func_exec_on_worker
        test_crash_during_result_pickle_on_worker test_error_at_task_pickle test_error_at_task_unpickle
        test_error_during_func_exec_on_worker test_error_during_result_pickle_on_worker
        test_error_during_result_unpickle_in_result_handler test_exit_at_task_unpickle
        test_exit_during_func_exec_on_worker test_exit_during_result_pickle_on_worker
        test_exit_during_result_unpickle_in_result_handler test_gh105829_should_not_deadlock_if_wakeup_pipe_full?
        test_shutdown_deadlock test_shutdown_deadlock_pickle
    """,
    "executor/InitializerTest": "test_initializer",
    "executor/FailingInitializerTest": "test_initializer",
    "executor/FailingInitializerResourcesTest": "test_forkserver? test_spawn?",
    "executor/ProcessPoolExecutorTest": """
        test_free_reference test_idle_process_reuse_multiple test_idle_process_reuse_one test_killed_child test_map
        test_map_chunksize test_map_exception test_map_timeout test_max_tasks_early_shutdown test_max_tasks_per_child
        test_max_tasks_per_child_defaults_to_spawn_context test_max_workers_negative test_max_workers_too_large
        test_no_stale_references test_python_finalization_error? test_ressources_gced_in_workers test_saturation
        test_shutdown_race_issue12456 test_submit test_submit_keyword test_traceback
        test_broken_process_pool_traceback? test_failed_worker_replacement_breaks_pool?
        test_force_shutdown_during_max_tasks_worker_exit? test_force_shutdown_workers?
        test_force_shutdown_workers_dead_workers? test_force_shutdown_workers_invalid_op?
        test_force_shutdown_workers_not_started_yet? test_force_shutdown_workers_stops_pool?
        test_gc_during_max_tasks_worker_exit_gh152967? test_kill_workers? test_map_buffersize?
        test_map_buffersize_on_empty_iterable? test_map_buffersize_on_infinite_iterable?
        test_map_buffersize_on_multiple_infinite_iterables? test_map_buffersize_on_multiple_iterables?
        test_map_buffersize_type_validation? test_map_buffersize_value_validation?
        test_map_buffersize_when_buffer_is_full? test_map_buffersize_without_iterable?
        test_max_tasks_per_child_pending_tasks_gh115634? test_shutdown_no_wait_max_tasks_gh119592?
        test_swallows_falsey_exceptions? test_terminate_workers?
        test_traceback_when_child_process_terminates_abruptly?
    """,
    "executor/ProcessPoolShutdownTest": """
        test_cancel_futures test_context_manager_shutdown test_del_shutdown test_hang_gh83386 test_hang_gh94440?
        test_hang_issue12364 test_interpreter_shutdown test_processes_terminate test_run_after_shutdown
        test_shutdown_gh_132969_case_1? test_shutdown_gh_132969_case_2? test_shutdown_no_wait
        test_submit_after_interpreter_shutdown
    """,
    "executor/WaitTest": """
        test_20369 test_all_completed test_first_completed test_first_completed_some_already_completed
        test_first_exception test_first_exception_one_already_failed test_first_exception_some_already_complete
        test_timeout
    """,
    "asyncio/TestPyGetEventLoop": "test_get_event_loop_new_process",
    "asyncio/TestCGetEventLoop": "test_get_event_loop_new_process",
}

KNOWN = {suite: frozenset(name.rstrip("?") for name in names.split()) for suite, names in _NAMES.items()}
REQUIRED = {suite: frozenset(name for name in names.split() if name[-1] != "?") for suite, names in _NAMES.items()}

# White-box tests, and what they look at. They are run and scored apart: look-alikes may satisfy them, no promise does.
_WHITE_BOX = {
    "pool/TestPoolNotLeakOnFailure": {
        "test_release_unused_processes": "workers are made by a mock of context.Process",
    },
    "pool/WithProcessesTestPool": {
        "test_make_pool": "len(pool._pool)",
        "test_resource_warning": "sets pool._state",
    },
    "pool/WithProcessesTestPoolWorkerLifetime": {
        "test_pool_worker_lifetime": "pool._pool[i].pid, pool._repopulate_pool()",
    },
    "executor/ExecutorDeadlockTest": {
        "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "mocks the manager thread",
        "test_shutdown_deadlock_pickle": "executor._executor_manager_thread",
    },
    "executor/FailingInitializerResourcesTest": {
        "test_forkserver": "runs FailingInitializerTest",
        "test_spawn": "runs FailingInitializerTest",
    },
    "executor/FailingInitializerTest": {
        "test_initializer": "executor._broken, and what its worker logs to a Queue",
    },
    "executor/ProcessPoolExecutorTest": {
        "test_broken_process_pool_traceback": "terminates one of executor._processes",
        "test_failed_worker_replacement_breaks_pool": "mocks _spawn_worker",
        "test_force_shutdown_during_max_tasks_worker_exit": "executor._shutdown_lock, sets _force_shutting_down",
        "test_force_shutdown_workers": "mocks the methods of one of executor._processes",
        "test_force_shutdown_workers_invalid_op": "executor._force_shutdown",
        "test_force_shutdown_workers_not_started_yet": "workers are made by a mock of context.Process",
        "test_force_shutdown_workers_stops_pool": "executor._processes",
        "test_gc_during_max_tasks_worker_exit_gh152967": "executor._executor_manager_thread",
        "test_idle_process_reuse_multiple": "len(executor._processes)",
        "test_idle_process_reuse_one": "len(executor._processes)",
        "test_kill_workers": "mocks executor._force_shutdown",
        "test_killed_child": "terminates one of executor._processes",
        "test_max_tasks_per_child": "len(executor._processes)",
        "test_max_tasks_per_child_defaults_to_spawn_context": "executor._mp_context",
        "test_python_finalization_error": "counts the threads that the stdlib starts",
        "test_saturation": "len(executor._processes), executor._max_workers",
        "test_shutdown_no_wait_max_tasks_gh119592": "executor._executor_manager_thread",
        "test_terminate_workers": "mocks executor._force_shutdown",
    },
    "executor/ProcessPoolShutdownTest": {
        "test_context_manager_shutdown": "executor._processes",
        "test_del_shutdown": "executor._executor_manager_thread, executor._call_queue",
        "test_processes_terminate": "len(executor._processes)",
        "test_shutdown_gh_132969_case_1": "executor._executor_manager_thread",
        "test_shutdown_gh_132969_case_2": "executor._executor_manager_thread",
        "test_shutdown_no_wait": "executor._executor_manager_thread, executor._call_queue",
    },
}

WHITE_BOX = {f"{suite}.{test}": looks_at for suite, tests in _WHITE_BOX.items() for test, looks_at in tests.items()}


def rows() -> list[tuple[str, str]]:
    """Every known suite under every start method it has: what a complete run reports on."""
    # The resources test has one method for each start method, and none for fork.
    return [
        (suite, context)
        for suite in KNOWN
        for context in CONTEXTS
        if (suite, context) != ("executor/FailingInitializerResourcesTest", "fork")
    ]
