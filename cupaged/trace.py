"""What the engine did and when, in Chrome's trace format: chrome://tracing and Perfetto show it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from cupaged.engine.engine import Engine
    from cupaged.engine.scheduler import Schedule
    from cupaged.engine.sequence import Request

Event = dict[str, Any]

PROCESS = THREAD = 1  # the format wants ids


@dataclass
class _Followed:
    """The times at which a request was out of the batch after it had been in it."""

    pauses: list[tuple[float, float]] = field(default_factory=list)
    paused_since: float | None = None


class Trace:
    """Records steps, requests and counters.

        trace = Trace()
        with LLM(on_step=trace.record) as llm:
            llm.generate(...)
        with open("trace.json", "w") as file:
            trace.write(file)

    Per step an event "prefill", "decode" or "prefill + decode" with its numbers of tokens and sequences, and for its
    time, as it left them, the counters "KV blocks" (used, cached, free: each block is one of these) and "sequences"
    (running, waiting).
    Per request a span with its "queue", "prefill" and "decode" in it, and in these "preempted", while it was that.
    """

    def __init__(self):
        self._origin = time.monotonic()
        self._events: list[Event] = [
            self._event("process_name", "M", args={"name": "cupaged"}),
            self._event("thread_name", "M", args={"name": "steps"}),
        ]
        self._followed: dict[Request, _Followed] = {}  # seen, and not seen to finish

    def record(self, engine: Engine, start: float, end: float) -> None:
        """Take note of the engine's last step and of its state after it; LLM's on_step. start, end: of the step, in
        seconds on time.monotonic()'s clock."""
        step = engine.last_step
        self._record_step(step, start, end)
        self._record_counters(engine, start)
        requests = dict.fromkeys([*(seq.request for seq in step.sequences), *step.failed, *engine.scheduler.running])
        self._follow(list(requests), list(engine.scheduler.waiting), start)

    def write(self, file: TextIO) -> None:
        """Requests that have not finished end where they have got to."""
        events = list(self._events)
        for request, followed in self._followed.items():
            events += self._request_events(request, followed)
        events.sort(key=lambda event: event.get("ts", 0))  # stable: what is nested stays so at equal times
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)

    def _record_step(self, step: Schedule, start: float, end: float) -> None:
        num_decodes, num_prefills = step.num_decodes, len(step.sequences) - step.num_decodes
        kinds = [kind for kind, count in (("prefill", num_prefills), ("decode", num_decodes)) if count]
        args = {
            "sequences": len(step.sequences),
            "tokens": sum(step.num_tokens),
            "prefill_sequences": num_prefills,
            "prefill_tokens": sum(step.num_tokens[num_decodes:]),
            "swapped_blocks": len(step.swap_outs) + len(step.swap_ins),
            "copied_blocks": len(step.copies),
        }
        duration = self._microseconds(end) - self._microseconds(start)
        self._events.append(self._event(" + ".join(kinds) or "empty", "X", start, cat="step", dur=duration, args=args))

    def _record_counters(self, engine: Engine, start: float) -> None:
        stats = engine.stats()
        counters = {
            "KV blocks": {
                "used": stats.num_used_blocks,
                "cached": stats.num_cached_blocks,
                "free": stats.num_free_blocks - stats.num_cached_blocks,
            },
            "sequences": {"running": stats.num_running, "waiting": stats.num_waiting},
        }
        self._events += [self._event(name, "C", start, args=args) for name, args in counters.items()]

    def _follow(self, in_batch: list[Request], waiting: list[Request], start: float) -> None:
        for request in waiting:
            followed = self._followed.setdefault(request, _Followed())
            if request.metrics.first_scheduled_time is not None and followed.paused_since is None:
                followed.paused_since = start
        for request in in_batch:
            followed = self._followed.setdefault(request, _Followed())
            if followed.paused_since is not None:
                followed.pauses.append((followed.paused_since, start))
                followed.paused_since = None
            if request.metrics.finished_time is not None:
                self._events += self._request_events(request, self._followed.pop(request))

    def _request_events(self, request: Request, followed: _Followed) -> Iterator[Event]:
        metrics = request.metrics
        end = metrics.finished_time if metrics.finished_time is not None else time.monotonic()
        args = {
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": request.num_cached_tokens or 0,
            "output_tokens": sum(seq.num_output_tokens for seq in request.sequences),
            "finish_reasons": [seq.finish_reason for seq in request.sequences],
        }
        times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time]
        starts = [start for start in times if start is not None]
        phases = list(zip(("queue", "prefill", "decode"), starts, [*starts[1:], end], strict=False))
        pauses = followed.pauses + ([(followed.paused_since, end)] if followed.paused_since is not None else [])

        name, ids = f"request {request.request_id}", {"cat": "request", "id": request.request_id}
        yield self._event(name, "b", metrics.arrival_time, **ids, args=args)
        for phase, phase_start, phase_end in [*phases, *(("preempted", *pause) for pause in pauses)]:
            yield self._event(phase, "b", phase_start, **ids)
            yield self._event(phase, "e", phase_end, **ids)
        yield self._event(name, "e", end, **ids)

    def _event(self, name: str, kind: str, at: float | None = None, **rest) -> Event:
        event = {"name": name, "ph": kind, "pid": PROCESS, "tid": THREAD}
        return event | ({"ts": self._microseconds(at)} if at is not None else {}) | rest

    def _microseconds(self, at: float) -> float:
        return round((at - self._origin) * 1e6, 3)
