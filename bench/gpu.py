# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Limits on a GPU: passes, segments, contexts, and decoding beside fine-tuning.

The models have random weights in the shapes of Qwen2.5 0.5B, Llama 3.2 1B and 3B and Llama 3 8B,
in bfloat16 and in 4 bits, and an adapter attached. First, each fast path must compute what the
plain one computes. Decoding is compared with the time to read the weights and with HF generate
with PEFT, and paged attention with gathered keys. The shape "tiny" tests the benchmark itself on
any device. Each part is recorded as it ends. Results: bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import statistics
import time
from typing import Any

from bench.common.options import Options
from bench.common.results import Check, check, percentile, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples
from bench.systems.decode_contexts import ATTENTION, measure_contexts
from bench.systems.device_timing import repeated, timed, weight_bytes

# hidden size, intermediate size, layers, heads, KV heads, vocabulary
SHAPES = {
    'tiny': (64, 128, 2, 4, 2, 49152),
    '0.5b': (896, 4864, 24, 14, 2, 151936),
    '1b': (2048, 8192, 16, 32, 8, 128256),
    '3b': (3072, 8192, 28, 24, 8, 128256),
    '8b': (4096, 14336, 32, 32, 8, 128256),
}
PARTS = ('correctness', 'passes', 'contexts', 'beside')
WEIGHTS = ('bfloat16', 'int4')
CONTEXT, STEP_TOKENS, RANK = 512, 128, 8
MAX_ERROR = 0.03    # relative, of values in bfloat16 that were summed up in another order
UNLEARNED = 64      # tokens at the start of a sample that have no loss
STEP_BLOCK = 64     # the first KV block of the step's forward
# By shape: targets of decode / floor and of HF generate / decode.
DECODE = {'1b': ('<= 2.0', '>= 10'), '8b': ('<= 1.5', '>= 8')}
LOAD = 0.5          # share of the device time that serving takes beside fine-tuning
PROMPT_TOKENS = OUTPUT_TOKENS = 64      # of requests beside fine-tuning
CAPTURE_S = 120.0   # at most, for capturing CUDA graphs


def options() -> Options:
    """Return the options."""
    result = Options('gpu', __doc__, quick='few repeats')
    result.add('--device', default='cuda', help='(default: %(default)s)')
    result.add('--shapes', nargs='+', choices=list(SHAPES), default=['1b', '8b'], metavar='SHAPE',
               help=f'shapes to measure, of {", ".join(SHAPES)} (default: 1b 8b)')
    result.parts(PARTS, '--only')
    result.size('--repeats', 30, 3, 'repeats of each measurement, interleaved')
    result.size('--requests', 120, 4, 'requests with and without fine-tuning, each')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate, prepare=prepare)


def prepare(args: argparse.Namespace) -> None:
    """End the program if there is no CUDA device and none was named."""
    import torch  # imported before the machine is recorded, so that its GPU is named

    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('bench.gpu: there is no CUDA device (--device cpu --shapes tiny tests '
                         'the benchmark itself)')


def measure(run: Run) -> Samples:
    """Measure all shapes, and serving beside fine-tuning with the first one."""
    kinds = {'correctness': ('errors',), 'passes': ('passes', 'segments', 'floor'),
             'contexts': ('contexts',), 'beside': ('beside',)}
    earlier = run.earlier('gpu') if len(run.args.only) < len(PARTS) else {}
    samples: Samples = {kind: [] if part in run.args.only else earlier.get(kind, [])
                        for part, found in kinds.items() for kind in found}
    for shape in run.args.shapes:
        for weights in WEIGHTS:
            if run.args.only != ['beside']:
                run.say(f'{shape} {weights}')
                measure_shape(shape, weights, run, samples)
                run.record(evaluate(samples, run))
    if 'beside' in run.args.only:
        run.say(f'{run.args.shapes[0]}: decoding beside fine-tuning')
        samples['beside'] = measure_beside(run.args.shapes[0], run)
    return samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    shapes = run.args.shapes
    return Result('gpu', samples, checks(shapes, samples), reported(shapes, samples),
                  [table(samples), contexts_table(samples)])


# -- measurements ------------------------------------------------------------------------


def random_model(shape: str, device: str) -> Any:
    """Return a transformers model of the shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=shape != '8b', eos_token_id=None,
        pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure_shape(shape: str, weights: str, run: Run, samples: Samples) -> None:
    """Run the parts of one shape and precision."""
    import torch

    args, parts = run.args, run.args.only
    name = f'{shape} {weights}'
    base = random_model(shape, args.device)
    if 'passes' in parts and weights == 'bfloat16':
        # Before the model is packed, so that a card need not hold it twice.
        generate = hf_generate(base)
        samples['passes'] += [{'shape': name, 'what': 'hf_generate', 'repeat': i, 'ms': ms}
                              for i, ms in enumerate(repeated(generate, args.repeats))]
        del generate, base
        base = random_model(shape, args.device)
    model, lora, unused = packed(shape, base, weights)
    for reason in unused:
        run.notes.append(f'{name}: not used: {reason}')
        run.say(run.notes[-1])
    if args.device == 'cuda':
        from mace_ros.model.graph_capture import capture

        end = time.monotonic() + CAPTURE_S
        captured = capture(model, max_rows=4, max_tokens=256, max_context=1024,
                           may_continue=lambda: time.monotonic() < end,
                           free_bytes=lambda: torch.cuda.mem_get_info()[0])
        run.notes.append(f'{name}: {captured}; {captured.nbytes / 1e6:.0f} MB, '
                         f'{time.monotonic() - end + CAPTURE_S:.1f} s')
        run.say(run.notes[-1])
    if 'correctness' in parts:
        from bench.systems.fast_paths import errors

        samples['errors'] += [{'shape': name, 'path': path, 'error': error}
                              for path, error in errors(model)]
    if 'passes' in parts:
        measure_passes(name, model, lora, run, samples)
    if 'contexts' in parts:
        samples['contexts'] += measure_contexts(name, model, run)
    if args.device == 'cuda':
        run.notes.append(f'{name}: at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')
        torch.cuda.reset_peak_memory_stats()


def packed(shape: str, base: Any, weights: str) -> tuple[Any, Any, list[str]]:
    """
    Return a packed model, its linear layers in ``weights``, and its adapters.

    Also returns which kernels of the package it can't use, and why.
    """
    import torch

    from mace_ros.model.fused_check import use_fused_layers
    from mace_ros.model.int4 import Int4Weight, quantizable, quantize
    from mace_ros.model.int4_kernels import find_kernel
    from mace_ros.model.lora_manager import LoRAManager
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.packing import pack
    from mace_ros.model.paged_check import use_paged_attention

    model = pack(base, kv_tokens=4096)
    if weights == 'int4':
        kernel = find_kernel(model.device, torch.bfloat16)
        for layer in model.linears:
            if quantizable(layer.weight):
                layer.store(Int4Weight.of(quantize(layer.weight, dtype=kernel.dtype), kernel))
    lora = LoRAManager(model.linears, targets='all-linear', rank=RANK, alpha=16.0, slots=2)
    lora.write_slot(FIRST_SERVED_SLOT)
    reason = use_paged_attention(model)
    return model, lora, [f'paged attention: {reason}'] * bool(reason) + use_fused_layers(model)


def measure_passes(name: str, model: Any, lora: Any, run: Run, samples: Samples) -> None:
    """Time passes and reading the weights, interleaved; then segments."""
    import torch

    from mace_ros.finetune.sample import Sample
    from mace_ros.finetune.step import FinetuneStep
    from mace_ros.finetune.trainer import Trainer
    from mace_ros.memory.block_pool import BLOCK_TOKENS
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.spans import Span

    args = run.args
    trainer = Trainer(lora, 1e-9)
    sample = Sample((7,) * STEP_TOKENS,
                    (0.0,) * UNLEARNED + (1.0,) * (STEP_TOKENS - UNLEARNED))
    blocks = range(CONTEXT // BLOCK_TOKENS + 1)
    span = Span((7,), CONTEXT, blocks, FIRST_SERVED_SLOT, True)
    step = FinetuneStep(model, trainer, [sample])
    step.hold_blocks([list(range(STEP_BLOCK, STEP_BLOCK + STEP_TOKENS // BLOCK_TOKENS))])
    rows = step.piggyback_spans(STEP_TOKENS)
    words = torch.zeros(weight_bytes(model) // 4, dtype=torch.float32, device=args.device)
    timers: dict[str, Callable[[], float]] = {
        'floor': timed(model, lambda: words.sum()),
        'decode': timed(model, lambda: int(model.run([span]).argmax())),
        'finetune forward': timed(model, lambda: model.run((), rows)),
        'fused': timed(model, lambda: int(model.run([span], rows).argmax())),
    }
    for repeat in range(-2, args.repeats):     # the first two are warm-ups
        for what, timer in timers.items():
            seconds = timer()
            if repeat >= 0:
                samples['passes'].append(
                    {'shape': name, 'what': what, 'repeat': repeat, 'ms': seconds * 1e3})
    for repeat in range(-1, max(3, args.repeats // 5)):
        step = FinetuneStep(model, trainer, [sample])
        while not step.done:
            began = time.perf_counter()
            segment = step.run_segment()
            model.synchronize()
            if repeat >= 0:
                samples['segments'].append({
                    'shape': name, 'kind': segment.kind.name, 'tokens': segment.tokens,
                    'ms': (time.perf_counter() - began) * 1e3})


def hf_generate(model: Any, tokens: int = 16) -> Callable[[], float]:
    """Return a function that measures seconds per token of ``generate`` with PEFT attached."""
    from peft import get_peft_model, LoraConfig
    import torch

    peft = get_peft_model(model, LoraConfig(
        r=RANK, lora_alpha=16.0, target_modules='all-linear', task_type='CAUSAL_LM')).eval()
    prompt = torch.full((1, CONTEXT), 7, device=model.device)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            peft.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                          do_sample=False, max_new_tokens=count, min_new_tokens=count).cpu()
        return time.perf_counter() - began

    return lambda: (seconds(tokens + 1) - seconds(1)) / tokens


def measure_beside(shape: str, run: Run) -> list[dict[str, Any]]:
    """Serve the same requests with and without fine-tuning, interleaved."""
    from bench.common.load import arrivals, prose, training_sequences
    from bench.systems.engine_under_load import EngineUnderLoad
    from mace_ros.api.settings import Settings
    from mace_ros.model.loading import load_model

    packaged = load_model('', device='cpu')
    folder = run.folder / 'model'
    packaged.tokenizer.save_pretrained(folder)
    random_model(shape, 'cpu').save_pretrained(folder)
    settings = Settings().updated({
        'model.source': str(folder), 'model.device': run.args.device})
    ids = training_sequences(packaged.tokenizer.encode(prose()), STEP_TOKENS)
    served = EngineUnderLoad(settings, run.folder / 'storage', ids, print)

    def load(seed: str, count: int, seconds: float) -> Any:
        return arrivals(lambda text: served.engine.chat.prompt(
            [{'role': 'user', 'content': text}]), seed, count=count, seconds=seconds,
            tokens=PROMPT_TOKENS)

    try:
        served.run_block('mace', -1, load('warm up', 2, 1.0), 1.0, OUTPUT_TOKENS)
        alone_s = served.request_seconds(load('alone', 3, 0.0), OUTPUT_TOKENS)
        blocks, each = 4, max(run.args.requests // 4, 1)
        seconds = each * alone_s / LOAD
        rows = [{**served.run_block('inference_only', i, load(f'busy {i}', 3, 0.0), 0.0,
                                    OUTPUT_TOKENS).block, 'system': 'busy'} for i in range(3)]
        for block in range(blocks):
            undivided = statistics.median(served.undivided_steps(3))
            requests = load(f'{block}', each, seconds)
            for system in ('inference_only', 'mace')[::1 if block % 2 else -1]:
                found = served.run_block(system, block, requests, seconds, OUTPUT_TOKENS)
                rows.append({
                    **found.block, 'undivided_s': undivided,
                    'tpot_ms': [r['tpot_ms'] for r in found.requests]})
        return rows
    finally:
        served.close()


# -- checks ------------------------------------------------------------------------------


def median_ms(samples: Samples, shape: str, what: str) -> float:
    """Return the median milliseconds of a measurement."""
    return percentile([p['ms'] for p in samples['passes']
                       if (p['shape'], p['what']) == (shape, what)], 50)


def median_segment_ms(samples: Samples, shape: str, kind: str) -> float:
    """Return the median milliseconds of a kind of segment."""
    return percentile([s['ms'] for s in samples['segments']
                       if (s['shape'], s['kind']) == (shape, kind)], 50)


def checks(shapes: Sequence[str], samples: Samples) -> list[Check]:
    """Return the checks of the parts that were run."""
    found = []
    if samples['errors']:
        worst = max(samples['errors'], key=lambda e: e['error'])
        found.append(check('largest relative error of a fast path', worst['error'],
                           f'<= {MAX_ERROR}', f'{worst["shape"]}, {worst["path"]}'))
    if samples['passes']:
        for shape in shapes:
            found += pass_checks(shape, samples)
    found += context_checks(samples)
    if samples['beside']:
        found += beside_checks(samples)
    return found


def context_checks(samples: Samples) -> list[Check]:
    """Return the checks of decode passes over long contexts."""
    ratios, times = {}, {}
    for attention in ATTENTION:
        chosen = [c for c in samples['contexts'] if (
            c['shape'], c['rows'], c['context'], c['attention'])
            == ('1b bfloat16', 16, 4096, attention)]
        if chosen:
            ratios[attention] = statistics.median(c['ms'] / c['floor_ms'] for c in chosen)
            times[attention] = statistics.median(c['ms'] for c in chosen)
    if not times:
        return []
    used = next(iter(times))
    found = [check('1b: 16 rows of 4096 tokens / reading weights and KV', ratios[used], '<= 1.3',
                   used)]
    if used == 'paged':
        found.append(check('1b: 16 rows of 4096 tokens, paged attention / gathered keys',
                           times['paged'] / times['gathered'], '<= 0.8'))
    return found


def pass_checks(shape: str, samples: Samples) -> list[Check]:
    """Return the checks of one shape."""
    name, found = f'{shape} bfloat16', []
    decode = median_ms(samples, name, 'decode')
    if shape in DECODE:
        floor_target, generate_target = DECODE[shape]
        found += [
            check(f'{shape}: decode / reading the weights',
                  decode / median_ms(samples, name, 'floor'), floor_target),
            check(f'{shape}: HF generate with PEFT / decode, per token',
                  median_ms(samples, name, 'hf_generate') / decode, generate_target)]
    if shape == '8b':
        apart = decode + median_ms(samples, name, 'finetune forward')
        found += [
            check(f'{shape}: fused pass with {STEP_TOKENS} fine-tune tokens / apart',
                  median_ms(samples, name, 'fused') / apart, '<= 0.7'),
            check(f'{shape}: decode with bfloat16 / with int4',
                  decode / median_ms(samples, f'{shape} int4', 'decode'), '>= 2.0')]
    if shape == '1b':
        kinds = {s['kind'] for s in samples['segments'] if s['shape'] == name}
        longest, kind = max((median_segment_ms(samples, name, k), k) for k in kinds)
        found.append(check(f'{shape}: longest segment, ms', longest, '<= 1', kind))
    return found


def beside_checks(samples: Samples) -> list[Check]:
    """Return the checks of serving beside fine-tuning."""
    tails = {s: percentile([t for b in samples['beside'] if b['system'] == s
                            for t in b.get('tpot_ms', ())], 95) for s in ('mace', 'inference_only')}
    return [
        check('time that the device waits for the host, of three answers at once',
              statistics.median(1.0 - b['busy_s'] / b['wall_s'] for b in samples['beside']
                                if b['system'] == 'busy'), '<= 0.05'),
        check('TPOT p95 beside fine-tuning / alone', tails['mace'] / tails['inference_only'],
              '<= 1.05'),
        check('fine-tuning / what the remaining device time could yield', share_of_rest(samples),
              '>= 0.76')]


def share_of_rest(samples: Samples) -> float:
    """Return the fine-tune rate over the rate of undivided steps in all remaining time."""
    alone = [b for b in samples['beside'] if b['system'] == 'inference_only']
    free = 1.0 - sum(b['busy_s'] for b in alone) / sum(b['wall_s'] for b in alone)
    shares = [b['finetune_tokens'] / b['wall_s'] * b['undivided_s'] / STEP_TOKENS / free
              for b in samples['beside'] if b['system'] == 'mace']
    return statistics.median(shares)


def reported(shapes: Sequence[str], samples: Samples) -> list[Reported]:
    """Return decoding in comparison with reading the weights."""
    names = [f'{shape} {weights}' for shape in shapes for weights in WEIGHTS]
    return [Reported(f'{name}: decode / reading the weights',
                     median_ms(samples, name, 'decode') / median_ms(samples, name, 'floor'))
            for name in names if any(p['shape'] == name for p in samples['passes'])]


def contexts_table(samples: Samples) -> Table:
    """Return the table of decode passes over long contexts."""
    found: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for c in samples['contexts']:
        found.setdefault((c['shape'], c['rows'], c['context'], c['attention']), []).append(c)
    return Table(
        'Decode passes',
        ['shape', 'rows', 'context', 'attention', 'ms', 'reading weights and KV, ms'],
        [[*name, *(statistics.median(c[key] for c in rows) for key in ('ms', 'floor_ms'))]
         for name, rows in found.items()], 'Medians.')


def table(samples: Samples) -> Table:
    """Return the table with a row for each measurement."""
    names = dict.fromkeys((p['shape'], p['what']) for p in samples['passes'])
    kinds = dict.fromkeys((s['shape'], s['kind']) for s in samples['segments'])
    rows: list[list[Any]] = [[*name, median_ms(samples, *name)] for name in names]
    rows += [[shape, f'segment {kind}', median_segment_ms(samples, shape, kind)]
             for shape, kind in kinds]
    return Table('On this device', ['shape', 'what', 'ms'], rows, 'Medians.')


if __name__ == '__main__':
    main()
