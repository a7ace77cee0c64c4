"""`cupaged generate`: prompts in, text out."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import click

from cupaged.cli.live import LiveView, is_drawable
from cupaged.cli.options import engine_options, model_options

if TYPE_CHECKING:
    from cupaged.llm import LLM
    from cupaged.outputs import CompletionOutput, Logprob, RequestOutput
    from cupaged.sampling_params import BeamSearchParams, SamplingParams

# llama.cpp's, for models whose generation_config.json says nothing about sampling.
TERMINAL_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
HEADER_WIDTH = 60


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--prompts", type=click.File("rb"), metavar="FILE.jsonl", help='One {"prompt": "..."} or "..." a line.')
@click.option("--chat", is_flag=True, help="The prompt is a user's message: apply the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message; implies --chat.")
@click.option("-n", "--max-tokens", "--max-new-tokens", type=int, help="[default: until EOS or the context's end]")
@click.option(
    "--n", type=int, metavar="N", help="Outputs of each prompt, drawn with one seed after another.  [default: 1]"
)
@click.option("--temperature", "--temp", type=float, help="0 is greedy.  [default: the model's, else 0.8]")
@click.option("--top-p", type=float, help="[default: the model's, else 0.95]")
@click.option("--top-k", type=int, help="0 keeps all.  [default: the model's, else 40]")
@click.option("--min-p", type=float, help="[default: the model's, else 0.05]")
@click.option("--repetition-penalty", "--repeat-penalty", type=float, help="[default: the model's, else 1: none]")
@click.option("--presence-penalty", type=float, help="[default: 0]")
@click.option("--frequency-penalty", type=float, help="[default: 0]")
@click.option("--seed", type=int, help="Makes the output repeatable.")
@click.option("--beam-width", type=int, metavar="N", help="Draw nothing: search the likeliest output with N beams.")
@click.option("--length-penalty", type=float, help="Of --beam-width: more than 0 favours long outputs.  [default: 1]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the output at TEXT; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--logprobs", type=int, metavar="K", help="With --json: log probabilities of the K likeliest tokens.")
@click.option("--prompt-logprobs", type=int, metavar="K", help="The same for the prompt's tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a prompt.")
@click.option("--no-stream", is_flag=True, help="Print when finished, not as it generates.")
@click.option("--stats", is_flag=True, help="Times, tokens a second and KV cache use, on stderr.")
@click.option(
    "--stats-live",
    is_flag=True,
    help="--stats, and on stderr, if it is a terminal, a view of blocks and batch while it generates. "
    "Text is printed at the end then.",
)
@click.option(
    "--trace",
    type=click.File("w", lazy=False),
    metavar="FILE.json",
    help="Write what happened when: for chrome://tracing, Perfetto and plot-trace.",
)
@click.option("--max-num-seqs", type=int, default=256, show_default=True, help="Most prompts that run at once.")
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    show_default=True,
    help="Compute once what prompts begin with in common.",
)
@engine_options
@model_options
def generate(
    prompt,
    prompts,
    chat,
    system,
    as_json,
    no_stream,
    stats,
    stats_live,
    trace,
    model,
    device,
    dtype,
    max_model_len,
    block_size,
    kv_cache_memory_bytes,
    gpu_memory_utilization,
    offline,
    max_num_seqs,
    enable_prefix_caching,
    preemption_mode,
    swap_space_bytes,
    enforce_eager,
    async_scheduling,
    **sampling,
) -> None:
    """Continue each PROMPT; several run as one batch. Without any, the prompt is read from standard input."""
    texts = _gather_prompts(prompt, prompts)
    for name in ("logprobs", "prompt_logprobs"):
        if sampling[name] is not None and not as_json:
            raise click.UsageError(f"--{name.replace('_', '-')}: needs --json, which has a place for them")
    beam_params = _beam_search_params(sampling)
    if beam_params is None:
        _check_sampling(sampling)

    from cupaged.llm import LLM
    from cupaged.trace import Trace

    view = LiveView(sys.stderr) if stats_live and is_drawable(sys.stderr) else None
    recorder = Trace() if trace is not None else None

    def on_step(*step) -> None:
        if recorder is not None:
            recorder.record(*step)
        if view is not None:
            view.update(*step)

    started = time.monotonic()
    with LLM(
        model,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=enable_prefix_caching,
        preemption_mode=preemption_mode,
        swap_space_bytes=swap_space_bytes,
        enforce_eager=enforce_eager,
        async_scheduling=async_scheduling,
        block_size=block_size,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        offline=offline,
        progress=lambda line: click.echo(line, err=True),
        on_step=on_step,
    ) as llm:
        click.echo(llm.device_note, err=True)
        params = beam_params or _sampling_params(llm, sampling)
        inputs: list[Any] = [_chat_ids(llm, text, system) if chat or system else text for text in texts]
        loaded = time.monotonic()
        num_shown = params.n if beam_params is None else 1  # of a search, the best
        streams = len(texts) == num_shown == 1 and not (as_json or no_stream or view is not None)
        with ExitStack() as watching:
            if recorder is not None:
                watching.callback(recorder.write, trace)
            if view is not None:
                watching.enter_context(view)
            results = [_stream(llm, inputs[0], params)] if streams else llm.generate(inputs, params)
        if not streams:
            for index, (text, result) in enumerate(zip(texts, results, strict=True)):
                if as_json:
                    click.echo(json.dumps(_as_json(index, text, result), ensure_ascii=False))
                else:
                    if len(texts) > 1:
                        click.echo(f"# [{index + 1}/{len(texts)}] {_header(text)}")
                    _show_outputs(result.outputs[:num_shown])
        if stats or stats_live:
            click.echo(_stats_text(llm, results, load_time=loaded - started), err=True)


def _gather_prompts(arguments: tuple[str, ...], file) -> list[str]:
    texts = list(arguments)
    if file is not None:
        texts += _read_jsonl(file)
    elif not texts:
        if sys.stdin.isatty():
            raise click.UsageError("PROMPT: none given; write one, name a file with --prompts, or pipe one in")
        texts = [sys.stdin.read()]
    for index, text in enumerate(texts):
        if not text:
            raise click.UsageError(f"PROMPT: number {index + 1} is empty; write some text")
    if not texts:
        raise click.UsageError("--prompts: the file holds no prompt")
    return texts


def _read_jsonl(file) -> list[str]:
    texts = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise click.UsageError(f"--prompts: line {number} of {file.name} is not JSON: {error}") from None
        text = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise click.UsageError(f'--prompts: line {number} of {file.name} must be "text" or {{"prompt": "text"}}')
        texts.append(text)
    return texts


def _beam_search_params(sampling: dict[str, Any]) -> BeamSearchParams | None:
    """What the options say of a beam search, which they then no longer hold; None if none is wanted."""
    from cupaged.sampling_params import BeamSearchParams

    own = {name: sampling.pop(name) for name in ("beam_width", "length_penalty")}
    if own["beam_width"] is None:
        if own["length_penalty"] is not None:
            raise click.UsageError("--length-penalty: needs --beam-width")
        return None
    given = {name: value for name, value in {**own, **sampling}.items() if value is not None}
    names = {field.name for field in fields(BeamSearchParams)}
    for name in given:
        if name not in names:
            raise click.UsageError(f"--{name.replace('_', '-')}: doesn't go with --beam-width, which draws nothing")
    return BeamSearchParams(**{"max_tokens": None, **given})


def _check_sampling(sampling: dict[str, Any]) -> None:
    """Find nonsense before the model is loaded."""
    from cupaged.sampling_params import SamplingParams

    SamplingParams(**{name: value for name, value in sampling.items() if value is not None})


def _sampling_params(llm: LLM, sampling: dict[str, Any]) -> SamplingParams:
    """The options given, over the model's own defaults, over the terminal's."""
    own = llm.get_default_sampling_params()
    unset = type(own)()
    defaults = {k: v for k, v in TERMINAL_DEFAULTS.items() if getattr(own, k) == getattr(unset, k)}
    given = {name: value for name, value in sampling.items() if value is not None}
    return replace(own, **{**defaults, **given, "max_tokens": given.get("max_tokens")})


def _chat_ids(llm: LLM, text: str, system: str | None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    return llm.get_tokenizer().chat([*messages, {"role": "user", "content": text}])


def _stream(llm: LLM, prompt: str | list[int], params: SamplingParams | BeamSearchParams) -> RequestOutput:
    shown = 0
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        if len(text) > shown:
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    sys.stdout.write("\n")
    return output


def _show_outputs(outputs: list[CompletionOutput]) -> None:
    for number, completion in enumerate(outputs, 1):
        if len(outputs) > 1:
            click.echo(f"## [{number}/{len(outputs)}]")
        click.echo(completion.text)


def _as_json(index: int, prompt: str, result: RequestOutput) -> dict[str, Any]:
    """A prompt's first output, and all of them if there are several: samples, or what a beam search has found."""
    outputs = [_completion_json(completion) for completion in result.outputs]
    return {
        "index": index,
        "prompt": prompt,
        "prompt_token_ids": result.prompt_token_ids,
        **_logprobs_json("prompt_logprobs", result.prompt_token_ids, result.prompt_logprobs),
        **outputs[0],
        **({"outputs": outputs} if len(outputs) > 1 else {}),
        "timings": _timings(result),
    }


def _completion_json(completion: CompletionOutput) -> dict[str, Any]:
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    return {
        **{name: getattr(completion, name) for name in names},
        **({"cumulative_logprob": total} if (total := completion.cumulative_logprob) is not None else {}),
        **_logprobs_json("logprobs", completion.token_ids, completion.logprobs),
    }


def _logprobs_json(name: str, token_ids: list[int], logprobs: list[dict[int, Logprob] | None] | None) -> dict[str, Any]:
    """Under `name`, per token: its own log probability, and the likeliest alternatives in order; null for a token that
    has none. Nothing if none were asked for."""
    if logprobs is None:
        return {}
    return {name: [None if e is None else _entry_json(i, e) for i, e in zip(token_ids, logprobs, strict=False)]}


def _entry_json(token_id: int, alternatives: dict[int, Logprob]) -> dict[str, Any]:
    own = alternatives[token_id]
    ranked = sorted(alternatives.items(), key=lambda item: item[1].rank)
    return {
        "token_id": token_id,
        "token": own.decoded_token,
        "logprob": own.logprob,
        "rank": own.rank,
        "top": [{"token_id": i, "token": lp.decoded_token, "logprob": lp.logprob} for i, lp in ranked],
    }


def _num_output_tokens(result: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in result.outputs)


def _timings(result: RequestOutput) -> dict[str, float | None]:
    """Seconds, and tokens a second after the first ones."""
    metrics, count = result.metrics, _num_output_tokens(result) - len(result.outputs)
    decode = metrics.finished_time - metrics.first_token_time if metrics.first_token_time is not None else 0.0
    return {
        "ttft": metrics.time_to_first_token,
        "total": metrics.finished_time - metrics.arrival_time,
        "tokens_per_second": count / decode if count > 0 and decode > 0 else None,
    }


def _stats_text(llm: LLM, results: list[RequestOutput], load_time: float) -> str:
    prompt_tokens = sum(len(r.prompt_token_ids) for r in results)
    output_tokens = sum(_num_output_tokens(r) for r in results)
    start = min(r.metrics.arrival_time for r in results)
    wall = max(r.metrics.finished_time for r in results) - start
    ttfts = sorted(t for r in results if (t := r.metrics.time_to_first_token) is not None)
    lines = [
        f"load: {load_time:.2f} s",
        f"tokens: {prompt_tokens} prompt, {output_tokens} generated in {wall:.2f} s"
        f" ({output_tokens / wall:.1f} tokens/s)",
    ]
    if ttfts:
        lines.append(f"time to first token: {ttfts[len(ttfts) // 2] * 1e3:.0f} ms median, {ttfts[-1] * 1e3:.0f} ms max")
    rate = _timings(results[0])["tokens_per_second"]
    if len(results) == 1 and rate:
        lines.append(f"decode: {rate:.1f} tokens/s, {1e3 / rate:.2f} ms a token")
    return "\n".join([*lines, *llm.stats_lines()])


def _header(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= HEADER_WIDTH else line[: HEADER_WIDTH - 1] + "…"
