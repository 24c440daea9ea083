"""Owns the tests of joblib's backend "dpool" when nothing goes wrong: what it is asked for, it does.

It asserts no times. Faults, aborts and leaks are in test_joblib_faults.py; joblib's own tests in compat_tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib_tasks as tasks
import pytest
from executor_tasks import Gate, hold
from leftovers import Census

joblib = pytest.importorskip("joblib")
numpy = pytest.importorskip("numpy")

from joblib import Parallel, delayed, parallel_config  # noqa: E402

import dpool  # noqa: E402
from dpool.joblib import warm  # noqa: E402
from dpool.joblib.backend import DpoolBackend  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# joblib maps arrays that are larger than this, if it is not told otherwise.
MAX_NBYTES = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing() -> Iterator[None]:
    """What stays warm between calls is all that stays."""
    Parallel(2, backend="dpool")(delayed(tasks.double)(i) for i in range(2))  # the fork server stays, too
    warm.shelf.clear()
    census = Census()
    yield
    warm.shelf.clear()
    census.check()


def run(function: Any, *values: Any, n_jobs: int = 2, **options: Any) -> Any:
    return Parallel(n_jobs, backend="dpool", **options)(delayed(function)(value) for value in values)


# -- registration


def _program(text: str) -> Any:
    """What a program prints as JSON, in a fresh interpreter that is silent on stderr."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("imports", [
    "import dpool, joblib", "import joblib, dpool", "import dpool; from joblib.parallel import Parallel; import joblib",
    "import joblib, dpool.joblib; dpool.joblib.register()",
    "import dpool.joblib; dpool.joblib.register(); import joblib",
])
def test_the_name_is_known_whichever_is_imported_first(imports: str) -> None:
    assert _program(f"""{imports}
import json
from joblib_tasks import double
from joblib import Parallel, delayed, parallel_backend, parallel_config
results = [Parallel(2, backend="dpool")(delayed(double)(i) for i in range(3))]
with parallel_config(backend="dpool", n_jobs=2):
    results.append(Parallel()(delayed(double)(i) for i in range(3)))
with parallel_backend("dpool", n_jobs=2) as (backend, n_jobs):
    results.append(Parallel()(delayed(double)(i) for i in range(3)))
loader = type(joblib.parallel.__spec__.loader).__name__
print(json.dumps([results, type(backend).__name__, n_jobs, loader]))
""") == [[[0, 2, 4]] * 3, "DpoolBackend", 2, "SourceFileLoader"]


def test_dpool_does_not_import_joblib_by_itself() -> None:
    assert _program("import dpool, sys; print(int('joblib' in sys.modules or 'numpy' in sys.modules))") == 0


def test_without_joblib_register_says_what_to_install() -> None:
    assert "pip install 'dpool[joblib]'" in _program("""
import json, sys
sys.modules["joblib"] = None
import dpool.joblib
try:
    dpool.joblib.register()
except ImportError as error:
    print(json.dumps(str(error)))
""")


def test_a_failed_import_of_joblib_can_be_tried_again() -> None:
    assert _program("""
import dpool, json, sys
sys.modules["multiprocessing.pool"] = None
try:
    import joblib.parallel
except ImportError:
    pass
for name in [name for name in sys.modules if name.startswith("joblib")]:
    del sys.modules[name]
del sys.modules["multiprocessing.pool"]
import joblib.parallel
print(json.dumps("dpool" in joblib.parallel.BACKENDS))
""")


def test_register_can_make_it_the_default() -> None:
    assert _program("""
import json
import dpool.joblib
dpool.joblib.register(make_default=True)
from joblib import Parallel
from joblib.parallel import get_active_backend
print(json.dumps(type(get_active_backend()[0]).__name__))
""") == "DpoolBackend"


def test_the_name_is_known_in_workers_of_a_pool_too() -> None:
    with dpool.Pool(1) as pool:
        assert pool.apply(tasks.in_a_pool_worker, (3,)) == [0, 2, 4]


# -- n_jobs


def test_n_jobs() -> None:
    backend = DpoolBackend()
    cpus = joblib.cpu_count()
    assert [backend.effective_n_jobs(n) for n in (None, 1, 2, 7)] == [1, 1, 2, 7]
    assert [backend.effective_n_jobs(n) for n in (-1, -cpus, -cpus - 5)] == [cpus, 1, 1]
    with pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
        run(tasks.double, 1, n_jobs=0)


def test_so_many_tasks_run_at_once_as_n_jobs_says(tmp_path: Path) -> None:
    gates = [Gate(tmp_path, str(number)) for number in range(3)]
    stood: list[int] = []

    def stand() -> None:
        stood.extend(gate.wait() for gate in gates)
        for gate in gates:
            gate.open()

    watching = threading.Thread(target=stand)
    watching.start()
    results = Parallel(3, backend="dpool")(delayed(hold)(gate.started, gate.opened, 1) for gate in gates)
    watching.join()
    assert results == [1, 1, 1] and len(set(stood)) == 3


def test_one_job_runs_in_the_program_itself() -> None:
    assert set(run(tasks.worker, *range(3), n_jobs=1)) == {os.getpid()}


def test_workers_stay_warm_between_calls_and_serve_equal_calls() -> None:
    before = set(run(tasks.worker, *range(8)))
    assert before.isdisjoint({os.getpid()})
    for _ in range(3):
        assert set(run(tasks.worker, *range(8))) <= before
    assert len(warm.shelf.idle) <= warm.MAX_IDLE


def test_an_instance_as_backend_is_as_good_as_the_name() -> None:
    backend = DpoolBackend()
    assert Parallel(2, backend=backend)(delayed(tasks.double)(i) for i in range(3)) == [0, 2, 4]
    with parallel_config(backend=backend, n_jobs=2):
        assert Parallel()(delayed(tasks.double)(i) for i in range(3)) == [0, 2, 4]


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'dpool' has no option 'colour'"), parallel_config(backend="dpool", colour=1):
        pass


# -- batching, dispatch


@pytest.mark.parametrize("batch_size", [1, 3, 1000, "auto"])
@pytest.mark.parametrize("pre_dispatch", ["all", 1, "2 * n_jobs"])
def test_results_are_in_order_however_they_travel(batch_size: Any, pre_dispatch: Any) -> None:
    results = run(tasks.double, *range(50), batch_size=batch_size, pre_dispatch=pre_dispatch)
    assert results == [2 * i for i in range(50)]


def test_short_tasks_travel_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    submit = DpoolBackend.submit

    def count(self: DpoolBackend, func: Any, callback: Any = None) -> Any:
        batches.append(len(func))
        return submit(self, func, callback)

    monkeypatch.setattr(DpoolBackend, "submit", count)
    assert run(tasks.double, *range(4000)) == [2 * i for i in range(4000)]
    assert sum(batches) == 4000
    assert len(batches) < 1000


def test_the_input_is_read_no_further_than_pre_dispatch_says(tmp_path: Path) -> None:
    gates = [Gate(tmp_path, str(number)) for number in range(2)]
    read: list[int] = []

    def inputs() -> Iterator[Any]:
        for gate in gates:
            read.append(0)
            yield delayed(hold)(gate.started, gate.opened, -1)
        for number in range(20):
            read.append(number)
            yield delayed(tasks.double)(number)

    results = Parallel(2, backend="dpool", pre_dispatch=2, batch_size=1, return_as="generator")(inputs())
    for gate in gates:
        gate.wait()
    seen = len(read)
    for gate in gates:
        gate.open()
    assert list(results) == [-1, -1, *(2 * i for i in range(20))]
    assert seen == 2


def test_a_callback_of_the_programs_own_sees_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As progress bars for joblib do it."""
    sizes: list[int] = []

    class Counting(joblib.parallel.BatchCompletionCallBack):  # type: ignore[misc, name-defined]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            sizes.append(self.batch_size)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(joblib.parallel, "BatchCompletionCallBack", Counting)
    assert run(tasks.double, *range(30), batch_size=4) == [2 * i for i in range(30)]
    assert sum(sizes) == 30 and max(sizes) == 4


def test_a_closure_and_a_lambda_travel_by_value() -> None:
    offset = 7
    assert run(lambda value: value + offset, 1, 2) == [8, 9]


def test_verbose_prints_as_joblib_does(capsys: pytest.CaptureFixture[str]) -> None:
    run(tasks.double, *range(4), verbose=11)
    shown = capsys.readouterr()
    assert "Using backend DpoolBackend with 2 concurrent workers" in shown.out + shown.err


# -- what is returned, and when


def test_a_generator_yields_in_order(tmp_path: Path) -> None:
    results = run(tasks.double, *range(20), return_as="generator")
    assert next(results) == 0
    assert list(results) == [2 * i for i in range(1, 20)]


def test_an_unordered_generator_yields_what_is_ready(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    calls = [delayed(hold)(gate.started, gate.opened, "late"), delayed(tasks.as_it_is)("early")]
    results = Parallel(2, backend="dpool", return_as="generator_unordered", batch_size=1)(calls)
    assert next(results) == "early"
    gate.wait()
    gate.open()
    assert list(results) == ["late"]


def test_several_generators_are_consumed_at_once() -> None:
    generators = [run(tasks.double, *range(start, start + 20), return_as="generator") for start in (0, 100, 200)]
    assert list(zip(*generators, strict=True)) == [(2 * i, 2 * i + 200, 2 * i + 400) for i in range(20)]


def test_one_call_takes_its_input_from_anothers_results() -> None:
    """joblib asks for the next input in the callback of a result: that must not wait for itself."""
    inner = run(tasks.double, *range(40), return_as="generator")
    assert run(tasks.double, *range(0)) == []
    outer = Parallel(2, backend="dpool", batch_size=1)(delayed(tasks.double)(value) for value in inner)
    assert outer == [4 * i for i in range(40)]


def test_the_same_parallel_is_called_many_times() -> None:
    with Parallel(2, backend="dpool") as parallel:
        for start in range(10):
            assert parallel(delayed(tasks.double)(i) for i in range(start)) == [2 * i for i in range(start)]


def test_two_parallels_share_one_configuration() -> None:
    with parallel_config(backend="dpool", n_jobs=2):
        one, two = Parallel(return_as="generator"), Parallel(return_as="generator")
        results = zip(one(delayed(tasks.double)(i) for i in range(10)),
                      two(delayed(tasks.double)(i) for i in range(100, 110)), strict=True)
        assert list(results) == [(2 * i, 2 * i + 200) for i in range(10)]
        with Parallel() as outer, Parallel() as inner:
            assert outer(delayed(tasks.double)(i) for i in inner(delayed(tasks.double)(i) for i in range(5))) == [
                0, 4, 8, 12, 16]


def test_threads_call_at_the_same_time() -> None:
    results: dict[int, Any] = {}

    def call(start: int) -> None:
        results[start] = run(tasks.double, *range(start, start + 50))

    threads = [threading.Thread(target=call, args=(start,)) for start in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: [2 * i for i in range(start, start + 50)] for start in range(0, 400, 100)}


# -- nesting


@pytest.mark.parametrize("backend", ["dpool", None, "threading", "loky"])
def test_a_parallel_in_a_task(backend: str | None) -> None:
    calls = (delayed(tasks.nested)(count, backend) for count in range(4))
    assert Parallel(2, backend="dpool")(calls) == [0, 0, 2, 6]


def test_a_parallel_three_levels_deep() -> None:
    assert Parallel(2, backend="dpool")(delayed(tasks.nested)(3, "dpool", 2) for _ in range(3)) == [2, 2, 2]


def test_a_configuration_in_a_task() -> None:
    assert run(tasks.nested_by_config, 2, 3) == [2, 6]


def test_tasks_in_workers_share_the_processors() -> None:
    share = max(joblib.cpu_count() // 2, 1)
    calls = [(-1, "dpool"), (8, "dpool"), (-1, "loky")]
    assert Parallel(2, backend="dpool")(delayed(tasks.effective)(*call) for call in calls) == [share] * 3


def test_below_threads_calls_share_the_processors_too() -> None:
    results = Parallel(2, backend="threading")(delayed(tasks.nested)(5, "dpool") for _ in range(4))
    assert results == [20] * 4


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_inner_max_num_threads(threads: int | None) -> None:
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    with parallel_config(backend="dpool", n_jobs=2, inner_max_num_threads=threads):
        limits = Parallel()(delayed(tasks.environment)(name) for name in names)
    assert limits == [str(threads or max(joblib.cpu_count() // 2, 1))] * 3


def test_blas_has_so_many_threads() -> None:
    pytest.importorskip("threadpoolctl")
    with parallel_config(backend="dpool", n_jobs=2, inner_max_num_threads=1):
        for counts in Parallel()(delayed(tasks.blas_threads)(numpy.ones(2)) for _ in range(2)):
            assert set(counts) == {1}


# -- hints


def test_shared_memory_falls_back_to_threads() -> None:
    with parallel_config(backend="dpool", n_jobs=2):
        assert set(Parallel(require="sharedmem")(delayed(tasks.worker)() for _ in range(4))) == {os.getpid()}
        assert os.getpid() not in set(Parallel()(delayed(tasks.worker)() for _ in range(4)))


def test_a_preference_is_only_one() -> None:
    with parallel_config(backend="dpool", n_jobs=2):
        pids = set(Parallel(prefer="processes")(delayed(tasks.worker)() for _ in range(4)))
    assert os.getpid() not in pids
    with pytest.raises(ValueError, match="does not support shared memory"):
        Parallel(2, backend="dpool", require="sharedmem")


# -- initializers


def test_an_initializer_runs_once_in_each_worker() -> None:
    options: dict[str, Any] = {"initializer": tasks.initialize, "initargs": ("here",)}
    assert run(tasks.initialized, *range(6), **options) == [["here"]] * 6
    assert run(tasks.initialized, *range(6), **options) == [["here"]] * 6  # the same workers, or equal ones
    assert run(tasks.initialized, *range(6)) == [[]] * 6  # never those of a call with an initializer


def test_an_initializer_with_another_ref_is_another_one() -> None:
    for value in (0, 1):
        ref = dpool.put([value])
        options: dict[str, Any] = {"initializer": tasks.initialize, "initargs": (ref,)}
        assert run(tasks.values_initialized, *range(6), **options) == [[value]] * 6


# -- arrays


def test_an_array_is_stored_once_and_mapped_wherever_it_is() -> None:
    array = numpy.zeros(MAX_NBYTES // 8 + 1)
    calls = [*[delayed(tasks.file_of)(array)] * 5, delayed(tasks.file_in)(tasks.Holder(array)),
             delayed(tasks.call)(tasks.file_of, array)]
    files = Parallel(2, backend="dpool", batch_size=2)(calls)
    assert len(set(files)) == 1 and files[0] is not None


def test_an_array_in_a_data_frame_is_stored_once() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": numpy.zeros(MAX_NBYTES // 8 + 1)})

    def file(frame: Any) -> Any:
        base = frame["a"].to_numpy()
        while getattr(base, "filename", None) is None and base is not None:
            base = base.base
        return base is not None and str(base.filename)

    files = run(file, frame, frame, frame)
    assert len(set(files)) == 1 and files[0]


@pytest.mark.parametrize(("nbytes", "options", "writable"), [
    (MAX_NBYTES, {}, True), (MAX_NBYTES + 8, {}, False), (4 * MAX_NBYTES, {"mmap_mode": None}, True),
    (4 * MAX_NBYTES, {"max_nbytes": None}, True), (4 * MAX_NBYTES, {"mmap_mode": "c"}, True),
    (4 * MAX_NBYTES, {"max_nbytes": "8M"}, True), (800, {"max_nbytes": 100}, False),
])
def test_only_large_arrays_are_read_only(nbytes: int, options: dict[str, Any], writable: bool) -> None:
    array = numpy.zeros(nbytes // 8)
    assert run(tasks.is_writable, array, array, array, **options) == [writable] * 3
    assert not array.any()  # what tasks write is theirs
    # ... and no other task sees it.
    assert set(run(tasks.first, array, array, array, **options)) == {0.0}


def test_with_mode_r_plus_tasks_write_to_one_array() -> None:
    array = numpy.zeros(1000)
    with Parallel(2, backend="dpool", max_nbytes=100, mmap_mode="r+", batch_size=1, pre_dispatch=1) as parallel:
        seen = parallel(delayed(tasks.write_at)(array, index) for index in range(4))
    assert seen[-1] == [1.0, 2.0, 3.0, 4.0]
    assert not array.any()


def test_results_are_the_programs_own() -> None:
    array = numpy.zeros(MAX_NBYTES)
    for result in run(tasks.as_it_is, array, array):
        assert type(result) is numpy.ndarray and result.flags.writeable
        result[0] = 1
    assert not array.any()
    [part] = run(tasks.as_it_is, numpy.ones(10))
    part[0] = 2


def test_a_changed_array_is_never_taken_for_its_old_self() -> None:
    tasks.check_that_changes_are_seen(numpy.zeros(MAX_NBYTES // 8 + 1))


def run_all(calls: Any, **options: Any) -> Any:
    return Parallel(2, backend="dpool", **options)(calls)


def test_an_array_that_took_anothers_place_is_not_taken_for_it() -> None:
    def arrays() -> Iterator[Any]:
        for value in range(20):
            yield delayed(tasks.first)(numpy.full(MAX_NBYTES // 8 + 1, float(value)))

    assert run_all(arrays()) == list(range(20))


@pytest.mark.parametrize("array", [
    numpy.arange(12.0).reshape(3, 4), numpy.asfortranarray(numpy.arange(12.0).reshape(3, 4)),
    numpy.arange(24).reshape(4, 6)[::2, ::3], numpy.array(5.0), numpy.empty((0, 3)), numpy.array(["a", {}], object),
    numpy.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), numpy.arange(5).astype(">i4"),
    numpy.array(["2020-01-01"], "M8[D]"), numpy.broadcast_to(numpy.arange(3), (4, 3)),
], ids=lambda array: f"{array.dtype}-{array.shape}")
def test_every_kind_of_array_arrives_as_it_was(array: Any) -> None:
    [described] = run(tasks.describe, array, max_nbytes=1)[:1] if array.size else run(tasks.describe, array)
    [plain] = run(tasks.describe, array, max_nbytes=None)[:1]
    kind = tasks.describe(array)
    assert described[1:3] + described[4:] == kind[1:3] + kind[4:] == plain[1:3] + plain[4:]


def test_an_array_of_a_file_travels_as_its_name(tmp_path: Path) -> None:
    path = tmp_path / "array"
    array = numpy.memmap(path, "f8", "w+", shape=(1000,))
    array[:] = 3
    array.flush()
    assert run(tasks.file_of, array, array) == [str(path)] * 2
    assert run(tasks.first, array[10:20], array[::2]) == [3.0, 3.0]


def test_a_folder_for_arrays_is_used_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    array = numpy.zeros(MAX_NBYTES // 8 + 1)
    assert run(tasks.first, array, array, temp_folder=str(folder)) == [0.0, 0.0]
    assert list(folder.iterdir()) == []


def test_more_arrays_than_can_be_stored_at_once_travel_with_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpool.joblib import arrays

    monkeypatch.setattr(arrays, "MAX_STORED", 3)
    many = [numpy.full(MAX_NBYTES // 8 + 1, float(value)) for value in range(8)]
    assert run(tasks.first, *many, pre_dispatch="all") == list(range(8))
    assert run(tasks.is_writable, *many, pre_dispatch="all") == [False] * 8
