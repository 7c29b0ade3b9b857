# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Forms of the same computation on a CPU: why each precision and kernel was chosen.

The products of a token count with all weights of SmolLM2-135M (layers and head), and the
attention of a training sequence, and of a batch of short ones, with its backward, each in
the forms that there are.
Results: bench/results/kernels.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import time
from typing import Any

from bench.report import summary
from bench.results import percentile, Recorder, Result, Table

# Merged qkv, o, merged gate and up, down; 30 layers of them, and the head.
WEIGHTS = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SEQUENCES = (32, 64, 128, 256, 384)
BATCHES = (128, 256, 384)
SHORT, BEGINNING = 25, 36      # tokens of each sequence of a batch, and of what all begin with


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.kernels', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='once each: says that all runs, not how well')
    add('--repeats', type=int, help='of each form, interleaved (default: 15; quick: 1)')
    add('--threads', type=int, default=0, help='(default: one per core)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.repeats = args.repeats or (1 if args.quick else 15)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    import torch

    torch.set_num_threads(args.threads)
    recorder = Recorder(vars(args), quick=args.quick)
    rows: list[dict[str, Any]] = []
    print('products of tokens with all weights', flush=True)
    with torch.inference_mode():
        forms = products()
        for tokens in TOKENS[:2 if args.quick else None]:
            measure('product', tokens, {n: f(tokens) for n, f in forms.items()}, args, rows)
        del forms
    print('attention of a training sequence, with its backward', flush=True)
    for tokens in SEQUENCES[:2 if args.quick else None]:
        measure('attention', tokens, attentions(tokens), args, rows)
    for tokens in BATCHES[:2 if args.quick else None]:
        measure('batch', tokens, batches(tokens), args, rows)
    result = Result('kernels', {'times': rows}, [], [], [
        table(rows, 'product', 'Products of so many tokens with all weights, ms'),
        table(rows, 'attention', 'Attention of one layer, forward and backward, ms'),
        table(rows, 'batch', f'The same of a batch: sequences of {SHORT} tokens after {BEGINNING} '
              'that all begin with, ms')],
        [f'{args.threads} threads.'])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


def measure(what: str, tokens: int, forms: dict[str, Callable[[], object]],
            args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Time all forms by turns."""
    for repeat in range(-1, args.repeats):      # the first one only warms up
        for name, run in forms.items():
            began = time.perf_counter()
            run()
            if repeat >= 0:
                rows.append({'what': what, 'tokens': tokens, 'form': name, 'repeat': repeat,
                             'ms': (time.perf_counter() - began) * 1e3})


def products() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Return, by name, what takes a number of tokens and returns the products to time."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.cpu_matmul import Int8Weight, linear

    fp32 = [torch.randn(shape) * 0.02 for shape in WEIGHTS]
    bf16 = [w.bfloat16() for w in fp32]
    int8 = [Int8Weight(w.clone()) for w in bf16]

    def inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        kept = {k: torch.randn(tokens, k).to(dtype) for _, k in WEIGHTS}
        return [kept[k] for _, k in WEIGHTS]

    def over(weights: list[Any], dtype: torch.dtype,
             one: Callable[[Any, Any], object]) -> Callable[[int], Callable[[], object]]:
        def of(tokens: int) -> Callable[[], object]:
            xs = inputs(tokens, dtype)
            return lambda: [one(x, w) for x, w in zip(xs, weights, strict=True)]
        return of

    return {
        'float32 F.linear': over(fp32, torch.float32, F.linear),
        'float32 W @ x.T': over(fp32, torch.float32, lambda x, w: torch.mm(w, x.t())),
        'float32 ours': over(fp32, torch.float32, linear),
        'bfloat16 F.linear': over(bf16, torch.bfloat16, F.linear),
        'int8 weights': over(int8, torch.bfloat16, lambda x, w: w.linear(x)),
    }


def attentions(tokens: int) -> dict[str, Callable[[], object]]:
    """Return the ways to attend over a sequence with the heads of SmolLM2, and back."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.cpu_attention import attend_causally

    forms: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        given = [torch.randn(1, tokens, heads, 64).to(dtype).transpose(1, 2)
                 for heads in (9, 3, 3)]
        gradient = torch.randn(1, 9, tokens, 64).to(dtype)

        def run(attend: Callable[..., Any], given: list[Any] = given,
                gradient: Any = gradient) -> None:
            attend(*[x.detach().requires_grad_() for x in given]).backward(gradient)

        name = str(dtype).removeprefix('torch.')
        forms[f'{name} SDPA'] = lambda run=run: run(lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True))
        forms[f'{name} ours'] = lambda run=run: run(
            lambda q, k, v: attend_causally(q, k, v, None))
    return forms


def batches(tokens: int) -> dict[str, Callable[[], object]]:
    """Return the ways to attend within short sequences, so many tokens in all, and back."""
    import torch

    from mace_ros.model.cpu_attention import attend_causally

    lengths = [SHORT] * ((tokens - BEGINNING) // SHORT)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (owner[:, None] == owner).tril()
    count = BEGINNING + len(owner)
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    mask[BEGINNING:, BEGINNING:] = own
    given = [torch.randn(1, count, heads, 64).bfloat16().transpose(1, 2) for heads in (9, 3, 3)]
    gradient = torch.randn(1, 9, count, 64).bfloat16()

    def one_by_one(*qkv: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (x.split([BEGINNING, *lengths], 2) for x in qkv)
        return torch.cat([attend_causally(queries[0], keys[0], values[0], None)] + [
            attend_causally(q, *(torch.cat([first, x], 2) for first, x in
                                 ((keys[0], k), (values[0], v))), None)
            for q, k, v in zip(queries[1:], keys[1:], values[1:], strict=True)], 2)

    def one_mask(*qkv: torch.Tensor) -> torch.Tensor:
        return attend_causally(*qkv, None, mask)

    def run(attend: Callable[..., torch.Tensor]) -> None:
        attend(*[x.detach().requires_grad_() for x in given]).backward(gradient)

    return {'bfloat16 one by one': lambda: run(one_by_one),
            'bfloat16 one mask': lambda: run(one_mask)}


def table(rows: Sequence[dict[str, Any]], what: str, title: str) -> Table:
    """Return a row for each form and a column for each number of tokens."""
    chosen = [r for r in rows if r['what'] == what]
    counts = sorted({r['tokens'] for r in chosen})
    return Table(title, ['form', *map(str, counts)], [
        [form, *(percentile([r['ms'] for r in chosen if (r['form'], r['tokens']) == (form, n)], 50)
                 for n in counts)]
        for form in dict.fromkeys(r['form'] for r in chosen)], 'Medians.')


if __name__ == '__main__':
    main()
