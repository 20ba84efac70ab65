"""The engine that all layers of a process share."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from . import kt_kernel_ext as ext
from .arrays.checks import at_least
from .buffers import KExpertsCPUBuffer
from .passes.deferral import SharedChain

__all__ = ["_MoEBase"]

#: More threads, sub-pools or nodes than any machine has.
_MAX_WORKERS = 2**16


def _engine_config(
    cpuinfer_threads: int | None, threadpool_count: int | None, numa_nodes: Sequence[int] | None
) -> ext.WorkerPoolConfig:
    """Threads spread evenly over sub-pools, sub-pools over the nodes this process may use."""
    machine = ext.topology()
    nodes = sorted(machine["node_cpus"])
    threads = machine["cpu_quota"] if cpuinfer_threads is None else cpuinfer_threads
    threads = at_least("cpuinfer_threads", threads, 1, _MAX_WORKERS)
    if threadpool_count is None:
        threadpool_count = min(len(numa_nodes or nodes), threads)
    if not 1 <= at_least("threadpool_count", threadpool_count, 0, _MAX_WORKERS) <= threads:
        raise ValueError(
            f"threadpool_count: got {threadpool_count}, expected 1 to {threads}, the number of threads"
        )
    if numa_nodes is None:
        numa_nodes = [nodes[i % len(nodes)] for i in range(threadpool_count)]
    if len(numa_nodes) != threadpool_count:
        raise ValueError(
            f"numa_nodes: got {list(numa_nodes)}, expected {threadpool_count} nodes, one for each sub-pool"
        )
    numa_nodes = [at_least("numa_nodes", node, 0, _MAX_WORKERS) for node in numa_nodes]
    share, more = divmod(threads, threadpool_count)
    counts = [share + (i < more) for i in range(threadpool_count)]
    return ext.WorkerPoolConfig(threadpool_count, numa_nodes, counts)


class _MoEBase:
    """Keeper of the engine: one for a process, made when first needed, shared by every layer.

    A second engine would compete for the same cores, so asking for another one is an error.
    """

    _lock: ClassVar[ext.CallLock] = ext.CallLock("cpuinfer")
    _engine: ClassVar[ext.CPUInfer | None] = None
    _engine_pid: ClassVar[int] = 0
    _loaded: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    _chain: ClassVar[SharedChain] = SharedChain()
    _streams: ClassVar[dict[int, Any]] = {}  # what passes in a stream share, by its key

    @classmethod
    def _get_cpu_infer(
        cls,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
    ) -> ext.CPUInfer:
        """The engine, made at the first call.

        Parameters
        ----------
        cpuinfer_threads : int, optional
            Threads; None takes the engine as it is, or all CPUs that this process may use.
        threadpool_count : int, optional
            Sub-pools; None takes the engine as it is, or a sub-pool for every NUMA node.
        numa_nodes : sequence of int, optional
            The node of each sub-pool.

        Raises
        ------
        ValueError
            Invalid numbers of threads, sub-pools or nodes.
        RuntimeError
            Another engine is there already, or this is a fork of the process that made it.
        """
        with _MoEBase._lock:
            if _MoEBase._engine is None:
                config = _engine_config(cpuinfer_threads, threadpool_count, numa_nodes)
                _MoEBase._engine = ext.CPUInfer(config)
                _MoEBase._engine_pid = os.getpid()
                return _MoEBase._engine
            if _MoEBase._engine_pid != os.getpid():
                raise RuntimeError(
                    "cpuinfer: the engine was made before this process was forked and its threads are not "
                    "here; call KTMoEWrapper.reset_engine() in the child, or use the spawn start method"
                )
            if (cpuinfer_threads, threadpool_count, numa_nodes) != (None, None, None):
                _check_same(_MoEBase._engine, cpuinfer_threads, threadpool_count, numa_nodes)
            return _MoEBase._engine

    @staticmethod
    def reset_cpu_infer() -> None:
        """End the engine, so that the next layer makes a new one.

        Raises
        ------
        RuntimeError
            Layers are loaded on it. (Not in a forked child, where the engine cannot run any more.)
        """
        with _MoEBase._lock:
            forked = _MoEBase._engine_pid != os.getpid()
            if _MoEBase._loaded and not forked:
                layers = sorted(layer.layer_idx for layer in _MoEBase._loaded)
                raise RuntimeError(f"cpuinfer: layers {layers} are loaded on the engine; delete them first")
            if _MoEBase._engine is not None and not forked:
                _MoEBase._engine.shutdown()
            _MoEBase._engine = None
            _MoEBase._loaded = weakref.WeakSet()
            _MoEBase._chain = SharedChain()
            _MoEBase._streams = {}
            KExpertsCPUBuffer.clear_buffer_cache()  # buffers remember tickets of the engine


def _check_same(
    engine: ext.CPUInfer,
    cpuinfer_threads: int | None,
    threadpool_count: int | None,
    numa_nodes: Sequence[int] | None,
) -> None:
    """Raise RuntimeError when the engine differs from the arguments that are not None."""
    config = engine.backend_.config
    has = {
        "cpuinfer_threads": sum(config.subpool_thread_count),
        "threadpool_count": config.subpool_count,
        "numa_nodes": list(config.subpool_numa_map),
    }
    requested = {
        "cpuinfer_threads": cpuinfer_threads,
        "threadpool_count": threadpool_count,
        "numa_nodes": None if numa_nodes is None else list(numa_nodes),
    }
    for name, value in requested.items():
        if value is not None and value != has[name]:
            raise RuntimeError(
                f"{name}: got {value}, but the engine of this process has {has[name]}; "
                "there is one engine; delete its layers and call KTMoEWrapper.reset_engine() before creating "
                "another"
            )


def _shut_down_at_exit() -> None:
    """End the threads while the interpreter is whole."""
    if _MoEBase._engine is not None and _MoEBase._engine_pid == os.getpid():
        _MoEBase._engine.shutdown()


atexit.register(_shut_down_at_exit)
