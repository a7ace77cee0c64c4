"""The engine: requests in, a step at a time, outputs out."""

from __future__ import annotations

import functools
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import index

import numpy as np

from cupaged.arguments import is_int, require
from cupaged.backends.base import MAX_TOP_TOKENS, Backend
from cupaged.config import EngineConfig, ModelConfig
from cupaged.engine.audit import audit
from cupaged.engine.batch import Batch
from cupaged.engine.beam_search import BeamSearch, Choice, Continuation
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.logit_edits import LogitRules
from cupaged.engine.output_text import OutputText
from cupaged.engine.pipeline import Pipeline
from cupaged.engine.prefix import PrefixHasher, PrefixKey
from cupaged.engine.runner import LaunchedStep, Runner
from cupaged.engine.sampler import Logprobs
from cupaged.engine.scheduler import Schedule, Scheduler
from cupaged.engine.sequence import FINISHED, Request, Sequence, SequenceState
from cupaged.engine.stats import Counts, EngineStats, stats
from cupaged.engine.swap import SwapSpace
from cupaged.errors import OutOfMemoryError, QueueFullError
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.memory.budget import (
    fit_max_model_len,
    format_bytes,
    kv_cache_bytes,
    num_kv_blocks,
    swap_space_bytes,
)
from cupaged.outputs import CompletionOutput, Logprob, RequestOutput
from cupaged.sampling_params import BeamSearchParams, SamplingParams


class Engine:
    """Runs requests on a model whose weights are in place.

    One thread may step while others add and abort requests: these wait for the end of the step.

    decoder: has `forward(batch, arena)` and `compute_logits(indices)`, as models.decoder.Decoder. tokenizer: turns
    prompts and outputs from and to text; without it both are token ids only.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, decoder, backend: Backend, tokenizer=None):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self._token_text = functools.cache(  # decoding costs more than all else about a log probability
            lambda token_id: None if tokenizer is None else tokenizer.decode([token_id], False)
        )
        self.backend = backend
        self.arena = self._make_arena()
        self.max_model_len = fit_max_model_len(config, model, self.arena.layout, self.arena.max_blocks)

        self.pool = BlockPool(self.arena.grow)
        self._take_first_slabs()
        self.hasher = PrefixHasher(config.block_size) if config.enable_prefix_caching else None
        self.blocks = BlockManager(self.pool, config.block_size, self.hasher, model.sliding_window)
        self.swap_arena, self.swap = None, None
        if num_bytes := swap_space_bytes(config, backend):
            self.swap_arena = self._make_swap_arena(num_bytes)
            swap_pool = BlockPool(self.swap_arena.grow)
            self.swap = SwapSpace(self.blocks, swap_pool, self.arena.layout.bytes_per_block)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_chunk=config.long_prefill_token_threshold,
            by_priority=config.scheduling_policy == "priority",
            swap=self.swap,
            always_swap=config.preemption_mode == "swap",
        )
        self.runner = Runner(
            backend,
            decoder,
            self.arena,
            # A padded embedding has ids that stand for no token.
            vocab_size=model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size),
            max_num_tokens=config.max_num_batched_tokens,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            window=model.sliding_window,
            enforce_eager=config.enforce_eager,
        )
        is_async = config.async_scheduling if config.async_scheduling is not None else backend.name == "cuda"
        self.pipeline = Pipeline(self.scheduler, is_async=is_async)
        self.last_step = Schedule()  # the last whose tokens were taken in, for those who look on
        self._requests: dict[str, Request] = {}
        self._rng = random.Random(config.seed)
        self._model_key = f"{model!r}, {backend.dtype}"  # of prefixes

        self._lock = threading.RLock()
        self._stepping = threading.Lock()  # held in a step: a lock, as an interrupt can't leave it in a wrong state
        self._to_abort: list[tuple[str, int | None]] = []  # asked for within a step
        self._is_torn = False  # a change of the books was broken off

        self.counts = Counts()
        self._last_step_end = self._next_trim_time = 0.0
        if config.debug:
            self.pool.handed_out = []
            self.arena.poison(self.pool.unused_blocks())

    def add_request(
        self,
        request_id: str,
        prompt: str | Iterable[int],
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request.

        params: BeamSearchParams ask for a beam search; its outputs come at its end, the best first. Before that there
        is an output whenever all beams agree on another token, if params.output_kind wants it.
        priority: with scheduling_policy "priority", lower values are served first. cache_salt: it shares cached
        prefixes only with requests of the same salt, so that their times tell strangers nothing about its prompt.

        Raises ValueError, naming what is wrong, for one that can't be run, and QueueFullError.
        """
        params = params or SamplingParams()
        require(is_int(priority), "priority", priority, "an integer")
        require(cache_salt is None or (isinstance(cache_salt, str) and cache_salt != ""),
                "cache_salt", cache_salt, "a string that is not empty, or None")  # fmt: skip
        token_ids = self.encode(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer; this engine has none")
        beam_params = params if isinstance(params, BeamSearchParams) else None
        if beam_params is not None:
            params = beam_params.for_each_beam()
        name = "beam_width" if beam_params is not None else "best_of" if params.picks_best else "n"
        max_len = self._max_len(token_ids, params, name)
        search = None
        if beam_params is not None:
            search = self._new_search(beam_params, max_num_tokens=max_len - len(token_ids))
        logit_rules = None
        if LogitRules.asked_by(params):
            logit_rules = LogitRules(
                params,
                token_ids,
                vocab_size=self.runner.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
                tokenizer=self.tokenizer,
            )
        with self._lock:
            self._mend()
            if request_id in self._requests:
                raise ValueError(f"request_id {request_id!r} is in use by a request that has not finished")
            if self.config.max_queue_len is not None and len(self.scheduler.waiting) >= self.config.max_queue_len:
                raise QueueFullError(
                    f"{len(self.scheduler.waiting)} requests wait already: try again later, or raise "
                    f"max_queue_len={self.config.max_queue_len}"
                )
            request = Request(
                request_id,
                prompt if isinstance(prompt, str) else None,
                token_ids,
                params,
                params.seed if params.seed is not None else self._rng.getrandbits(64),
                time.monotonic(),
                logit_rules,
                priority=priority,
                prefix_key=PrefixKey(self._model_key, salt=cache_salt),
                max_len=max_len,
                search=search,
            )
            if search is not None:
                search.settled = Sequence(request, 0)
                search.settled.output_text = self._new_text(params)
            if search is None or params.stop:
                for seq in request.sequences:
                    seq.output_text = self._new_text(params)
            with self._changing_books():
                self.scheduler.add(request)
                self._requests[request_id] = request

    def _new_search(self, params: BeamSearchParams, max_num_tokens: int) -> BeamSearch:
        vocab_size = self.runner.vocab_size
        search = BeamSearch(
            params, eos_token_ids=self.model.eos_token_ids, vocab_size=vocab_size, max_num_tokens=max_num_tokens
        )
        if search.num_candidates > MAX_TOP_TOKENS:
            raise ValueError(
                f"beam_width={params.beam_width} needs the {search.num_candidates} likeliest tokens after each beam "
                f"(stop tokens and stop strings count), which is over {MAX_TOP_TOKENS}: lower it"
            )
        return search

    def _new_text(self, params: SamplingParams) -> OutputText | None:
        if not params.detokenize or self.tokenizer is None:
            return None
        decoder = self.tokenizer.decoder(params.skip_special_tokens)
        return OutputText(decoder, params.stop, params.include_stop_str_in_output, params.min_tokens)

    def encode(self, prompt: str | Iterable[int]) -> list[int]:
        """The token ids of a prompt. Raises ValueError, naming what is wrong, for one that can't be run."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: text needs a tokenizer; this engine has none, so give token ids")
            if not prompt:
                raise ValueError("prompt is empty: give at least one character")
            token_ids = self.tokenizer.encode(prompt)
        else:
            try:
                token_ids = [index(token_id) for token_id in prompt]
            except TypeError:
                raise ValueError(f"prompt must be text or integer token ids; got {prompt!r:.100}") from None
        if not token_ids:
            raise ValueError("prompt is empty: give at least one token")
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self.model.vocab_size:
                raise ValueError(f"prompt: token ids must be in [0, {self.model.vocab_size}); got {token_id}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens, which with one more for the output is over "
                f"max_model_len={self.max_model_len}: shorten it or raise max_model_len (its KV cache would take "
                f"{format_bytes(len(token_ids) * self.arena.layout.bytes_per_token)})"
            )
        return token_ids

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def has_request(self, request_id: str) -> bool:
        """Whether it was added and has not finished."""
        return request_id in self._requests

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what is new, as each request's output_kind says.

        An exception ends all requests of the step, and frees their blocks; the engine goes on with the others.
        """
        with self._lock:
            if self._stepping.locked():
                raise RuntimeError("step() was called from within a step")
            self._mend()
            with self._stepping, self._changing_books():
                outputs = self._step()
                while self._to_abort:
                    output = self._abort(*self._to_abort.pop(0))
                    if output is not None:
                        outputs.append(output)
            self._trim_idle()
            if self.config.debug:
                self._debug()
            return outputs

    def abort(self, request_id: str, index: int | None = None) -> RequestOutput | None:
        """End a request, or the output `index` of its outputs; returns what it has got so far.

        A beam search has no such outputs before its end, so index must be None for one (ValueError).
        None, and no harm done, when that has finished already. None too when this is called from within a step, by
        something that the step calls: the request then ends with the step, which returns its last output.
        """
        with self._lock:
            request = self._requests.get(request_id)
            if index is not None and request is not None and request.search is not None:
                raise ValueError(f"index: request {request_id!r} is a beam search, which ends as a whole; leave it out")
            if self._stepping.locked():
                self._to_abort.append((request_id, index))
                return None
            self._mend()
            with self._changing_books():
                return self._abort(request_id, index)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, what running requests have computed included."""
        with self._lock:
            self._mend()
            requests = [*self.scheduler.running, *self.scheduler.waiting]
            self.blocks.reset_prefix_cache([seq for request in requests for seq in request.active])

    def trim(self, idle_seconds: float = 0.0) -> int:
        """Give memory of the KV cache back to where it came from (CuPy's current allocator on a GPU), while requests
        run on: the slabs of which no block has been in use for so many seconds. Prefixes that are cached there are
        forgotten. Returns how many bytes that makes.

        Steps do so by themselves with idle_trim_seconds. A program that stops stepping calls this."""
        with self._lock:
            if self._stepping.locked():
                raise RuntimeError("trim() was called from within a step")
            self._mend()
            return self._trim(idle_seconds)

    def audit(self) -> list[str]:
        """What is wrong with the books, a line each; none if all is well."""
        with self._lock:
            self._mend()
            with self._changing_books():
                self.pipeline.settle()
            return audit(self)

    def stats(self) -> EngineStats:
        with self._lock:
            if not self._requests and not self._stepping.locked():
                self._mend()
                with self._changing_books():
                    self.pipeline.settle()
            return stats(self)

    def close(self) -> None:
        """End all requests and give the memory back."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.reset_prefix_cache()
        self.pipeline.settle()
        self.runner = None
        self.arena.close()
        if self.swap_arena is not None:
            self.swap_arena.close()
        self.backend.close()

    # -- memory --------------------------------------------------------------------------------------------

    def _make_arena(self) -> KVArena:
        max_bytes = kv_cache_bytes(self.config, self.backend)
        max_blocks = num_kv_blocks(max_bytes, self._layout(1).bytes_per_block)
        return KVArena(self._layout(max_blocks), self.backend, max_blocks)

    def _make_swap_arena(self, max_bytes: int) -> KVArena:
        bytes_per_block = self.arena.layout.bytes_per_block
        max_blocks = max_bytes // bytes_per_block
        if max_blocks == 0:
            raise ValueError(
                f"swap_space_bytes: one block needs {format_bytes(bytes_per_block)}; got {format_bytes(max_bytes)}"
            )
        return KVArena(self._layout(max_blocks), self.backend, max_blocks, self.backend.empty_host)

    def _layout(self, max_blocks: int) -> KVLayout:
        return KVLayout.choose(
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            block_size=self.config.block_size,
            head_dim=self.model.head_dim,
            dtype=self.backend.dtype,
            max_blocks=max_blocks,
        )

    def _take_first_slabs(self) -> None:
        """The first one, or all of them when the cache is preallocated."""
        while (added := self.arena.grow()) > 0:
            self.pool.add_blocks(added)
            if not self.config.preallocate:
                break
        if not self.arena.slabs or (self.config.preallocate and self.arena.num_blocks < self.arena.max_blocks):
            layout = self.arena.layout
            wanted = layout.bytes_per_slab * (self.arena.max_slabs if self.config.preallocate else 1)
            free, _ = self.backend.memory_info()
            raise OutOfMemoryError(
                f"the KV cache wants {format_bytes(wanted)} at the start, and {format_bytes(free)} are free: lower "
                "kv_cache_memory_bytes (--kv-cache-memory) or gpu_memory_utilization (--gpu-memory-utilization)"
            )

    def _memories(self) -> list[tuple[BlockPool, KVArena]]:
        return [(self.pool, self.arena)] + ([(self.swap.pool, self.swap_arena)] if self.swap is not None else [])

    def _trim_idle(self) -> None:
        idle_seconds = self.config.idle_trim_seconds
        if idle_seconds is not None and not self.config.preallocate and time.monotonic() >= self._next_trim_time:
            self._trim(idle_seconds)
            self._next_trim_time = time.monotonic() + idle_seconds / 2  # to look each time would be too often

    def _trim(self, idle_seconds: float) -> int:
        num_bytes, since = 0, time.monotonic() - idle_seconds
        with self._changing_books():
            self.pipeline.settle()
            for pool, arena in self._memories():
                for slab in pool.idle_slabs(since):
                    pool.remove_slab(slab)
                    arena.release(slab)
                    num_bytes += arena.layout.bytes_per_slab
        return num_bytes

    def _max_len(self, token_ids: list[int], params: SamplingParams, name: str) -> int:
        """Where the sequences of such a request end, prompt and output together. name: of what says how many they are.

        They must fit into the cache together, as they run together. Raises ValueError when they never do.
        """
        max_len = self.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, len(token_ids) + params.max_tokens)
        count = params.num_sequences
        if count > self.scheduler.max_num_seqs:
            raise ValueError(
                f"{name} must be at most {self.scheduler.max_num_seqs}, as many sequences as may run at once "
                f"(max_num_seqs, max_num_batched_tokens); got {count}"
            )
        # The last token's keys and values are never needed. The full blocks of the prompt are shared.
        block_size, max_blocks = self.config.block_size, self.arena.max_blocks
        shared = len(token_ids) // block_size
        own = -(-(max_len - 1) // block_size) - shared
        needed = shared + count * own
        if needed <= max_blocks:
            return max_len
        longest = (shared + (max_blocks - shared) // count) * block_size + 1
        if params.max_tokens is None and longest > len(token_ids):
            return longest
        bytes_per_block = self.arena.layout.bytes_per_block
        need, have = format_bytes(needed * bytes_per_block), format_bytes(max_blocks * bytes_per_block)
        raise ValueError(
            f"{name}={count} outputs of up to {max_len - len(token_ids)} tokens need {need} of KV cache, which has "
            f"{have}: lower {name} or max_tokens, or raise kv_cache_memory_bytes (--kv-cache-memory)"
        )

    # -- the books -----------------------------------------------------------------------------------------

    @contextmanager
    def _changing_books(self) -> Iterator[None]:
        """Around what changes requests, schedule and blocks: if it is broken off anywhere, they are mended."""
        self._is_torn = True
        try:
            yield
        except BaseException:
            self._mend()
            raise
        self._is_torn = False

    def _mend(self) -> None:
        """If a change was broken off, end all requests that ran and let the others wait, with no block in use, here
        or in the swap space: what the broken step was to copy there may be missing.

        May itself be broken off: the next call starts it again.
        """
        if not self._is_torn:
            return
        with suppress(Exception):  # of the device, if that was what broke
            self.runner.wait()
        self.runner.forget_copies()
        self._to_abort.clear()
        waiting = {}
        for request_id, request in self._requests.items():
            if not request.finished and all(
                seq.state in (SequenceState.WAITING, SequenceState.SWAPPED) for seq in request.unfinished
            ):
                waiting[request_id] = request
        self.scheduler.restart(list(waiting.values()))
        for pool, arena in self._memories():  # a slab may have been on its way in or out
            for i, slab in enumerate(arena.slabs):
                if slab is not None and not pool.has_slab(i):
                    pool.add_blocks(arena.layout.blocks_per_slab, i)
        if self.pipeline.in_flight is not None:  # what it was to write counted as written
            self.pool.forget_all()
            self.pipeline.in_flight = None
        self._requests = waiting
        self._is_torn = False

    def _debug(self) -> None:
        problems = audit(self)
        if problems:
            raise RuntimeError("the engine's books are wrong: " + "; ".join(problems))
        self.arena.poison(self.pool.unused_blocks())
        if self.swap is not None:
            self.swap_arena.poison(self.swap.pool.unused_blocks())

    # -- a step --------------------------------------------------------------------------------------------

    def _step(self) -> list[RequestOutput]:
        step = self.pipeline.next(self._launch)
        self.last_step = schedule = step.schedule
        touched: dict[Request, list[Sequence]] = {}  # with news that are to be told now, in order
        for request in schedule.failed:
            if request.search is not None:
                self._end_search(request, "error")
            else:
                for seq in request.sequences:
                    if seq.finish_reason == "error":  # others have ended before
                        self._settle_text(seq, len(seq.token_ids))
            touched[request] = request.sequences
        if schedule.sequences:
            for seq in self._take_in(step):
                request = seq.request
                if request.tells_end_only and seq.state is not FINISHED:
                    continue
                if request.is_single:
                    touched[request] = request.sequences
                else:
                    touched.setdefault(request, []).append(seq)
        outputs = []
        for request, sequences in touched.items():
            output = self._output(request, sequences)
            if output is not None:
                outputs.append(output)
                if output.finished:
                    del self._requests[request.request_id]
        return outputs

    def _abort(self, request_id: str, index: int | None = None) -> RequestOutput | None:
        request = self._requests.get(request_id)
        if request is None:
            return None
        ended = [seq for seq in request.unfinished if index is None or seq.index == index]
        if not ended:
            return None
        if request.search is not None:
            ended = self._end_search(request, "abort")
        else:
            for seq in ended:
                self._finish(seq, "abort")
        output = self._output(request, ended)
        if request.finished:
            del self._requests[request_id]
        return output

    def _launch(self, schedule: Schedule, before: LaunchedStep | None = None) -> LaunchedStep:
        """before: the step that decides which beams go on; it may still be computed."""
        if schedule.swap_outs:
            self._swap(self.swap_arena, self.arena, schedule.swap_outs)
        if self.pool.handed_out is not None:
            self.arena.poison(self.pool.handed_out)
            self.pool.handed_out.clear()
        if schedule.swap_ins:
            self._swap(self.arena, self.swap_arena, schedule.swap_ins)
        now = time.monotonic()
        for seq in schedule.sequences:
            if seq.request.metrics.first_scheduled_time is None:
                seq.request.metrics.first_scheduled_time = now
                self.counts.add_begun(seq.request)

        fill_in = None if before is None else functools.partial(self._fill_in_beams, before, schedule)
        return self.runner.launch(schedule, fill_in)

    def _take_in(self, step: LaunchedStep) -> list[Sequence]:
        """Wait for a step and take in its tokens; returns the sequences of which there are news."""
        schedule, (token_ids, logprobs) = step.schedule, step.draws
        choices = step.choices
        if choices is None:
            choices = self._choose_beams(step, self._searches(step))
        self.scheduler.complete(schedule)
        self.counts.add_step(self.pool, self.scheduler.running, self.config.block_size)
        now = time.monotonic()
        if self.swap is not None and schedule.num_decodes < len(schedule.sequences):
            self.swap.prefill_rate.add(sum(schedule.num_tokens), now - max(step.launch_time, self._last_step_end))
        self._last_step_end = now
        for request, scores in step.prompt_logprobs:
            self._add_prompt_logprobs(request, scores)
        touched = []
        for row, seq in step.sampled():
            request, token_id = seq.request, token_ids[row]
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if request.search is not None:
                continue
            touched.append(seq)
            if logprobs is not None and token_id >= 0 and request.num_logprobs is not None:
                self._add_drawn_logprobs(seq, logprobs, row)
            self._add_token(seq, token_id)
        for request, choice in choices.items():
            touched += self._advance_search(request, choice)
        return touched

    def _swap(self, dst: KVArena, src: KVArena, pairs: list[tuple[int, int]]) -> None:
        seconds, num_bytes = self.runner.swap(dst, src, pairs), len(pairs) * src.layout.bytes_per_block
        self.swap.copy_rate.add(num_bytes, seconds)
        self.counts.swapped_bytes += num_bytes
        self.counts.swap_seconds += seconds

    def _add_token(self, seq: Sequence, token_id: int) -> None:
        """Append a drawn token and finish the sequence if it is the last."""
        if token_id < 0:
            if seq.error is None:
                seq.error = f"the model gave no finite logit after {len(seq.token_ids)} tokens"
                if seq.logit_edits is not None:
                    seq.error += (
                        ", or none to a token that logits_processors, logit_bias, min_tokens, bad_words and "
                        "allowed_token_ids allow"
                    )
            self._finish(seq, "error")
            return
        params = seq.request.params
        seq.token_ids.append(token_id)
        self.counts.num_output_tokens += 1
        if token_id in self.model.eos_token_ids and not params.ignore_eos:
            self._finish(seq, "stop", ends_with_stop_token=True)
        elif token_id in params.stop_token_ids:
            self._finish(seq, "stop", token_id, ends_with_stop_token=True)
        elif seq.output_text is not None and (found := seq.output_text.push(token_id)) is not None:
            self.scheduler.finish(seq, "stop", found)
        elif len(seq.token_ids) >= seq.request.max_len:
            self._finish(seq, "length")

    def _finish(
        self, seq: Sequence, reason: str, stop_reason: int | None = None, *, ends_with_stop_token: bool = False
    ) -> None:
        """Settle the text of a sequence that no stop string has ended so far, and take it out of the schedule."""
        hide_last = ends_with_stop_token and not seq.request.params.include_stop_str_in_output
        found = self._settle_text(seq, len(seq.token_ids) - hide_last)
        if found is not None:
            reason, stop_reason = "stop", found
        self.scheduler.finish(seq, reason, stop_reason)

    def _settle_text(self, seq: Sequence, end: int) -> str | None:
        """The text ends with token `end` - 1; returns a stop string that shows up in its last bytes."""
        if seq.output_text is None:
            return None
        found = self._decode(seq, end)
        return found if found is not None else seq.output_text.flush()

    def _decode(self, seq: Sequence, end: int) -> str | None:
        """Bring the text up to token `end`; returns the stop string that this completes, if any."""
        found, output_text = None, seq.output_text
        for token_id in seq.token_ids[seq.num_prompt_tokens + output_text.num_tokens : end]:
            found = output_text.push(token_id)
        return found

    def _add_drawn_logprobs(self, seq: Sequence, logprobs: Logprobs, row: int) -> None:
        end = 1 + seq.request.num_logprobs
        token_ids, values = logprobs.token_ids[row, :end].tolist(), logprobs.logprobs[row, :end].tolist()
        seq.cumulative_logprob += values[0]
        if seq.logprobs is not None:
            seq.logprobs.append(self._entries(token_ids, values, [int(logprobs.ranks[row]), *range(1, end)]))

    def _add_prompt_logprobs(self, request: Request, logprobs: Logprobs) -> None:
        end = 1 + request.params.prompt_logprobs
        columns = logprobs.token_ids[:, :end].tolist(), logprobs.logprobs[:, :end].tolist(), logprobs.ranks.tolist()
        for token_ids, values, rank in zip(*columns, strict=True):
            request.prompt_logprobs.append(self._entries(token_ids, values, [rank, *range(1, end)]))

    def _entries(self, token_ids: list[int], values: list[float], ranks: Iterable[int]) -> dict[int, Logprob]:
        entries: dict[int, Logprob] = {}
        for token_id, value, rank in zip(token_ids, values, ranks, strict=False):
            if token_id not in entries:  # the first one is often among the most likely
                entries[token_id] = Logprob(value, rank, self._token_text(token_id))
        return entries

    # -- beam search ---------------------------------------------------------------------------------------

    @staticmethod
    def _searches(step: LaunchedStep) -> dict[Request, list[tuple[int, Sequence]]]:
        """(row of the draws, beam) of each search's beams, in their order."""
        found: dict[Request, list[tuple[int, Sequence]]] = {}
        for row, seq in step.sampled():
            if seq.request.search is not None:
                found.setdefault(seq.request, []).append((row, seq))
        for beams in found.values():
            beams.sort(key=lambda pair: pair[1].index)
        return found

    @staticmethod
    def _choose_beams(step: LaunchedStep, searches: dict[Request, list[tuple[int, Sequence]]]) -> dict[Request, Choice]:
        """How each search goes on from a step that has finished. Nothing is changed."""
        step.choices = {}
        if searches:
            all_ids, all_values = step.draws[1].token_ids[:, 1:].tolist(), step.draws[1].logprobs[:, 1:].tolist()
        for request, found in searches.items():
            beams = [seq for _, seq in found]
            token_ids, values = [all_ids[row] for row, _ in found], [all_values[row] for row, _ in found]
            survivors, finished = request.search.choose(beams, token_ids, values)
            placed = request.search.place(request, survivors)
            step.choices[request] = Choice(token_ids, values, survivors, finished, placed)
        return step.choices

    def _fill_in_beams(self, step: LaunchedStep, schedule: Schedule, batch: Batch) -> np.ndarray | None:
        """Put into the batch of `schedule`, the step after `step`, what that one gives its beams: who goes on from
        whom, and with which token. Their sequences don't know yet. Returns (source, destination) of the blocks to be
        copied before, [n, 2] int32, if there are any."""
        # All that can be done before the step has finished; from then on the device waits.
        searches = self._searches(step)
        row_of = {seq: row for row, seq in enumerate(schedule.sequences) if seq.request.search is not None}
        step.wait()
        for beams in searches.values():
            for _, seq in beams:
                seq.token_ids.pop()  # what stood for its next token
        rows, token_ids, forks = [], [], []
        for request, choice in self._choose_beams(step, searches).items():
            if request.sequences[0] not in row_of:
                continue
            choice.is_launched = True
            if choice.placed:
                for seq, candidate in choice.placed:
                    rows.append(row_of[seq])
                    token_ids.append(candidate.token_id)
                forks += choice.forks
            else:  # the search ends here: any tokens do
                rows += [row_of[seq] for seq in request.sequences]
                token_ids += [0] * len(request.sequences)
        batch.token_ids[rows] = token_ids
        if not forks:
            return None
        return self.blocks.copies_of_forks(batch, *([row_of[seq] for seq in seqs] for seqs in zip(*forks, strict=True)))

    def _advance_search(self, request: Request, choice: Choice) -> list[Sequence]:
        """Take a search one token on. Returns the sequences of which there are news to tell."""
        search, survivors, placed = request.search, choice.survivors, choice.placed
        token_ids, values = choice.token_ids, choice.logprobs
        for candidate in choice.finished:
            if search.wants(candidate):
                seq = Sequence(request, len(request.sequences))
                seq.follow(candidate.beam)
                self._continue_beam(seq, candidate, token_ids, values)
                seq.state = SequenceState.FINISHED
                seq.finish_reason, seq.stop_reason = candidate.finish_reason, candidate.stop_reason
                search.keep(seq)
        if not survivors and not search.kept:
            for beam in request.unfinished:
                beam.error = f"the model gave no finite logit after {len(beam.token_ids)} tokens"
            return self._end_search(request, "error")
        if not survivors or search.is_over(survivors[0].cumulative_logprob, survivors[0].beam.num_output_tokens + 1):
            return self._end_search(request)

        self.scheduler.replace_beams(choice.forks, are_launched=choice.is_launched)
        for parent, seq in choice.forks:
            seq.follow(parent)
        for seq, candidate in placed:
            self._continue_beam(seq, candidate, token_ids, values)
        self.counts.num_output_tokens += len(survivors)
        settled = search.settled
        if not search.settle(request.sequences):
            return []
        if settled.output_text is not None:
            self._decode(settled, len(settled.token_ids))
        return [settled]

    def _continue_beam(
        self, seq: Sequence, candidate: Continuation, token_ids: list[list[int]], logprobs: list[list[float]]
    ) -> None:
        seq.token_ids.append(candidate.token_id)
        seq.cumulative_logprob = candidate.cumulative_logprob
        if candidate.text is not None:
            seq.output_text = candidate.text
        if seq.logprobs is not None:
            ids, values, column = token_ids[candidate.row], logprobs[candidate.row], candidate.column
            end = min(seq.request.params.logprobs, seq.request.num_logprobs)
            ranks = [column + 1, *range(1, end + 1)]
            seq.logprobs.append(self._entries([ids[column], *ids[:end]], [values[column], *values[:end]], ranks))

    def _end_search(self, request: Request, reason: str | None = None) -> list[Sequence]:
        """Make what was kept the request's sequences, the best first, and return them. If it ends early, for
        `reason`, beams take the places that are left; and after an error all say so, as better ones may be missing."""
        search, beams = request.search, request.sequences
        for beam in request.unfinished:
            self.scheduler.finish(beam, reason or "length")
        found = [hypothesis.sequence for hypothesis in search.kept]
        if reason is not None:
            beams = sorted((b for b in beams if b.cumulative_logprob > -math.inf), key=lambda b: -b.cumulative_logprob)
            found += beams[: search.beam_width - len(found)]
        best, told = found[0], search.settled  # it begins with what was told of already
        best.news_start = told.news_start
        for rank, seq in enumerate(found):
            seq.index = rank
            seq.output_text = told.output_text if seq is best else self._new_text(request.params)
            hide_last = search.ends_with_stop_token(seq) and not request.params.include_stop_str_in_output
            stop = self._settle_text(seq, len(seq.token_ids) - hide_last)
            if stop is not None:
                seq.finish_reason, seq.stop_reason = "stop", stop
            if reason == "error":
                seq.finish_reason = "error"
        request.sequences = found
        return found

    # -- outputs -------------------------------------------------------------------------------------------

    def _output(self, request: Request, touched: list[Sequence]) -> RequestOutput | None:
        """What to tell of `request` after a step that brought news of the sequences `touched`; None when it is to be
        told of at its end only."""
        finished = touched[0].state is FINISHED if request.is_single else request.finished
        if finished:
            request.metrics.finished_time = time.monotonic()
        elif request.tells_end_only:
            return None
        completions = [self._completion(touched[0])] if request.is_single else self._completions(request, touched)
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is not None and request.tells_news_only:
            prompt_logprobs = prompt_logprobs[request.num_sent_prompt_logprobs :] or None
            request.num_sent_prompt_logprobs = len(request.prompt_logprobs)
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            completions,
            finished,
            request.metrics,
            request.num_cached_tokens,
            prompt_logprobs,
        )

    def _completions(self, request: Request, touched: list[Sequence]) -> list[CompletionOutput]:
        if request.picks_best:
            best = sorted(request.sequences, key=lambda seq: (seq.finish_reason == "error", -seq.cumulative_logprob))
            completions = [self._completion(seq) for seq in best[: request.params.n]]
            for rank, completion in enumerate(completions):
                completion.index = rank
            return completions
        sequences = request.sequences
        if request.tells_news_only or request.search is not None:
            sequences = sorted(touched, key=lambda seq: seq.index)
        return [self._completion(seq) for seq in sequences]

    def _completion(self, seq: Sequence) -> CompletionOutput:
        request, token_ids, output_text = seq.request, seq.token_ids, seq.output_text
        start, text, logprobs = seq.news_start, "", seq.logprobs
        if output_text is not None:
            text = output_text.take() if request.tells_news_only else output_text.text
        if request.tells_news_only:
            seq.news_start = len(token_ids)
        has_sum = logprobs is not None or (request.search is not None and seq.state is FINISHED)
        return CompletionOutput(
            seq.index,
            text,
            token_ids[start:],
            seq.cumulative_logprob if has_sum else None,
            logprobs[start - seq.num_prompt_tokens :] if logprobs is not None else None,
            seq.finish_reason,
            seq.stop_reason,
            seq.error,
        )
