"""Owns the targets: how to open a Pool, an Executor or a joblib backend of dpool, the stdlib and each peer.

It never times anything, and imports a target's package only when asked to open it. Called by the cases.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Protocol

WORKERS = 2

POOLS = ("dpool", "stdlib", "stdlib-spawn", "loky", "mpire", "ray", "dask")
EXECUTORS = ("dpool", "stdlib", "stdlib-spawn", "loky", "dask")
ASYNCIO = ("dpool", "stdlib", "loky", "dask")
CLUSTERS = ("dpool", "stdlib", "ray", "dask")
JOBLIB = ("dpool", "loky", "multiprocessing", "dask", "ray")

# The package whose presence says that a peer can be measured. What is not listed is always there.
PACKAGES = {"loky": "loky", "mpire": "mpire", "ray": "ray", "dask": "distributed"}
PEERS = ("stdlib-spawn", "loky", "mpire", "ray", "dask", "multiprocessing")


class NotHere(Exception):
    """The target, or the part of it that the case needs, is not installed or not written yet."""


class CannotDo(Exception):
    """The target is here, but has nothing that corresponds to the case."""


class BenchPool(Protocol):
    """What the pool cases ask of a target."""

    def apply(self, f: Callable[[Any], Any], x: Any) -> Any: ...
    def apply_many(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> list[Any]: ...
    def map(self, f: Callable[[Any], Any], xs: Iterable[Any], chunksize: int | None) -> list[Any]: ...
    def unordered(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> Iterable[Any]: ...


def installed(target: str) -> bool:
    """Whether the runner should try this target at all."""
    return target not in PACKAGES or importlib.util.find_spec(PACKAGES[target]) is not None


def module(name: str) -> ModuleType:
    """Import a module; NotHere if it does not exist (and not if it exists and fails to import another)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise NotHere(f"no module {error.name}") from None
        raise


def attribute(name: str, of: ModuleType) -> Any:
    """A name of a module; NotHere if it has none such."""
    try:
        return getattr(of, name)
    except AttributeError:
        raise NotHere(f"{of.__name__} has no {name}") from None


class _StdlibShaped:
    """A Pool with multiprocessing's own methods: the stdlib's, dpool's and Ray's."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def apply(self, f: Callable[[Any], Any], x: Any) -> Any:
        return self._pool.apply(f, (x,))

    def apply_many(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> list[Any]:
        return [r.get() for r in [self._pool.apply_async(f, (x,)) for x in xs]]

    def map(self, f: Callable[[Any], Any], xs: Iterable[Any], chunksize: int | None) -> list[Any]:
        result: list[Any] = self._pool.map(f, xs, chunksize)
        return result

    def unordered(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> Iterable[Any]:
        results: Iterable[Any] = self._pool.imap_unordered(f, xs, 1)
        return results


class _Mpire:
    """mpire has a Pool's methods under its own names."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def apply(self, f: Callable[[Any], Any], x: Any) -> Any:
        return self._pool.apply(f, (x,))

    def apply_many(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> list[Any]:
        return [r.get() for r in [self._pool.apply_async(f, (x,)) for x in xs]]

    def map(self, f: Callable[[Any], Any], xs: Iterable[Any], chunksize: int | None) -> list[Any]:
        result: list[Any] = self._pool.map(f, xs, chunk_size=chunksize, concatenate_numpy_output=False)
        return result

    def unordered(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> Iterable[Any]:
        results: Iterable[Any] = self._pool.imap_unordered(f, xs, chunk_size=1)
        return results


class _OverExecutor:
    """A peer that has an Executor and no Pool: loky and Dask. map's default chunk there is one task."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def apply(self, f: Callable[[Any], Any], x: Any) -> Any:
        return self._executor.submit(f, x).result()

    def apply_many(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> list[Any]:
        return [r.result() for r in [self._executor.submit(f, x) for x in xs]]

    def map(self, f: Callable[[Any], Any], xs: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self._executor.map(f, xs, chunksize=1 if chunksize is None else chunksize))

    def unordered(self, f: Callable[[Any], Any], xs: Iterable[Any]) -> Iterable[Any]:
        return self._executor.map(f, xs)


@contextmanager
def open_pool(target: str) -> Iterator[BenchPool]:
    """A pool of WORKERS processes of this target. fork where the target lets one choose, but for stdlib-spawn."""
    if target in ("stdlib", "stdlib-spawn"):
        with start_pool("multiprocessing", "spawn" if target == "stdlib-spawn" else "fork") as pool:
            yield _StdlibShaped(pool)
    elif target == "dpool":
        with start_pool("dpool.multiprocessing", "fork") as pool:
            yield _StdlibShaped(pool)
    elif target == "mpire":
        with module("mpire").WorkerPool(n_jobs=WORKERS, start_method="fork", keep_alive=True) as pool:
            yield _Mpire(pool)
    elif target == "ray":
        with _ray():
            pool = module("ray.util.multiprocessing").Pool(WORKERS)
            yield _StdlibShaped(pool)
            pool.terminate()
    elif target in ("loky", "dask"):
        with open_executor(target) as executor:
            yield _OverExecutor(executor)
    else:
        raise CannotDo(f"{target} has no Pool")


@contextmanager
def open_cluster_pool(target: str) -> Iterator[BenchPool]:
    """A pool of WORKERS processes on a cluster of two nodes that are processes of this machine, linked by TCP,
    encrypted where the target can. The stdlib's is its local one, as a measure."""
    if target == "dpool":
        with open_dpool_cluster():
            pool = attribute("Pool", module("dpool.multiprocessing"))(WORKERS)
            with pool:
                yield _StdlibShaped(pool)
            pool.join()
    elif target == "ray":
        with _ray_cluster():
            pool = module("ray.util.multiprocessing").Pool(WORKERS)
            yield _StdlibShaped(pool)
            pool.terminate()
    elif target == "dask":
        security = module("distributed").Security.temporary()
        with _dask(protocol="tls", security=security) as client, client.get_executor() as executor:
            yield _OverExecutor(executor)
    else:
        with open_pool(target) as local:
            yield local


@contextmanager
def open_dpool_cluster(nodes: int = WORKERS, options: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """A head and nodes of a CPU each, started with these options, in use by this process. Yields a function that starts
    a node more and returns when it has joined."""
    module("dpool.cluster_engine")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder, ExitStack() as opened:
        key = os.path.join(folder, "key")
        environment = os.environ | {"DPOOL_KEY_FILE": key, "PYTHONPATH": os.getcwd()}

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, "-m", "dpool", *arguments], env=environment, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            opened.callback(process.communicate)
            opened.callback(process.terminate)
            return process

        keygen = [sys.executable, "-m", "dpool", "keygen", key]
        subprocess.run(keygen, env=environment, check=True, capture_output=True)
        head = start("head", "--bind", "tcp://127.0.0.1:0")
        assert head.stdout is not None
        address = head.stdout.readline().split()[3]

        def join() -> None:
            node = start("node", address, "--cpus", "1", *options)
            assert node.stderr is not None
            if "joined the cluster" not in (line := node.stderr.readline()):
                raise AssertionError(f"a node has not joined: {line}")

        for _ in range(nodes):
            join()
        session = module("dpool.session")
        session.init(address, key)
        opened.callback(session.use, None)
        opened.callback(session.current().close)
        yield join



@contextmanager
def _ray_cluster() -> Iterator[None]:
    _prepare_ray()
    ray = module("ray")
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 1 << 30}
    cluster = module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=WORKERS - 1, object_store_memory=1 << 30)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
        ray.shutdown()
    finally:
        cluster.shutdown()


def start_pool(package: str, method: str) -> Any:
    """A Pool from `package` with this start method: what a program writes, with no wrapper around it."""
    pool = attribute("Pool", module(f"{package}.pool"))
    return pool(WORKERS, context=multiprocessing.get_context(method))


@contextmanager
def open_executor(target: str) -> Iterator[Executor]:
    """An executor of WORKERS processes of this target."""
    if target in ("stdlib", "stdlib-spawn", "dpool"):
        package = "dpool.concurrent.futures" if target == "dpool" else "concurrent.futures"
        context = multiprocessing.get_context("spawn" if target == "stdlib-spawn" else "fork")
        with attribute("ProcessPoolExecutor", module(package))(WORKERS, mp_context=context) as executor:
            yield executor
    elif target == "loky":
        with module("loky").ProcessPoolExecutor(max_workers=WORKERS) as executor:
            yield executor
    elif target == "dask":
        with _dask() as client, client.get_executor() as executor:
            yield executor
    else:
        raise CannotDo(f"{target} has no Executor")


@contextmanager
def joblib_backend(target: str) -> Iterator[Callable[[], Any]]:
    """This target's backend with WORKERS jobs as joblib's default. Yields a function that makes a joblib.Parallel."""
    joblib = module("joblib")
    with ExitStack() as opened:
        if target == "dpool":
            attribute("register", module("dpool.joblib"))()
        elif target == "dask":
            opened.enter_context(_dask())
        elif target == "ray":
            opened.enter_context(_ray())
            module("ray.util.joblib").register_ray()
        elif target not in ("loky", "multiprocessing"):
            raise CannotDo(f"{target} has no joblib backend")
        opened.enter_context(joblib.parallel_config(backend=target, n_jobs=WORKERS))
        yield joblib.Parallel


def _prepare_ray() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    # Tasks are functions of this package, and Ray's workers start elsewhere.
    os.environ["PYTHONPATH"] = os.getcwd()


@contextmanager
def _ray() -> Iterator[ModuleType]:
    _prepare_ray()
    ray = module("ray")
    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 << 30,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def open_ray() -> Iterator[ModuleType]:
    """Ray itself, started as for its Pool: for the cases of the store."""
    with _ray() as ray:
        yield ray


@contextmanager
def _dask(**options: Any) -> Iterator[Any]:
    distributed = module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            host="127.0.0.1",
            silence_logs=50,
            **options,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
