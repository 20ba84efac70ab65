"""A pass that was submitted and not yet waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .. import kt_kernel_ext as ext

__all__ = ["BegunPass", "PendingPass", "is_of_a_handler", "wait_until_done"]

Result = TypeVar("Result")


class BegunPass(Generic[Result]):
    """The tasks of one pass, and its result when they have run."""

    result: Result

    def __init__(self, engine: ext.CPUInfer) -> None:
        self._engine = engine
        self._tasks: list[ext.moe.TrainingTask] = []
        self._undo: list[Callable[[], None]] = []
        self.is_taken_back = False
        self.tickets: list[ext.Ticket] = []
        self.errors: list[Exception] = []
        self.waiter: object = None  #: the call of `PendingPass.sync` that waits

    def queue(self, task: ext.Task) -> ext.Ticket:
        """Queue a task of the pass."""
        if isinstance(task, ext.moe.TrainingTask):
            self._tasks.append(task)  # before it is queued: an interrupt may come right after that
        ticket = self._engine.submit(task)
        self.tickets.append(ticket)
        return ticket

    def needs(self, ticket: ext.Ticket) -> None:
        """Let the pass fail when the task of that ticket, which was queued before, has failed."""
        self.tickets.append(ticket)

    def when_taken_back(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the pass is to leave nothing behind."""
        self._undo.append(undo)

    def take_back(self) -> None:
        """Leave the layer as if the pass had never been."""
        self.is_taken_back = True
        for task in self._tasks:
            task.revoke()
        while self._undo:
            self._undo.pop()()


class PendingPass(Generic[Result]):
    """The passes of one kind that a layer begins with submit_* and ends with sync_*: at most one at a time.

    An exception that ends `submit`, such as KeyboardInterrupt, leaves none pending; one that ends the wait
    of `sync` leaves the pass to be waited for again.

    Parameters
    ----------
    name : str
        What follows submit_ and sync_.
    layer_idx : int
        The layer, for messages.
    engine : ext.CPUInfer
        The engine that runs them.
    """

    def __init__(self, name: str, layer_idx: int, engine: ext.CPUInfer) -> None:
        self._name = name
        self._layer_idx = layer_idx
        self._engine = engine
        self._lock = ext.CallLock(f"submit_{name}", of_engine=True)
        self._begun: BegunPass[Result] | None = None

    @property
    def pending(self) -> Result | None:
        """What the pass that is pending will give, or None when there is none."""
        begun = self._begun
        return None if begun is None else begun.result

    def submit(self, start: Callable[[BegunPass[Result]], Result]) -> None:
        """Begin a pass: `start` queues its tasks and gives its result.

        Raises
        ------
        RuntimeError
            A pass is pending.
        """
        name, begun = self._name, BegunPass[Result](self._engine)
        try:
            with self._lock:
                if self._begun is not None:
                    raise RuntimeError(
                        f"submit_{name}: a pass of layer {self._layer_idx} is pending, call sync_{name} first"
                    )
                begun.result = start(begun)
                self._begun = begun
        except BaseException:
            if self._begun is begun:
                self._begun = None
            begun.take_back()
            raise

    def run(self, start: Callable[[BegunPass[Result]], Result]) -> Result:
        """Begin a pass and wait for it. An exception that ends the wait leaves none pending either.

        Raises
        ------
        RuntimeError
            A pass is pending.
        """
        self.submit(start)
        begun = self._begun
        try:
            return self.sync()
        except BaseException:
            if begun is not None and self._begun is begun:
                self._begun = None
                begun.take_back()
            raise

    def sync(self) -> Result:
        """Wait for the pass and give its result, or raise the first exception of its tasks.

        Raises
        ------
        RuntimeError
            None is pending, another call waits for it, or the call that submitted it took it back.
        """
        call, begun = object(), None
        try:
            with self._lock:
                begun = self._claimed(call)
            while begun.tickets:  # resumes where an interrupt has ended it
                try:
                    self._engine.wait(begun.tickets[0])
                except Exception as error:
                    if is_of_a_handler(error):
                        raise
                    begun.errors.append(error)
                del begun.tickets[0]
            if self._begun is begun:
                self._begun = None  # the last: from here on no interrupt is looked for
        except BaseException:
            if begun is not None and begun.waiter is call:
                begun.waiter = None
            raise
        if begun.is_taken_back:
            raise RuntimeError(
                f"sync_{self._name}: the call that submitted the pass of layer {self._layer_idx} was "
                "ended by an exception and took it back"
            )
        if begun.errors:
            begun.take_back()
            try:
                raise begun.errors[0]
            finally:
                del begun  # or the exception, which refers to this frame, would keep the result
        return begun.result

    def _claimed(self, call: object) -> BegunPass[Result]:
        """The pass, which from now on only `call` waits for."""
        where = f"layer {self._layer_idx}"
        begun = self._begun
        if begun is None:
            raise RuntimeError(
                f"sync_{self._name}: no pass of {where} is pending, call submit_{self._name} first"
            )
        if begun.waiter is not None:
            raise RuntimeError(
                f"sync_{self._name}: another call waits for the pass of {where} already, expected one"
            )
        begun.waiter = call
        return begun


def is_of_a_handler(error: Exception) -> bool:
    """Whether a signal handler has raised it, during a wait: tasks run no Python code."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def wait_until_done(engine: ext.CPUInfer, ticket: ext.Ticket) -> None:
    """Wait for a task whose exception another call raises."""
    try:
        engine.wait(ticket)
    except Exception as error:
        if is_of_a_handler(error):
            raise
