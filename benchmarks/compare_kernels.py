"""Our matrix products and attention beside others', on the same arrays, in one run on one GPU.

    python benchmarks/compare_kernels.py [--config benchmarks/configs/llama-3.1-8b.json] [--json FILE]

Matrix products: cuBLAS through CuPy (where nvidia-cublas-cu12 is installed) and through torch. Attention: FlashInfer
and FlashAttention 3. What is not installed is left out, with a line that says so. Each is timed as `cupaged bench
kernels` does it: a graph of launches that go over more memory than the L2 cache holds. "x" is the rival's time over
ours, above 1 where we are quicker; "differs" is the largest difference of the results over the largest result.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.backends.cuda import open_cuda
from cupaged.benchmark.environment import environment
from cupaged.benchmark.figures import spread, table
from cupaged.benchmark.kernel_cases import attention_batch, num_cold_sets, random_array
from cupaged.benchmark.kernel_timing import GraphTimer, measure_ceilings
from cupaged.config import ModelConfig
from cupaged.errors import CupagedError
from cupaged.kernels.checks import BFLOAT16, ceil_div
from cupaged.kernels.paged_kv import CHUNK_SIZE, chunk_places
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.weights.dummy import read_config

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
DECODE = [(batch, length) for length in (512, 2048, 8192, 32768) for batch in (1, 8, 64, 256)]
PREFILL = [(1, 2048), (16, 512), (4, 2048), (1, 8192)]
BLOCK_SIZE = 16
CUBLAS = "cupy_backends.cuda.libs.cublas"
RIVALS = (CUBLAS, "torch", "flashinfer", "flash_attn_interface")
MAX_KV_BYTES = 36 << 30  # of one layer: (256, 32768) is 34 GB in 8B's shape

Launch = Callable[[int], None]
# What a rival is made of: launch(i) computes on set i, result() is what it has computed last, a NumPy array.
Rival = tuple[str, Launch, Callable[[], np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "llama-3.1-8b.json")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model, backend, timer = read_config(args.config), open_cuda(BFLOAT16), GraphTimer(args.repeats)
    rivals = {name: importable(name) for name in RIVALS}
    if (torch := rivals["torch"]) is not None:
        torch.cuda.set_stream(torch.cuda.ExternalStream(timer.stream.ptr))

    report: dict[str, Any] = {"environment": environment(backend), "config": args.config.name}
    report["rivals"] = {name: version(name, module) for name, module in rivals.items() if module is not None}
    report["ceilings_gb_per_s"] = measure_ceilings(backend, timer)
    report["figures"] = list(compare(backend, model, timer, rivals))
    print(json.dumps({key: value for key, value in report.items() if key != "figures"}, indent=2))
    names = sorted({key.removeprefix("x_") for row in report["figures"] for key in row if key.startswith("x_")})
    columns = [("kernel", "kernel"), ("shape", "shape"), ("us", "us"), ("GB/s", "gb_per_s"), ("TFLOP/s", "tflop_per_s")]
    for name in names:
        columns += [(f"{name} us", f"us_{name}"), ("x", f"x_{name}"), ("differs", f"differs_{name}")]
    print(table(columns, report["figures"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def importable(name: str):
    """The module, or None and a line that says why not."""
    package, _, module = name.rpartition(".")
    try:  # CuPy's libraries are attributes, which load them when they are asked for
        return getattr(importlib.import_module(package), module) if package else importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"{name}: left out: {str(error).splitlines()[0]}")
        return None


def version(name: str, module) -> str:
    if name == CUBLAS:
        import cupy

        return str(module.getVersion(cupy.cuda.device.get_cublas_handle()))
    return getattr(module, "__version__", "unknown")


def compare(backend: Backend, model: ModelConfig, timer: GraphTimer, rivals: dict) -> Iterator[dict]:
    shapes = {
        "qkv": (model.qkv_size, model.hidden_size),
        "o": (model.hidden_size, model.num_heads * model.head_dim),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "lm_head": (model.vocab_size, model.hidden_size),
    }
    token_bytes = 2 * 2 * model.num_kv_heads * model.head_dim
    sizes = [(*size, 1) for size in DECODE if size[0] * size[1] * token_bytes <= MAX_KV_BYTES]
    sizes += [(num_seqs, length, length) for num_seqs, length in PREFILL]
    backend.reserve(
        model,
        max(num_seqs * query_len for num_seqs, _, query_len in sizes),
        max(num_seqs for num_seqs, _, _ in sizes),
        max(length for _, length, _ in sizes),
    )
    for name, (n, k) in shapes.items():
        weights = [random_array(backend, (n, k), BFLOAT16) for _ in range(num_cold_sets(2 * n * k, timer.l2_bytes))]
        for m in ROWS:
            yield compare_linear(backend, timer, rivals, f"{name} {n}x{k}, {m} rows", weights, m)
        del weights
    for num_seqs, length, query_len in sizes:
        yield compare_attention(backend, model, timer, rivals, num_seqs, length, query_len)


def row(timer, kernel: str, shape: str, num_bytes: int, flops: int, num_sets: int, ours: Rival, others) -> dict:
    """Time ours, then each of the others."""
    launch, result = ours[1:]
    us = spread(timer(launch, num_sets).us)
    launch(0)
    expected = result().astype(np.float32)
    figures = {
        "kernel": kernel,
        "shape": shape,
        "us": us,
        "gb_per_s": num_bytes / us["median"] / 1e3,
        "tflop_per_s": flops / us["median"] / 1e6,
    }
    for name, launch, result in others:
        try:
            rival_us = spread(timer(launch, num_sets).us)
            launch(0)
            timer.stream.synchronize()  # where torch computes; result() waits for CuPy's default stream only
            difference = np.abs(result().astype(np.float32) - expected).max() / np.abs(expected).max()
        except Exception as error:  # a rival's own trouble with a shape must not end the run
            print(f"{name}: {kernel} {shape}: {str(error).splitlines()[0]}")
            continue
        figures |= {
            f"us_{name}": rival_us,
            f"x_{name}": rival_us["median"] / us["median"],
            f"differs_{name}": float(difference),
        }
    print(f"{kernel} {shape}: {us['median']:.2f} us")
    return figures


# -- matrix products -------------------------------------------------------------------------------------------------


def compare_linear(backend: Backend, timer, rivals: dict, shape: str, weights: list[Array], m: int) -> dict:
    n, k = weights[0].shape
    x, out = random_array(backend, (m, k), BFLOAT16), backend.empty((m, n), BFLOAT16)
    others_out = random_array(backend, (m, n), BFLOAT16)  # so that a rival which writes nothing differs

    def result() -> np.ndarray:
        return backend.to_host(others_out)

    others: list[Rival] = []
    if (cublas := rivals[CUBLAS]) is not None:
        others.append(("cuBLAS", cublas_linear(cublas, others_out, x, weights), result))
    if (torch := rivals["torch"]) is not None:
        torch_out, torch_x = as_torch(torch, others_out), as_torch(torch, x)
        transposed = [as_torch(torch, weight).T for weight in weights]
        others.append(("torch", lambda i: torch.mm(torch_x, transposed[i % len(transposed)], out=torch_out), result))
    ours = ("ours", lambda i: backend.linear(out, x, weights[i % len(weights)]), lambda: backend.to_host(out))
    return row(timer, "linear", shape, 2 * (n * k + m * k + m * n), 2 * m * n * k, len(weights), ours, others)


def cublas_linear(cublas, out: Array, x: Array, weights: list[Array]) -> Launch:
    """out = x @ weight^T. To cuBLAS, which counts down columns, our arrays are their transposes:
    out^T [n, m] = weight [n, k] (transposed back) @ x^T [k, m]."""
    import cupy

    (m, k), n = x.shape, weights[0].shape[0]
    handle, bf16 = cupy.cuda.device.get_cublas_handle(), cupy.cuda.runtime.CUDA_R_16BF
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def launch(i: int) -> None:
        weight = weights[i % len(weights)]
        cublas.gemmEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, m, k,
            one.ctypes.data, weight.data.ptr, bf16, k, x.data.ptr, bf16, k,
            zero.ctypes.data, out.data.ptr, bf16, n,
            cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    return launch


def as_torch(torch, array: Array):
    """The same memory as a torch tensor."""
    return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)


# -- attention -------------------------------------------------------------------------------------------------------


def compare_attention(
    backend: Backend, model: ModelConfig, timer, rivals: dict, num_seqs: int, length: int, query_len: int
) -> dict:
    """Everybody reads the same cache: one slab, block ids shuffled; its rows are made plain after our own turn."""
    num_heads, num_kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    num_tokens, q_size = num_seqs * query_len, num_heads * head_dim
    kv_bytes = 2 * 2 * num_kv_heads * head_dim * num_seqs * length
    num_layers = num_cold_sets(kv_bytes, timer.l2_bytes)
    blocks_of_each = ceil_div(length, BLOCK_SIZE)
    num_blocks = 1 << (num_seqs * blocks_of_each - 1).bit_length()
    layout = KVLayout(num_layers, num_kv_heads, BLOCK_SIZE, head_dim, BFLOAT16, num_blocks)
    arena = KVArena(layout, backend, num_blocks, allocate=lambda shape, dtype: random_array(backend, shape, dtype))
    arena.grow()
    block_ids = np.random.default_rng(0).permutation(num_blocks)[: num_seqs * blocks_of_each]
    block_tables = block_ids.reshape(num_seqs, -1).astype(np.int32)
    batch = backend.upload_batch(attention_batch(block_tables, length, query_len))
    qkv, out = (
        random_array(backend, (num_tokens, model.qkv_size), BFLOAT16),
        backend.empty((num_tokens, q_size), BFLOAT16),
    )

    def launch(i: int) -> None:
        backend.paged_attention(out, qkv, arena, i % num_layers, batch, num_heads, model.sm_scale)

    def others() -> Iterator[Rival]:
        flashinfer, interface = rivals["flashinfer"], rivals["flash_attn_interface"]
        if (torch := rivals["torch"]) is None or (flashinfer is None and interface is None):
            return
        q = as_torch(torch, qkv)[:, :q_size].reshape(num_tokens, num_heads, head_dim).contiguous()
        slab = as_torch(torch, arena.slabs[0])
        layers = [(slab[i, 0], slab[i, 1]) for i in range(num_layers)]  # K, V: [blocks, kv heads, block size, head_dim]
        places = torch.from_numpy(chunk_places(BLOCK_SIZE, head_dim)).to(slab.device)
        for stored in itertools.chain.from_iterable(layers):
            chunks = stored.reshape(*stored.shape[:2], -1, CHUNK_SIZE)
            stored.copy_(chunks[:, :, places].reshape(stored.shape))
        torch.cuda.current_stream().synchronize()
        sizes = (model, num_seqs, length, query_len)
        if flashinfer is not None:
            yield from flashinfer_rivals(torch, flashinfer, q, layers, block_tables, *sizes)
        if interface is not None:
            yield flash_attention_3(torch, interface, q, layers, block_tables, *sizes)

    num_keys = num_seqs * sum(range(length - query_len + 1, length + 1))
    return row(
        timer,
        "paged_decode" if query_len == 1 else "paged_prefill",
        f"{num_seqs} x {length}",
        kv_bytes + 2 * 2 * num_tokens * q_size,
        4 * num_keys * q_size,
        num_layers,
        ("ours", launch, lambda: backend.to_host(out)),
        others(),
    )


def flashinfer_rivals(
    torch,
    flashinfer,
    q,
    layers,
    block_tables: np.ndarray,
    model: ModelConfig,
    num_seqs: int,
    length: int,
    query_len: int,
) -> Iterator[Rival]:
    """Its wrapper for prompts, or its two for decoding: on tensor cores and without."""
    out, workspace = torch.empty_like(q), torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    blocks_of_each = block_tables.shape[1]

    def starts(step: int):
        return torch.arange(num_seqs + 1, dtype=torch.int32, device=q.device) * step

    pages = (
        starts(blocks_of_each),
        torch.from_numpy(block_tables.reshape(-1)).to(q.device),
        torch.full((num_seqs,), length - (blocks_of_each - 1) * BLOCK_SIZE, dtype=torch.int32, device=q.device),
    )
    heads = (model.num_heads, model.num_kv_heads, model.head_dim, BLOCK_SIZE)
    if query_len > 1:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(starts(query_len), *pages, *heads, causal=True, q_data_type=q.dtype)
        wrappers = {"FlashInfer": wrapper}
    else:
        wrappers = {}
        for name, tensor_cores in (("FlashInfer", True), ("FlashInfer CUDA cores", False)):
            wrappers[name] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace.clone(), "HND", use_tensor_cores=tensor_cores
            )
            wrappers[name].plan(*pages, *heads, q_data_type=q.dtype)
    for name, wrapper in wrappers.items():
        yield name, lambda i, run=wrapper.run: run(q, layers[i % len(layers)], out=out), lambda: on_host(out)


def flash_attention_3(
    torch,
    interface,
    q,
    layers,
    block_tables: np.ndarray,
    model: ModelConfig,
    num_seqs: int,
    length: int,
    query_len: int,
) -> Rival:
    """It takes [blocks, block size, kv heads, head_dim] with any strides."""
    queries = q.view(num_seqs, query_len, model.num_heads, model.head_dim)
    caches = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in layers]
    lengths = torch.full((num_seqs,), length, dtype=torch.int32, device=q.device)
    page_table = torch.from_numpy(block_tables).to(q.device)
    last = []

    def launch(i: int) -> None:
        last[:] = [
            interface.flash_attn_with_kvcache(
                queries, *caches[i % len(caches)], cache_seqlens=lengths, page_table=page_table, causal=True
            )
        ]

    return "FlashAttention 3", launch, lambda: on_host(last[0].reshape(q.shape))


def on_host(tensor) -> np.ndarray:
    """[tokens, heads, head_dim] as ours: [tokens, heads * head_dim] float32."""
    return tensor.flatten(1).float().cpu().numpy()


if __name__ == "__main__":
    try:
        main()
    except CupagedError as error:
        sys.exit(str(error))
