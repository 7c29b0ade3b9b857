# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Limits on a GPU: passes, segments and decode beside fine-tuning.

Models have random bfloat16 weights in the shapes of Llama 3.2 1B and Llama 3 8B, an adapter
attached, and 512 tokens of context. Decode is compared with the time that reading the
weights takes and with HF generate under PEFT. The shape "tiny" is for trying the bench
itself out, on any device. Results: bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

from bench.report import summary
from bench.results import Check, check, percentile, Recorder, Reported, Result, Table

# hidden size, intermediate size, layers, heads, KV heads, vocabulary
SHAPES = {
    'tiny': (64, 128, 2, 4, 2, 49152),
    '1b': (2048, 8192, 16, 32, 8, 128256),
    '8b': (4096, 14336, 32, 32, 8, 128256),
}
CONTEXT, STEP_TOKENS, RANK = 512, 128, 8
# By shape: decode / floor, HF / decode.
DECODE = {'1b': ('<= 3.0', '>= 10'), '8b': ('<= 1.75', '>= 8')}
LOAD = 0.5      # share of the device that answers take beside fine-tuning


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.gpu', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='few repeats: says that all runs, not how well')
    add('--device', default='cuda', help='(default: %(default)s)')
    add('--shapes', nargs='+', choices=list(SHAPES), default=['1b', '8b'], metavar='SHAPE',
        help=f'{", ".join(SHAPES)} (default: 1b 8b)')
    add('--repeats', type=int, help='of each measurement, interleaved (default: 30; quick: 3)')
    add('--requests', type=int, help='beside fine-tuning, of each side (default: 120; quick: 4)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.repeats = args.repeats or (3 if args.quick else 30)
    args.requests = args.requests or (4 if args.quick else 120)
    import torch

    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('bench.gpu: there is no CUDA device here (--device cpu --shapes tiny '
                         'tries out the bench itself)')
    recorder = Recorder(vars(args), quick=args.quick)
    samples: dict[str, Any] = {'passes': [], 'segments': [], 'floor': [], 'beside': []}
    notes: list[str] = []
    for shape in args.shapes:
        print(f'{shape}: passes and segments', flush=True)
        measure_passes(shape, args, samples, notes)
    first = args.shapes[0]
    print(f'{first}: decode beside fine-tuning', flush=True)
    samples['beside'] = measure_beside(first, args)
    result = Result('gpu', samples, checks(args.shapes, samples), reported(args.shapes, samples),
                    [table(samples)], notes)
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


# -- what is measured --------------------------------------------------------------------


def random_model(shape: str, device: str) -> Any:
    """Return a transformers model of that shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, between, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=between, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=2048, tie_word_embeddings=shape != '8b', eos_token_id=None,
        pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure_passes(shape: str, args: argparse.Namespace, samples: dict[str, Any],
                   notes: list[str]) -> None:
    """Time our passes and segments, HF generate and the reading of as many bytes, by turns."""
    import torch

    from mace_ros.finetune.sample import Sample
    from mace_ros.finetune.step import FinetuneStep
    from mace_ros.finetune.trainer import Trainer
    from mace_ros.memory.block_pool import BLOCK_TOKENS
    from mace_ros.model.graph_capture import capture
    from mace_ros.model.lora_manager import LoRAManager
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.packing import pack
    from mace_ros.model.spans import Span

    theirs = hf_generate(random_model(shape, args.device))
    base = random_model(shape, args.device)
    weights = sum(p.nbytes for p in base.parameters())
    if not base.config.tie_word_embeddings:    # of the embedding a token reads one row
        weights -= base.get_input_embeddings().weight.nbytes
    ours = pack(base, kv_tokens=4096)
    bank = LoRAManager(ours.linears, targets='all-linear', rank=RANK, alpha=16.0, slots=2)
    bank.write_slot(FIRST_SERVED_SLOT)
    if args.device == 'cuda':
        end = time.monotonic() + 120.0
        captured = capture(ours, max_rows=4, max_tokens=256, max_context=1024,
                           may_continue=lambda: time.monotonic() < end)
        notes.append(f'{shape}: {captured}')
        print(notes[-1], flush=True)
    trainer = Trainer(bank, 1e-9)
    sample = Sample((7,) * STEP_TOKENS, (0.0,) * 64 + (1.0,) * (STEP_TOKENS - 64))
    blocks = range(CONTEXT // BLOCK_TOKENS + 1)
    span = Span((7,), CONTEXT, blocks, FIRST_SERVED_SLOT, True)
    step = FinetuneStep(ours, trainer, [sample])
    step.hold_blocks([list(range(64, 64 + STEP_TOKENS // BLOCK_TOKENS))])
    rows = step.piggyback_spans(STEP_TOKENS)
    words = torch.zeros(weights // 4, dtype=torch.float32, device=args.device)
    seconds: dict[str, Callable[[], float]] = {
        'floor': timed(ours, lambda: words.sum()),
        'decode': timed(ours, lambda: int(ours.run([span]).argmax())),
        'finetune forward': timed(ours, lambda: ours.run((), rows)),
        'fused': timed(ours, lambda: int(ours.run([span], rows).argmax())),
        'hf_generate': theirs,
    }
    for repeat in range(-2, args.repeats):     # the first two only warm up
        for name, measure in seconds.items():
            spent = measure()
            if repeat >= 0:
                samples['passes'].append(
                    {'shape': shape, 'what': name, 'repeat': repeat, 'ms': spent * 1e3})
    for repeat in range(-1, max(3, args.repeats // 5)):
        step = FinetuneStep(ours, trainer, [sample])
        while not step.done:
            began = time.perf_counter()
            segment = step.run_segment()
            ours.synchronize()
            if repeat >= 0:
                samples['segments'].append({
                    'shape': shape, 'kind': segment.kind.name, 'tokens': segment.tokens,
                    'ms': (time.perf_counter() - began) * 1e3})


def timed(model: Any, run: Callable[[], object]) -> Callable[[], float]:
    """Return what runs it, waits for the device, and returns the seconds."""
    def measure() -> float:
        model.synchronize()
        began = time.perf_counter()
        run()
        model.synchronize()
        return time.perf_counter() - began
    return measure


def hf_generate(model: Any, tokens: int = 16) -> Callable[[], float]:
    """Return what measures the seconds for each token of ``generate``, with PEFT attached."""
    from peft import get_peft_model, LoraConfig
    import torch

    peft = get_peft_model(model, LoraConfig(
        r=RANK, lora_alpha=16.0, target_modules='all-linear', task_type='CAUSAL_LM')).eval()
    prompt = torch.full((1, CONTEXT), 7, device=model.device)

    def spent(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            peft.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                          do_sample=False, max_new_tokens=count, min_new_tokens=count).cpu()
        return time.perf_counter() - began

    return lambda: (spent(tokens + 1) - spent(1)) / tokens


def measure_beside(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer the same requests with and without fine-tuning beside them, by turns."""
    from bench.load import arrivals, prose, samples
    from bench.serving import Served
    from mace_ros.api.settings import Settings
    from mace_ros.model.loading import load_model

    with tempfile.TemporaryDirectory(prefix='mace-bench-') as name:
        folder = Path(name)
        packaged = load_model('', device='cpu')
        packaged.tokenizer.save_pretrained(folder / 'model')
        random_model(shape, 'cpu').save_pretrained(folder / 'model')
        settings = Settings().updated({
            'model.source': str(folder / 'model'), 'model.device': args.device})
        ids = samples(packaged.tokenizer.encode(prose()), STEP_TOKENS)
        served = Served(settings, folder / 'storage', ids, print)
        try:
            def load(seed: str, count: int, seconds: float) -> Any:
                return arrivals(lambda text: served.engine.chat.prompt(
                    [{'role': 'user', 'content': text}]), seed, count=count, seconds=seconds,
                    tokens=64)

            served.run_block('mace', -1, load('warm up', 2, 1.0), 1.0, 64)
            alone_s = served.request_seconds(load('alone', 3, 0.0), 64)
            blocks, each = 4, max(args.requests // 4, 1)
            rows = [{**served.run_block('inference_only', i, load(f'busy {i}', 3, 0.0), 0.0, 64)
                     .block, 'system': 'busy'} for i in range(3)]
            for block in range(blocks):
                whole = statistics.median(served.undivided_steps(3))
                due = load(f'{block}', each, each * alone_s / LOAD)
                for system in ('inference_only', 'mace')[::1 if block % 2 else -1]:
                    found = served.run_block(system, block, due, each * alone_s / LOAD, 64)
                    rows.append({
                        **found.block, 'undivided_s': whole,
                        'tpot_ms': [r['tpot_ms'] for r in found.requests]})
            return rows
        finally:
            served.close()


# -- what the samples say ----------------------------------------------------------------


def median_ms(samples: dict[str, Any], shape: str, what: str) -> float:
    """Return the median time of one measurement."""
    return percentile([p['ms'] for p in samples['passes']
                       if (p['shape'], p['what']) == (shape, what)], 50)


def longest_segment_ms(samples: dict[str, Any], shape: str) -> tuple[float, str]:
    """Return the longest of the median times of each kind of segment, and its kind."""
    kinds = {s['kind'] for s in samples['segments'] if s['shape'] == shape}
    return max((percentile([s['ms'] for s in samples['segments']
                            if (s['shape'], s['kind']) == (shape, kind)], 50), kind)
               for kind in kinds)


def checks(shapes: Sequence[str], samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    found = []
    for shape in shapes:
        decode = median_ms(samples, shape, 'decode')
        if shape in DECODE:
            near, faster = DECODE[shape]
            found += [
                check(f'{shape}: decode / reading the weights',
                      decode / median_ms(samples, shape, 'floor'), near),
                check(f'{shape}: HF generate with PEFT / decode, per token',
                      median_ms(samples, shape, 'hf_generate') / decode, faster)]
        if shape == '8b':
            apart = decode + median_ms(samples, shape, 'finetune forward')
            found.append(check(f'{shape}: fused pass with {STEP_TOKENS} fine-tune tokens / apart',
                               median_ms(samples, shape, 'fused') / apart, '<= 0.7'))
        if shape == '1b':
            longest, kind = longest_segment_ms(samples, shape)
            found.append(check(f'{shape}: longest segment, ms', longest, '<= 1', kind))
    tails = {s: percentile([t for b in samples['beside'] if b['system'] == s
                            for t in b.get('tpot_ms', ())], 99) for s in ('mace', 'inference_only')}
    found += [
        check('time that the device waits for the host, of three answers at once',
              statistics.median(1.0 - b['busy_s'] / b['wall_s'] for b in samples['beside']
                                if b['system'] == 'busy'), '<= 0.05'),
        check('TPOT p99 beside fine-tuning / alone', tails['mace'] / tails['inference_only'],
              '<= 1.15'),
        check('fine-tuning / what the remaining device time could yield', of_rest(samples),
              '>= 0.6')]
    return found


def of_rest(samples: dict[str, Any]) -> float:
    """Return fine-tune tokens against undivided steps in all the time that answers leave."""
    alone = [b for b in samples['beside'] if b['system'] == 'inference_only']
    free = 1.0 - sum(b['busy_s'] for b in alone) / sum(b['wall_s'] for b in alone)
    shares = [b['finetune_tokens'] / b['wall_s'] * b['undivided_s'] / STEP_TOKENS / free
              for b in samples['beside'] if b['system'] == 'mace']
    return statistics.median(shares)


def reported(shapes: Sequence[str], samples: dict[str, Any]) -> list[Reported]:
    """Return the aims."""
    return [Reported(f'{shape}: decode / reading the weights',
                     median_ms(samples, shape, 'decode') / median_ms(samples, shape, 'floor'),
                     {'1b': '<= 2.0', '8b': '<= 1.4'}.get(shape, '')) for shape in shapes]


def table(samples: dict[str, Any]) -> Table:
    """Return a row for each measurement."""
    names = dict.fromkeys((p['shape'], p['what']) for p in samples['passes'])
    rows: list[list[Any]] = [[*name, median_ms(samples, *name)] for name in names]
    for shape, kind in dict.fromkeys((s['shape'], s['kind']) for s in samples['segments']):
        rows.append([shape, f'segment {kind}', percentile(
            [s['ms'] for s in samples['segments'] if (s['shape'], s['kind']) == (shape, kind)],
            50)])
    return Table('On this device', ['shape', 'what', 'ms'], rows, 'Medians.')


if __name__ == '__main__':
    main()
