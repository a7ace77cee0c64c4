"""Two steps in flight: the next one is launched before the tokens of this one are known.

host    |launch n|  launch n+1  |take in n|  launch n+2  |take in n+1|  launch n+3  |take in n+2|
device           | step n               | step n+1                 | step n+2                 |

With beam searches, which need the tokens first, at least what can be prepared is, and nobody waits for the books:

host    |launch n| prepare n+1 |     |launch n+1|take in n| prepare n+2 |     |launch n+2|take in n+1|
device           | step n            |          | step n+1                    |          | step n+2
"""

from __future__ import annotations

from collections.abc import Callable

from cupaged.engine.runner import LaunchedStep
from cupaged.engine.scheduler import Scheduler


class Pipeline:
    """The steps that are launched and not taken in: one at most between two steps of the engine, two in one.

    To schedule step n+1, each sequence of step n gets a token that stands for the one that it draws: ~j, of row j of
    its draws, which the device puts in its place. All else is known beforehand: how many tokens there are, where they
    are written, who ends by length. Who turns out to have ended otherwise has wasted a row of step n+1, which nobody
    reads; its blocks are kept until that step has finished. What needs the tokens first waits for them: requests whose
    logits are edited by them, preemption.

    Beams are scheduled as if each went on by itself. Who goes on from whom is put into the batch when step n has
    finished, before n+1 is launched: see Engine._fill_in_beams.

    The host may give up what a step in flight has yet to read (the device is always one stream in order), but blocks
    that it writes are in nobody else's hands.

    is_async: whether to launch ahead at all. in_flight: the step that is to be taken in next, if it is launched.
    """

    def __init__(self, scheduler: Scheduler, *, is_async: bool):
        self.is_async = is_async
        self._scheduler = scheduler
        self.in_flight: LaunchedStep | None = None

    def next(self, launch: Callable[..., LaunchedStep]) -> LaunchedStep:
        """Wait for the step that is to be taken in, with the next one launched behind it if that can be.

        launch(schedule): launches it. launch(schedule, step): the beams of `schedule` follow what `step` will give.
        """
        if self.in_flight is not None and not self.in_flight.is_wanted:
            self.settle()
        step = self.in_flight or launch(self._scheduler.schedule())
        self.in_flight = step  # until it has finished: it may count as computed before
        behind = self._launch_behind(step, launch) if self.is_async and step.is_wanted else None
        step.wait()
        self.in_flight = behind
        return step

    def settle(self) -> None:
        """Wait until the device has nothing to do. A step that nobody needs any more is done with."""
        step = self.in_flight
        if step is None:
            return
        step.wait()
        if not step.is_wanted:
            self._scheduler.complete(step.schedule)
            self.in_flight = None

    def _launch_behind(self, step: LaunchedStep, launch: Callable[..., LaunchedStep]) -> LaunchedStep | None:
        # A group that resumes may leave the blocks that this very step writes, for what the cache has of its outputs.
        running = self._scheduler.running
        if any([request.needs_tokens or (request.is_forking and request.is_resuming) for request in running]):
            return None
        sampled = step.sampled()
        searching = [seq.request for _, seq in sampled if seq.request.search is not None]
        if any(request.is_forking for request in searching):  # its other beams begin with what this step gives
            return None
        self._scheduler.advance(step.schedule)
        for row, seq in sampled:
            seq.token_ids.append(~row)
        schedule = self._scheduler.schedule_ahead()
        behind = launch(schedule, step) if searching else launch(schedule)
        for _, seq in sampled:
            if not searching or seq.token_ids[-1] < 0:  # else the launch has seen to it
                seq.token_ids.pop()
        return behind if behind.schedule.sequences else None
