"""The front door: a model, its tokenizer and an engine in one object."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupaged.arguments import require
from cupaged.backends.base import Backend
from cupaged.backends.select import choose_device, choose_dtype, open_backend
from cupaged.config import EngineConfig
from cupaged.engine.engine import Engine
from cupaged.errors import CupagedError
from cupaged.memory.budget import format_bytes, wanted_max_model_len
from cupaged.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from cupaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from cupaged.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | BeamSearchParams
Message = Mapping[str, Any]  # {"role": "user", "content": "..."}

logger = logging.getLogger(__name__)


class LLM:
    """A model, ready to generate. Not for several threads at once.

        with LLM() as llm:
            print(llm.generate("The capital of France is")[0].outputs[0].text)

    model: a directory in Hugging Face layout, a .gguf file, a hub id or a short name; None is SmolLM2-135M-Instruct.
    device: "cuda", "cpu", or "auto": a GPU if one is usable. offline: never touch the network.
    load_format: "dummy" takes random weights and needs no more of the model than its config.json (whose path will do);
    there is no tokenizer then, so prompts are token ids.
    progress: gets a line for each thing that takes time while the model is fetched.
    on_step: called after each step with the engine and the step's start and end (seconds on time.monotonic()'s clock).
    What it raises comes out of the call that generates, whose requests end; the others go on with their next call.
    The other options are those of EngineConfig.

    Raises ValueError for options that make no sense, and CupagedErrors: ModelNotFoundError, CheckpointError,
    DeviceError, OutOfMemoryError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        long_prefill_token_threshold: int = EngineConfig.long_prefill_token_threshold,
        block_size: int = EngineConfig.block_size,
        gpu_memory_utilization: float = EngineConfig.gpu_memory_utilization,
        kv_cache_memory_bytes: int | None = None,
        preallocate: bool = False,
        idle_trim_seconds: float | None = EngineConfig.idle_trim_seconds,
        enable_prefix_caching: bool = True,
        scheduling_policy: str = EngineConfig.scheduling_policy,
        preemption_mode: str = EngineConfig.preemption_mode,
        swap_space_bytes: int | None = None,
        async_scheduling: bool | None = None,
        max_queue_len: int | None = None,
        enforce_eager: bool = False,
        debug: bool = False,
        seed: int | None = None,
        offline: bool = False,
        progress: Callable[[str], None] | None = None,
        on_step: Callable[[Engine, float, float], None] | None = None,
    ):
        config = EngineConfig(
            device=device,
            dtype=dtype,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            long_prefill_token_threshold=long_prefill_token_threshold,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            preallocate=preallocate,
            idle_trim_seconds=idle_trim_seconds,
            enable_prefix_caching=enable_prefix_caching,
            scheduling_policy=scheduling_policy,
            preemption_mode=preemption_mode,
            swap_space_bytes=swap_space_bytes,
            async_scheduling=async_scheduling,
            max_queue_len=max_queue_len,
            enforce_eager=enforce_eager,
            debug=debug,
            seed=seed,
        )
        require(load_format in ("auto", "dummy"), "load_format", load_format, "auto or dummy")
        from cupaged.weights.checkpoint import Checkpoint
        from cupaged.weights.dummy import DummyCheckpoint
        from cupaged.weights.hub import resolve

        use_cuda, why = choose_device(config.device)
        path = resolve(model, offline=offline, progress=progress)
        checkpoint = DummyCheckpoint(path) if load_format == "dummy" else Checkpoint(path)
        for warning in checkpoint.warnings:
            logger.warning(warning)
        backend = open_backend(use_cuda, choose_dtype(config.dtype, checkpoint.config.dtype, use_cuda))

        self.device_note = f"running on {backend.description}, {why}"  # which device, and why, in a line
        self._sampling_defaults = SamplingParams(**checkpoint.sampling_defaults)
        self._engine: Engine | None = _load_engine(config, checkpoint, backend)
        self._on_step = on_step
        self._num_requests = 0
        self._outputs: dict[str, deque[RequestOutput]] = {}  # of the requests that are being waited for

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or several, which run as one batch; a result for each, in their order.

        prompts: text or token ids, or a list of such. sampling_params: one for all, one for each, or None for
        get_default_sampling_params(); BeamSearchParams give the outputs of a beam search, the best first.
        priority: one for all, or one for each; with scheduling_policy "priority", lower values are served first.
        cache_salt: cached prefixes are shared only with requests of the same salt.

        Raises ValueError that names the prompt that can't be run, and QueueFullError.
        """
        prompts = [prompts] if _is_one_prompt(prompts) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, Params):
            sampling_params = [sampling_params or self._sampling_defaults] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"sampling_params: {len(sampling_params)} of them for {len(prompts)} prompts; give one for each, or one"
            )
        priorities = [priority] * len(prompts) if isinstance(priority, int) else list(priority)
        if len(priorities) != len(prompts):
            raise ValueError(
                f"priority: {len(priorities)} of them for {len(prompts)} prompts; give one for each, or one"
            )
        request_ids: list[str] = []
        try:
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                params = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
                try:
                    request_ids.append(self._add(prompt, params, priority=priorities[i], cache_salt=cache_salt))
                except ValueError as error:
                    raise ValueError(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from None
            return [output for request_id in request_ids for output in self._wait_for(request_id)]
        finally:
            for request_id in request_ids:
                self._drop(request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """The assistant's next message in one conversation or several; otherwise as `generate`.

        messages: [{"role": "user", "content": "..."}, ...], or a list of such. template_variables go to the model's
        chat template (tools=..., enable_thinking=...).
        """
        one = len(messages) == 0 or isinstance(messages[0], Mapping)
        tokenizer = self.get_tokenizer()
        conversations = [messages] if one else messages
        return self.generate([tokenizer.chat(c, **template_variables) for c in conversations], sampling_params)

    def beam_search(
        self, prompts: Prompt | Mapping[str, Any] | Sequence[Prompt | Mapping[str, Any]], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Search for the likeliest continuations of each prompt, as vLLM's LLM.beam_search does: params.beam_width
        sequences, the best first. generate() does the same, and gives RequestOutputs.

        prompts: as for `generate`; vLLM's {"prompt": text} and {"prompt_token_ids": [...]} will do as well.
        """
        require(isinstance(params, BeamSearchParams), "params", params, "BeamSearchParams")
        prompts = [prompts] if isinstance(prompts, Mapping) or _is_one_prompt(prompts) else prompts
        results = self.generate([_without_mapping(prompt) for prompt in prompts], params)
        return [self._beam_search_output(result) for result in results]

    def _beam_search_output(self, result: RequestOutput) -> BeamSearchOutput:
        prompt, tokenizer = result.prompt, self.engine.tokenizer
        if prompt is None:
            prompt = tokenizer.decode(result.prompt_token_ids) if tokenizer is not None else ""
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens=result.prompt_token_ids + completion.token_ids,
                    logprobs=completion.logprobs,
                    text=prompt + completion.text,
                    cum_logprob=completion.cumulative_logprob,
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                )
                for completion in result.outputs
            ]
        )

    def stream(self, prompt: Prompt, sampling_params: Params | None = None) -> Iterator[RequestOutput]:
        """Continue one prompt, with an output for each token: the whole text so far, or what is new in it if
        sampling_params.output_kind is DELTA. Of a beam search that is what all beams agree on, and at its end all that
        it found. Breaking off the iteration ends the request."""
        if not _is_one_prompt(prompt):
            raise ValueError("prompt must be text or token ids; generate() takes several")
        token_ids = self.engine.encode(prompt)  # so that a bad prompt raises here, not at the first output
        params = sampling_params or self._sampling_defaults

        def outputs() -> Iterator[RequestOutput]:
            request_id = self._add(token_ids, params)
            try:
                for output in self._wait_for(request_id):
                    output.prompt = prompt if isinstance(prompt, str) else None
                    yield output
            finally:
                self._drop(request_id)

        return outputs()

    def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError when there is none, as with load_format "dummy"."""
        if self.engine.tokenizer is None:
            raise ValueError("load_format 'dummy' comes without a tokenizer; give token ids")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over SamplingParams' own defaults."""
        return self._sampling_defaults

    def reset_prefix_cache(self) -> None:
        """Forget what was computed of earlier prompts and outputs."""
        self.engine.reset_prefix_cache()

    def trim(self) -> int:
        """Give the KV cache's memory that is not in use back to where it came from, on a GPU to CuPy's current
        allocator; returns how many bytes that makes. Cached prefixes in it are forgotten."""
        return self.engine.trim()

    def stats_lines(self) -> list[str]:
        """For people: how the KV cache was used."""
        stats = self.engine.stats()
        lines = [
            f"KV cache: {stats.peak_used_blocks} of {stats.max_blocks} blocks used at most, "
            f"{format_bytes(stats.kv_cache_bytes)} taken in {stats.num_slabs} slabs",
            f"KV waste: {stats.mean_waste:.1%} of the used blocks' token slots, on average",
        ]
        if stats.num_cached_tokens:
            lines.append(
                f"prefix cache: {stats.num_cached_tokens} of {stats.num_prompt_tokens} prompt tokens were found, "
                f"{stats.num_cached_blocks} blocks kept"
            )
        if stats.mean_sharing:
            lines.append(f"sharing: {stats.mean_sharing:.1%} of the blocks saved, {stats.num_copies} copied on write")
        if stats.num_graphs:
            lines.append(f"CUDA graphs: {stats.num_graphs} shapes of steps captured")
        if stats.num_preemptions:
            line = f"preemptions: {stats.num_preemptions}"
            if stats.num_tokens_lost:
                line += f", {stats.num_tokens_lost} tokens to be computed again"
            if stats.num_swaps:
                line += (
                    f", {stats.num_swaps} of them by swapping: {format_bytes(stats.swapped_bytes)} copied "
                    f"in {stats.swap_seconds:.3f} s"
                )
            lines.append(line)
        return lines

    def close(self) -> None:
        """Give the memory back; the object can't be used any more. Closing twice does no harm."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------------------

    def _add(self, prompt: str | Iterable[int], params: Params, **options) -> str:
        request_id = str(self._num_requests)
        self._num_requests += 1
        self._outputs[request_id] = deque()
        try:
            self.engine.add_request(request_id, prompt, params, **options)
        except BaseException:
            self._drop(request_id)
            raise
        return request_id

    def _wait_for(self, request_id: str) -> Iterator[RequestOutput]:
        """Its outputs up to the last. Those of other requests that the same steps bring are kept for them."""
        outputs, finished = self._outputs[request_id], False
        while not finished:
            while not outputs:
                if not self.engine.has_request(request_id):
                    raise CupagedError("the request was ended by an error in a step that it shared with others")
                self._step()
            output = outputs.popleft()
            finished = output.finished
            yield output

    def _step(self) -> None:
        start = time.monotonic()
        for output in self.engine.step():
            self._outputs[output.request_id].append(output)
        if self._on_step is not None:
            self._on_step(self.engine, start, time.monotonic())

    def _drop(self, request_id: str) -> None:
        """End the request if it still runs, and forget it."""
        del self._outputs[request_id]
        if self._engine is not None:
            self._engine.abort(request_id)


def _without_mapping(prompt):
    if not isinstance(prompt, Mapping):
        return prompt
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key]
    raise ValueError(f"prompt must have 'prompt' or 'prompt_token_ids'; got {prompt!r:.100}")


def _is_one_prompt(prompts) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def _load_engine(config: EngineConfig, checkpoint, backend: Backend) -> Engine:
    """Weights, then buffers, then what is left for the KV cache: each takes its memory before the next looks."""
    from cupaged.models.decoder import Decoder

    model = replace(checkpoint.config, eos_token_ids=checkpoint.eos_token_ids)
    max_model_len = wanted_max_model_len(config, model)
    max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    compiler = ThreadPoolExecutor(1)
    try:
        compiled = compiler.submit(backend.compile, model)
        weights = checkpoint.load(model, backend)
        compiled.result()
    finally:
        compiler.shutdown(wait=False)  # bad weights are reported at once
    backend.reserve(model, config.max_num_batched_tokens, max_num_seqs, max_model_len)
    decoder = Decoder(
        model,
        weights,
        backend,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_logits=max_num_seqs,
        max_model_len=max_model_len,
    )
    return Engine(config, model, decoder, backend, checkpoint.tokenizer)
