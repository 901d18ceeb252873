"""Several runs of one model through its layers side by side, so that each layer has to be there only once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


def in_step(
    works: Sequence[Callable[[], None]], layers: Mapping[str, nn.Module], last: Collection[int] = ()
) -> Iterator[tuple[str, bool]]:
    """Carry out ``works``, each of which calls the layers in some order; each waits at a layer until it is entered.

    Yields ``(path, False)`` before they run through a layer and ``(path, True)`` afterwards. Every work has a thread of
    its own and one thread runs at a time: those that wait for the same layer run through it in the order of ``works``.
    So the result does not depend on chance. What a work of the numbers in ``last`` waits for is entered when no other
    work waits for anything else: text waits until images have gone through their tower, and each layer is there once.
    An error of any work is raised here and ends all of them, as closing does.
    """
    walks = [_Walk(work) for work in works]
    here = threading.local()
    entered: str | None = None
    cancelled = False

    def wait_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if entered != path:
                here.walk.pause(path)
            if cancelled:
                raise _Cancelled

        return hook

    def run(walk: _Walk) -> None:
        here.walk = walk
        walk.go.wait()
        walk.go.clear()
        try:
            if not cancelled:
                walk.work()
        except BaseException as error:  # whatever it is belongs to the caller's thread
            walk.error = error
        finally:
            walk.wants = None
            walk.paused.set()

    threads = [threading.Thread(target=run, args=(walk,), daemon=True) for walk in walks]
    handles = [layer.register_forward_pre_hook(wait_for(path)) for path, layer in layers.items()]
    try:
        for thread, walk in zip(threads, walks, strict=True):
            thread.start()
            walk.resume()
        while (path := _next(walks, last)) is not None:
            yield path, False
            entered = path
            for walk in walks:
                if walk.wants == path:
                    walk.resume()
            entered = None
            yield path, True
    finally:
        cancelled = True
        for thread, walk in zip(threads, walks, strict=True):
            walk.go.set()
            if thread.ident is not None:
                thread.join()
        for handle in handles:
            handle.remove()


def _next(walks: Sequence[_Walk], last: Collection[int]) -> str | None:
    """The layer that is entered next; None where no work waits."""
    waiting = [(number, walk.wants) for number, walk in enumerate(walks) if walk.wants is not None]
    late = {path for number, path in waiting if number in last}
    early = (path for _, path in waiting if path not in late)
    return next(early, waiting[0][1] if waiting else None)


class _Cancelled(BaseException):
    """Ends a work whose siblings failed. No Exception, so that no model's code catches it."""


@dataclass(slots=True, eq=False)
class _Walk:
    """One work: the layer that it waits for (None: it has not begun or has ended), and the two signals."""

    work: Callable[[], None]
    wants: str | None = None
    error: BaseException | None = None
    go: threading.Event = field(default_factory=threading.Event)
    paused: threading.Event = field(default_factory=threading.Event)

    def pause(self, path: str) -> None:
        """In the work's own thread: wait until the layer was entered."""
        self.wants = path
        self.paused.set()
        self.go.wait()
        self.go.clear()
        self.wants = None

    def resume(self) -> None:
        """In the caller's thread: let the work run until it waits or ends."""
        self.paused.clear()
        self.go.set()
        self.paused.wait()
        if self.error is not None:
            raise self.error
