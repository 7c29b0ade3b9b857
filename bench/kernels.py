# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Alternative kernels on a CPU: why each precision and kernel was chosen.

Measured are the products of all weights of SmolLM2-135M (layers and head) with several
numbers of tokens, and the attention, forward and backward, of one training sequence and of a
batch of short ones. Results: bench/results/kernels.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
import time
from typing import Any

from bench.common.options import Options
from bench.common.results import percentile, Result, Table
from bench.common.running import Run, run_benchmark, Samples

# Merged qkv, o, merged gate and up, and down of 30 layers, then the head.
WEIGHTS = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SEQUENCES = (32, 64, 128, 256, 384)
BATCHES = (128, 256, 384)
SHORT, SHARED = 25, 36      # tokens of each sequence in a batch, and of the shared prefix


def options() -> Options:
    """Return the options."""
    result = Options('kernels', __doc__, quick='once each')
    result.size('--repeats', 15, 1, 'repeats of each kernel, interleaved')
    result.threads()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def measure(run: Run) -> Samples:
    """Time all kernels; return the samples."""
    import torch

    torch.set_num_threads(run.args.threads)
    repeats, few = run.args.repeats, 2 if run.args.quick else None
    rows: list[dict[str, Any]] = []
    run.say('products of tokens with all weights')
    with torch.inference_mode():
        kernels = products()
        for tokens in TOKENS[:few]:
            rows += time_kernels('product', tokens, {
                name: make(tokens) for name, make in kernels.items()}, repeats)
        del kernels
    run.say('attention, forward and backward')
    for tokens in SEQUENCES[:few]:
        rows += time_kernels('attention', tokens, attentions(tokens), repeats)
    for tokens in BATCHES[:few]:
        rows += time_kernels('batch', tokens, batches(tokens), repeats)
    return {'times': rows}


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    rows = samples['times']
    return Result('kernels', samples, [], [], [
        table(rows, 'product', 'Products of so many tokens with all weights, ms'),
        table(rows, 'attention', 'Attention of one layer, forward and backward, ms'),
        table(rows, 'batch', f'The same of a batch: sequences of {SHORT} tokens after {SHARED} '
              'that all begin with, ms')],
        [f'{run.args.threads} threads.'])


def time_kernels(what: str, tokens: int, kernels: dict[str, Callable[[], object]],
                 repeats: int) -> list[dict[str, Any]]:
    """Time all kernels, interleaved; return a row for each call."""
    rows: list[dict[str, Any]] = []
    for repeat in range(-1, repeats):      # the first round is a warm-up
        for name, call in kernels.items():
            began = time.perf_counter()
            call()
            if repeat >= 0:
                rows.append({'what': what, 'tokens': tokens, 'form': name, 'repeat': repeat,
                             'ms': (time.perf_counter() - began) * 1e3})
    return rows


def products() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Return kernels by name; each maps a number of tokens to the function to time."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.cpu_matmul import Int8Weight, PrepackedWeight
    from mace_ros.model.int4 import Int4Weight, quantize
    from mace_ros.model.int4_kernels import find_kernel

    fp32 = [torch.randn(shape) * 0.02 for shape in WEIGHTS]
    bf16 = [w.bfloat16() for w in fp32]
    fp32_ours, bf16_ours = ([PrepackedWeight(w) for w in plain] for plain in (fp32, bf16))
    int8 = [Int8Weight(w.clone()) for w in bf16]
    int4_kernel = find_kernel(torch.device('cpu'), torch.bfloat16)
    int4 = [Int4Weight.of(quantize(w), int4_kernel) for w in fp32]

    def make_inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        by_width = {k: torch.randn(tokens, k).to(dtype) for _, k in WEIGHTS}
        return [by_width[k] for _, k in WEIGHTS]

    def kernel(weights: list[Any], dtype: torch.dtype,
               multiply: Callable[[Any, Any], object]) -> Callable[[int], Callable[[], object]]:
        def make(tokens: int) -> Callable[[], object]:
            inputs = make_inputs(tokens, dtype)
            return lambda: [multiply(x, w) for x, w in zip(inputs, weights, strict=True)]
        return make

    return {
        'float32 F.linear': kernel(fp32, torch.float32, F.linear),
        'float32 W @ x.T': kernel(fp32, torch.float32, lambda x, w: torch.mm(w, x.t())),
        'float32 ours': kernel(fp32_ours, torch.float32, lambda x, w: w.linear(x)),
        'bfloat16 F.linear': kernel(bf16, torch.bfloat16, F.linear),
        'bfloat16 ours': kernel(bf16_ours, torch.bfloat16, lambda x, w: w.linear(x)),
        'int8 weights': kernel(int8, torch.bfloat16, lambda x, w: w.linear(x)),
        'int4 weights': kernel(int4, torch.bfloat16, lambda x, w: w.linear(x)),
    }


def attentions(tokens: int) -> dict[str, Callable[[], object]]:
    """Return kernels for the attention of one sequence with the heads of SmolLM2."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.cpu_attention import attend_causally

    kernels: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        qkv = [torch.randn(1, tokens, heads, 64).to(dtype).transpose(1, 2)
                 for heads in (9, 3, 3)]
        gradient = torch.randn(1, 9, tokens, 64).to(dtype)

        def run(attend: Callable[..., Any], qkv: list[Any] = qkv,
                gradient: Any = gradient) -> None:
            attend(*[x.detach().requires_grad_() for x in qkv]).backward(gradient)

        name = str(dtype).removeprefix('torch.')
        kernels[f'{name} SDPA'] = partial(run, partial(
            F.scaled_dot_product_attention, is_causal=True, enable_gqa=True))
        kernels[f'{name} ours'] = partial(run, partial(attend_causally, scaling=None))
    return kernels


def batches(tokens: int) -> dict[str, Callable[[], object]]:
    """Return kernels for the attention of short sequences with ``tokens`` in all."""
    import torch

    from mace_ros.model.cpu_attention import attend_causally

    lengths = [SHORT] * ((tokens - SHARED) // SHORT)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (sequence[:, None] == sequence).tril()
    count = SHARED + len(sequence)
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    mask[SHARED:, SHARED:] = own
    inputs = [torch.randn(1, count, heads, 64).bfloat16().transpose(1, 2) for heads in (9, 3, 3)]
    gradient = torch.randn(1, 9, count, 64).bfloat16()

    def one_by_one(*qkv: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (x.split([SHARED, *lengths], 2) for x in qkv)
        return torch.cat([attend_causally(queries[0], keys[0], values[0], None)] + [
            attend_causally(
                q, torch.cat([keys[0], k], 2), torch.cat([values[0], v], 2), None)
            for q, k, v in zip(queries[1:], keys[1:], values[1:], strict=True)], 2)

    one_mask = partial(attend_causally, scaling=None, mask=mask)

    def run(attend: Callable[..., torch.Tensor]) -> None:
        attend(*[x.detach().requires_grad_() for x in inputs]).backward(gradient)

    return {'bfloat16 one by one': lambda: run(one_by_one),
            'bfloat16 one mask': lambda: run(one_mask)}


def table(rows: Sequence[dict[str, Any]], what: str, title: str) -> Table:
    """Return the table with a row for each kernel and a column for each token count."""
    chosen = [r for r in rows if r['what'] == what]
    counts = sorted({r['tokens'] for r in chosen})
    return Table(title, ['form', *map(str, counts)], [
        [form, *(percentile([r['ms'] for r in chosen if (r['form'], r['tokens']) == (form, n)], 50)
                 for n in counts)]
        for form in dict.fromkeys(r['form'] for r in chosen)], 'Medians.')


if __name__ == '__main__':
    main()
