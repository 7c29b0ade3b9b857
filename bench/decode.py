# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
One request on an idle CPU: time per token of our engine and of what people use today.

An adapter is attached on both sides. Also the perplexity of each precision on a chat
text, since a faster precision must not be a worse model. Results: bench/results/decode.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
import math
import os
from pathlib import Path
import tempfile
from typing import Any

from bench.load import arrivals, conversations, request_row, Slo
from bench.report import summary
from bench.results import (
    Check,
    check,
    paired,
    percentile,
    Ratio,
    Recorder,
    Reported,
    Result,
    Table,
)

SLO = Slo(math.inf, math.inf)     # nothing here has to be in time


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.decode', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true',
        help='two short answers of each: says that all runs, not how well')
    add('--repeats', type=int, help='answers of each system, interleaved (default: 7; quick: 2)')
    add('--prompt-tokens', type=int, default=64, help='(default: %(default)s)')
    add('--output-tokens', type=int, help='(default: 96; quick: 16)')
    add('--threads', type=int, default=0, help='(default: one per core)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.repeats = args.repeats or (2 if args.quick else 7)
    args.output_tokens = args.output_tokens or (16 if args.quick else 96)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    recorder = Recorder(vars(args), quick=args.quick)
    notes: list[str] = [f'{args.threads} threads; one request at a time; rank 8 adapter on all '
                        'linear layers.']
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        samples = measure(args, Path(folder), notes)
    result = Result('decode', samples, checks(samples), reported(samples),
                    [table(samples)], notes)
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


def measure(args: argparse.Namespace, folder: Path, notes: list[str]) -> dict[str, Any]:
    """Load all systems, let them answer in turn, and return the samples."""
    # Only here, so that --help answers at once.
    from bench.adapter import publish
    from bench.peers.generate import HfGenerate
    from bench.peers.worker import PeerFailed, Worker
    from bench.serving import precision_of, Served
    from mace_ros.api.settings import PARAMETERS, Settings
    from mace_ros.model.chat import ChatTokenizer
    from mace_ros.model.loading import load_model, packaged_gguf

    plain = Settings().updated({'model.device': 'cpu', 'model.threads': args.threads})
    print('loading the model and learning a correction for the adapter', flush=True)
    loaded = load_model('', device='cpu')
    chat, model = ChatTokenizer(loaded.tokenizer), loaded.name
    del loaded
    published = publish(plain, folder / 'published', lambda text: None)
    ours: dict[str, Served] = {}
    peers: dict[tuple[str, str], Worker] = {}
    perplexities: list[dict[str, Any]] = []
    default = ''
    try:
        for dtype in PARAMETERS['model.weight_dtype'].choices:
            print(f'loading our engine, {dtype}', flush=True)
            served = Served(
                plain.updated({'model.weight_dtype': dtype}),
                published.copy(folder / f'served-{dtype}'), (), lambda text: None)
            name = precision_of(served.engine)
            if dtype == 'auto':
                default = name
            elif name == default:
                served.close()      # it is there already
                continue
            ours[name] = served
            perplexities.append({'precision': name, **perplexity(served.engine)})
        for dtype in ('float32', 'bfloat16'):
            print(f'loading HF generate, {dtype}', flush=True)
            peers['hf_generate', dtype] = worker = Worker(
                HfGenerate, model=model, adapter=str(published.path), dtype=dtype).ready()
            worker.call('threads', args.threads)
        if find_spec('llama_cpp') is None:
            notes.append('llama.cpp was not run: llama_cpp is not importable here.')
        else:
            peers |= llama_workers(packaged_gguf(), folder, [*ours], plain.adapter.rank,
                                   plain.adapter.alpha, args.threads)
        load = arrivals(lambda text: chat.prompt([{'role': 'user', 'content': text}]), 'decode',
                        count=args.repeats + 1, seconds=0.0, tokens=args.prompt_tokens)
        systems = [*(('mace_ros', name) for name in ours), *peers]
        rows: list[dict[str, Any]] = []
        for repeat, arrival in enumerate(load, start=-1):     # the first one only warms up
            turn = repeat % len(systems)
            for system, precision in systems[turn:] + systems[:turn]:
                if system == 'mace_ros':
                    row = ours[precision].run_block(
                        'inference_only', repeat, [arrival], 0.0, args.output_tokens).requests[0]
                else:
                    answers, _ = _of_peer(peers[system, precision], arrival, args.output_tokens)
                    row = request_row(system, repeat, answers.arrival, answers, SLO)
                if repeat >= 0:
                    rows.append({'system': system, 'precision': precision, 'repeat': repeat, **{
                        k: row[k] for k in ('ttft_ms', 'tpot_ms', 'output_tokens')}})
                    print(f'{repeat + 1} of {args.repeats}: {system} {precision} '
                          f'{row["tpot_ms"]:.1f} ms per token', flush=True)
    except PeerFailed as error:
        raise SystemExit(f'a peer failed: {error}') from error
    finally:
        for each in ours.values():
            each.close()
        for peer in peers.values():
            peer.close()
    return {'default_precision': default, 'answers': rows, 'perplexity': perplexities}


def llama_workers(source: Path, folder: Path, precisions: Sequence[str], rank: int, alpha: float,
                  threads: int) -> dict[tuple[str, str], Any]:
    """Return workers with llama.cpp in each precision, with an adapter and without one."""
    from bench.peers.gguf_files import adapter, convert, TYPES
    from bench.peers.llama import LlamaCpp
    from bench.peers.worker import Worker

    attached = str(adapter(source, folder / 'adapter.gguf', rank, alpha))
    workers = {}
    for precision in precisions:
        if precision not in TYPES:
            continue
        print(f'loading llama.cpp, {precision}', flush=True)
        model = str(convert(source, folder / f'{precision}.gguf', precision))
        for system, file in (('llama_cpp', attached), ('llama_cpp without adapter', '')):
            workers[system, precision] = Worker(
                LlamaCpp, model=model, adapter=file, threads=threads).ready()
    return workers


def _of_peer(worker: Any, arrival: Any, max_tokens: int) -> tuple[Any, float]:
    import time

    answers, busy = worker.call('run_block', time.monotonic(), [arrival], max_tokens)
    return answers[0], busy


def perplexity(engine: Any) -> dict[str, Any]:
    """Return the base model's perplexity on the conversations of the chat text."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.attention import whole_sequences
    from mace_ros.model.lora_mapping import BASE_SLOT

    model, total, count = engine.model, 0.0, 0
    for messages in conversations():
        ids = model.tensor(engine.chat.tokenizer.apply_chat_template(messages, return_dict=False))
        places = torch.arange(len(ids), device=ids.device)
        with torch.no_grad():
            logits = model.forward_packed(
                whole_sequences((len(ids),), ids.device), ids, places, BASE_SLOT, places, ())
        total += float(F.cross_entropy(logits[:-1], ids[1:], reduction='sum'))
        count += len(ids) - 1
    return {'perplexity': math.exp(total / count), 'tokens': count}


# -- what the samples say ----------------------------------------------------------------


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks."""
    default = samples['default_precision']
    fp32 = ratio(samples, ('mace_ros', 'float32'), ('hf_generate', 'float32'))
    shipped = ratio(samples, ('mace_ros', default), ('hf_generate', 'float32'))
    worse = of_perplexity(samples, default, 'float32')
    return [
        check('decode ms/token, ours float32 / HF generate with PEFT float32', fp32.median,
              '<= 0.85', fp32.spread),
        check(f'decode ms/token, ours {default} (the default) / HF generate with PEFT float32',
              shipped.median, '<= 0.5', shipped.spread),
        check(f'perplexity, {default} (the default) / float32', worse, '<= 1.02',
              f'{samples["perplexity"][0]["tokens"]} tokens of chat'),
    ]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the ratios that nothing hangs on."""
    rows = []
    precisions = [p['precision'] for p in samples['perplexity']]
    for precision in precisions:
        for peer, aim in (('hf_generate', ''), ('llama_cpp', '1.5'),
                          ('llama_cpp without adapter', '')):
            found = ratio(samples, ('mace_ros', precision), (peer, precision))
            if found.blocks:
                rows.append(Reported(f'decode ms/token, ours {precision} / {peer} {precision}',
                                     found.median, aim, found.spread))
    small = ratio(samples, ('mace_ros', 'int8'), ('hf_generate', 'bfloat16'))
    if small.blocks:
        rows.append(Reported('decode ms/token, ours int8 / hf_generate bfloat16', small.median, '',
                             small.spread))
    rows += [Reported(f'perplexity, {p} / float32', of_perplexity(samples, p, 'float32'))
             for p in precisions if p != 'float32']
    return rows


def table(samples: Mapping[str, Any]) -> Table:
    """Return a row for each system and precision."""
    perplexities = {p['precision']: p['perplexity'] for p in samples['perplexity']}
    names = dict.fromkeys((r['system'], r['precision']) for r in samples['answers'])
    rows = []
    for system, precision in sorted(names, key=lambda name: (name[1] != 'float32', name[1])):
        chosen = [r for r in samples['answers']
                  if (r['system'], r['precision']) == (system, precision)]
        rows.append([
            system, precision, *(percentile([r[c] for r in chosen], 50)
                                 for c in ('ttft_ms', 'tpot_ms')),
            perplexities.get(precision) if system == 'mace_ros' else None])
    return Table('One request', ['system', 'weights', 'TTFT ms', 'ms per token', 'perplexity'],
                 rows, 'Medians.')


def ratio(samples: Mapping[str, Any], above: tuple[str, str], below: tuple[str, str]) -> Ratio:
    """Return the ratio of two systems' times per token, per repeat."""
    def each(name: tuple[str, str]) -> dict[int, float]:
        return {r['repeat']: r['tpot_ms'] for r in samples['answers']
                if (r['system'], r['precision']) == name}
    return paired(each(above), each(below))


def of_perplexity(samples: Mapping[str, Any], above: str, below: str) -> float | None:
    """Return the ratio of two precisions' perplexities."""
    found = {p['precision']: p['perplexity'] for p in samples['perplexity']}
    return found[above] / found[below] if above in found and below in found else None


if __name__ == '__main__':
    main()
