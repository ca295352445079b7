"""Where the work is done: one seam, PEP 3148's Executor. Processes of this machine, or Dask's distributed.

Scheduling, retries and moving work off a dead worker are Dask's own where it is used. With processes of this machine a
worker that dies takes the whole pool with it (Python's design): the pool is made anew, and what was in flight runs
again one by one, so that the recording that kills its worker is found and the others are not blamed.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor, Future

ENGINES = ("local", "dask")
RETRIES = 2  # of a task whose worker died
CONNECT_SECONDS = 20
REPLACE_S = 30  # a nanny whose worker dies while it starts, which happens on a busy machine, never starts another
WORKERLESS_S = 300  # a machine that is very busy takes a minute to start a worker
IN_FLIGHT = 8  # tasks per worker that are handed out at a time
REMOTE_IN_FLIGHT = 2_000  # of a cluster whose size may change
RERUN = "what was done is kept: run the same command again to go on"


@dataclass(frozen=True)
class Engine:
    """What shall do the work.

    Parameters
    ----------
    name : one of ENGINES
    workers : processes on this machine; None: one per usable CPU
    scheduler : address of a running Dask scheduler; None: a cluster on this machine
    memory_limit : of each of Dask's own workers here, "2GiB"; None: Dask decides
    """

    name: str = "local"
    workers: int | None = None
    scheduler: str | None = None
    memory_limit: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise UsageError(f"no engine {self.name!r}; there are {', '.join(ENGINES)}")
        if self.scheduler and self.name != "dask":
            raise UsageError("--scheduler goes with --engine dask")

    @property
    def n_workers(self) -> int:
        """Return how many processes of this machine work."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Failed:
    """A task that could not be finished although it was tried again: its worker died each time."""

    error: str
    attempts: int


def run_tasks(
    engine: Engine, task: Callable[[str], Any], arguments: Sequence[str], done: Callable[[str, Any], None]
) -> None:
    """Run task(argument) for every argument; done(argument, result or Failed) is called here as each ends.

    Raises
    ------
    CapabilityError
        Dask is not installed, or its scheduler does not answer (any more).
    """
    if engine.name == "dask":
        _run_on_dask(engine, task, arguments, done)
    else:
        _run_here(engine, task, arguments, done)


# -- processes of this machine -----------------------------------------------------------------------


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out the work


def dask_setup(worker: Any) -> None:
    """Prepare a worker of a Dask cluster of this machine; Dask calls it where this module is preloaded."""
    del worker
    _ignore_interrupts()


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Give a pool whose processes are gone when the block is left, finished or not."""
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield pool
    except KeyboardInterrupt:  # nobody waits for what takes long: a rerun makes it
        for process in set(active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_here(
    engine: Engine, task: Callable[[str], Any], arguments: Sequence[str], done: Callable[[str, Any], None]
) -> None:
    left = list(arguments)
    while left:
        with _pool(engine.n_workers) as pool:
            finished, suspects = _run_until_broken(pool, task, left, done, engine.n_workers * IN_FLIGHT)
        for argument in suspects:
            done(argument, _run_alone(task, argument))
        gone = finished | set(suspects)
        left = [argument for argument in left if argument not in gone]


def _run_until_broken(
    pool: Executor, task: Callable[[str], Any], arguments: Sequence[str], done: Callable[[str, Any], None], window: int
) -> tuple[set[str], list[str]]:
    """Run tasks until all are done or a worker has died; return (those finished, those that were in flight)."""
    waiting = iter(arguments)
    running: dict[Future[Any], str] = {}
    finished: set[str] = set()
    suspects: list[str] = []
    while True:
        while not suspects and len(running) < window and (argument := next(waiting, None)) is not None:
            try:
                running[pool.submit(task, argument)] = argument
            except BrokenExecutor:
                suspects.append(argument)
        if not running:
            return finished, suspects
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            argument = running.pop(future)
            try:
                result = future.result()
            except BrokenExecutor:
                suspects.append(argument)
                continue
            finished.add(argument)
            done(argument, result)


def _run_alone(task: Callable[[str], Any], argument: str) -> Any:
    """Run one task in a process of its own, again if that dies."""
    for _ in range(1 + RETRIES):
        with _pool(1) as pool:
            try:
                return pool.submit(task, argument).result()
            except BrokenExecutor:
                continue
    return Failed("the worker process died (killed, or out of memory?)", 1 + RETRIES)


# -- Dask --------------------------------------------------------------------------------------------


def silence_dask() -> None:
    """Have a lost scheduler told by our one line alone: what waits for it in the background logs tracebacks."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run_on_dask(
    engine: Engine, task: Callable[[str], Any], arguments: Sequence[str], done: Callable[[str, Any], None]
) -> None:
    try:
        from distributed import KilledWorker
    except ImportError as error:
        raise CapabilityError("Dask's distributed is not installed", "pip install 'kvmtrace[fleet]'") from error
    silence_dask()
    with ExitStack() as stack:
        client = _connect(engine, stack)
        executor = client.get_executor(pure=False, retries=RETRIES)
        waiting = iter(arguments)
        running: dict[Future[Any], str] = {}
        suspects: list[str] = []  # were on workers that died; Dask cannot tell which of them was to blame

        def result_of(future: Future[Any]) -> Any:
            try:
                return future.result()
            except KilledWorker as error:
                return Failed(f"the workers that took it died: {error}".split("\n", 1)[0], 1 + RETRIES)
            except (CancelledError, OSError) as error:
                raise _lost(engine) from error

        cluster = _Cluster(engine, client)
        while True:
            while len(running) < REMOTE_IN_FLIGHT and (argument := next(waiting, None)) is not None:
                running[executor.submit(task, argument)] = argument
            if not running:
                break
            for future in cluster.wait(running):
                argument = running.pop(future)
                result = result_of(future)
                if isinstance(result, Failed):
                    suspects.append(argument)
                else:
                    done(argument, result)
        for argument in suspects:  # one by one, so that only the guilty one fails again
            future = executor.submit(task, argument)
            cluster.wait([future])
            done(argument, result_of(future))


class _Cluster:
    """Waits for tasks as long as there is somebody who works on them.

    Parameters
    ----------
    engine : Engine
    client : Dask's
    """

    def __init__(self, engine: Engine, client: Any) -> None:
        self._engine, self._client = engine, client
        self._own = client.cluster if engine.scheduler is None else None

    def wait(self, running: Iterable[Future[Any]]) -> set[Future[Any]]:
        """Return the tasks that ended, at least one.

        Raises
        ------
        CapabilityError
            The scheduler is gone, or has had no worker for WORKERLESS_S.
        """
        waiting, alone_since, replaced = list(running), None, 0.0
        while True:
            ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            if self._client.status not in {"running", "connecting"}:
                raise _lost(self._engine)
            if ended:
                return ended
            if self._has_workers():
                alone_since = None
            elif alone_since is None:
                alone_since = replaced = time.monotonic()
            elif time.monotonic() - alone_since > WORKERLESS_S:
                raise CapabilityError("no worker is left on the Dask cluster", RERUN)
            elif self._own is not None and time.monotonic() - replaced > REPLACE_S:
                self._own.scale(len(self._own.worker_spec) + self._engine.n_workers)
                replaced = time.monotonic()

    def _has_workers(self) -> bool:
        try:
            return bool(self._client.scheduler_info()["workers"])
        except OSError:  # what became of it is told by the client's status
            return True


def _connect(engine: Engine, stack: ExitStack) -> Any:
    from distributed import Client, LocalCluster

    if engine.scheduler is None:
        limit = {"memory_limit": engine.memory_limit} if engine.memory_limit else {}
        cluster = LocalCluster(
            n_workers=engine.n_workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",  # any free port: others may run a cluster here
            host="127.0.0.1",
            silence_logs=50,
            preload=__name__,
            **limit,
        )
        stack.enter_context(cluster)
        return stack.enter_context(Client(cluster))
    try:
        return stack.enter_context(Client(engine.scheduler, timeout=CONNECT_SECONDS))
    except (OSError, ValueError) as error:
        problem = f"no Dask scheduler answers at {engine.scheduler}"
        raise CapabilityError(problem, "start one with `dask scheduler`, or leave out --scheduler") from error


def _lost(engine: Engine) -> CapabilityError:
    where = engine.scheduler or "on this machine"
    return CapabilityError(f"the Dask scheduler {where} is gone", RERUN)
