# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
One request at a time on an idle CPU: time per token of mace_ros and of widely used systems.

All systems have an adapter attached. The perplexity of each precision on a chat text shows
whether a faster precision is a worse model, and the memory of its weights what it saves.
Results: bench/results/decode.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
import math
from pathlib import Path
import time
from typing import Any

from bench.common.load import Arrival, arrivals, conversations, request_row, Slo
from bench.common.options import Options
from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples

SLO = Slo(math.inf, math.inf)     # requests have no objectives
PEER_PRECISIONS = ('float32', 'bfloat16')

Name = tuple[str, str]      # system and precision


def options() -> Options:
    """Return the options."""
    result = Options('decode', __doc__, quick='two short responses of each system')
    result.size('--repeats', 7, 2, 'responses of each system, interleaved')
    result.add('--prompt-tokens', type=int, default=64, help='(default: %(default)s)')
    result.size('--output-tokens', 96, 16, 'tokens of a response')
    result.threads()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('decode', samples, checks(samples), reported(samples), [table(samples)])


def measure(run: Run) -> Samples:
    """Load all systems, run them in turn, and return the samples."""
    from bench.systems.peers.worker import PeerFailed

    run.notes.append(f'{run.args.threads} threads; one request at a time; all systems serve an '
                     'adapter of the same rank for the same layers.')
    systems = LoadedSystems(run)
    try:
        systems.load()
        return {'default_precision': systems.default, 'answers': systems.run(),
                'perplexity': systems.perplexities}
    except PeerFailed as error:
        raise SystemExit(f'a peer failed: {error}') from error
    finally:
        systems.close()


class LoadedSystems:
    """All systems in all precisions, with the adapter of one learned correction."""

    def __init__(self, run: Run) -> None:
        """Take options and temporary folder from ``run``."""
        self._run, self._args = run, run.args
        self.default = ''       # the precision that model.weight_dtype auto chooses
        self.perplexities: list[dict[str, Any]] = []
        self._engines: dict[str, Any] = {}
        self._peers: dict[Name, Any] = {}

    def load(self) -> None:
        """Learn the correction and load all systems."""
        # Imported here, so that --help does not load torch.
        from bench.systems.adapter import publish
        from mace_ros.api.settings import Settings
        from mace_ros.model.chat import ChatTokenizer
        from mace_ros.model.loading import load_model

        settings = Settings().updated({'model.device': 'cpu', 'model.threads': self._args.threads})
        self._run.say('loading the model and learning a correction for the adapter')
        loaded = load_model('', device='cpu')
        chat, model = ChatTokenizer(loaded.tokenizer), loaded.name
        del loaded
        published = publish(settings, self._run.folder / 'published', lambda text: None)
        self._load_engines(settings, published)
        self._load_generate(model, published.path)
        if find_spec('llama_cpp') is None:
            self._run.notes.append('llama.cpp was not run: llama_cpp is not installed.')
        else:
            self._load_llama(published.path)
        self._load = arrivals(
            lambda text: chat.prompt([{'role': 'user', 'content': text}]), 'decode',
            count=self._args.repeats + 1, seconds=0.0, tokens=self._args.prompt_tokens)

    def run(self) -> list[dict[str, Any]]:
        """Let all systems answer the requests in turn; return a row for each response."""
        args = self._args
        names: list[Name] = [*(('mace_ros', name) for name in self._engines), *self._peers]
        rows: list[dict[str, Any]] = []
        for repeat, arrival in enumerate(self._load, start=-1):     # the first is a warm-up
            first = repeat % len(names)
            for system, precision in names[first:] + names[:first]:
                row = self._answer(system, precision, repeat, arrival)
                if repeat >= 0:
                    rows.append({'system': system, 'precision': precision, 'repeat': repeat, **{
                        k: row[k] for k in ('ttft_ms', 'tpot_ms', 'output_tokens')}})
                    self._run.say(f'{repeat + 1} of {args.repeats}: {system} {precision} '
                                  f'{row["tpot_ms"]:.1f} ms per token')
        return rows

    def close(self) -> None:
        """Stop all systems."""
        for system in (*self._engines.values(), *self._peers.values()):
            system.close()

    def _answer(self, system: str, precision: str, repeat: int,
                arrival: Arrival) -> dict[str, Any]:
        """Return the sample of one response."""
        tokens = self._args.output_tokens
        if system == 'mace_ros':
            block = self._engines[precision].run_block(
                'inference_only', repeat, [arrival], 0.0, tokens)
            row: dict[str, Any] = block.requests[0]
            return row
        served, _ = self._peers[system, precision].call(
            'run_block', time.monotonic(), [arrival], tokens)
        return request_row(system, repeat, served[0].arrival, served[0], SLO)

    def _load_engines(self, settings: Any, published: Any) -> None:
        """Load an engine for each precision, the default first."""
        from bench.systems.engine_under_load import EngineUnderLoad
        from mace_ros.api.settings import PARAMETERS

        for dtype in PARAMETERS['model.weight_dtype'].choices:
            self._run.say(f'loading mace_ros, {dtype}')
            engine = EngineUnderLoad(
                settings.updated({'model.weight_dtype': dtype}),
                published.copy(self._run.folder / f'served-{dtype}'), (), lambda text: None)
            name = engine.engine.model.weight_dtype
            if dtype == 'auto':
                self.default = name
            elif name == self.default:
                engine.close()      # already loaded as auto
                continue
            self._engines[name] = engine
            self.perplexities.append({
                'precision': name, 'weights_mb': engine.engine.model.weights_nbytes / 1e6,
                **perplexity(engine.engine)})

    def _load_generate(self, model: str, adapter: Path) -> None:
        from bench.systems.peers.generate import HfGenerate
        from bench.systems.peers.worker import Worker

        for dtype in PEER_PRECISIONS:
            self._run.say(f'loading HF generate, {dtype}')
            worker = Worker(HfGenerate, model=model, adapter=str(adapter), dtype=dtype).ready()
            self._peers['hf_generate', dtype] = worker
            worker.call('threads', self._args.threads)

    def _load_llama(self, published: Path) -> None:
        """Load llama.cpp in the precisions of the engines, with and without an adapter."""
        from bench.systems.peers.gguf_files import adapter, convert, TYPES
        from bench.systems.peers.llama import LlamaCpp
        from bench.systems.peers.worker import Worker
        from mace_ros.model.loading import packaged_gguf

        source, folder = packaged_gguf(), self._run.folder
        attached = str(adapter(source, folder / 'adapter.gguf', published))
        for precision in self._engines:
            if precision not in TYPES:
                continue
            self._run.say(f'loading llama.cpp, {precision}')
            model = str(convert(source, folder / f'{precision}.gguf', precision))
            for system, file in (('llama_cpp', attached), ('llama_cpp without adapter', '')):
                self._peers[system, precision] = Worker(
                    LlamaCpp, model=model, adapter=file, threads=self._args.threads).ready()


def perplexity(engine: Any) -> dict[str, Any]:
    """Return the base model's perplexity on the conversations of the chat text."""
    import torch
    import torch.nn.functional as F

    from mace_ros.model.attention import whole_sequences
    from mace_ros.model.lora_mapping import BASE_SLOT

    model, total, count = engine.model, 0.0, 0
    for messages in conversations():
        ids = model.tensor(engine.chat.tokenizer.apply_chat_template(messages, return_dict=False))
        positions = torch.arange(len(ids), device=ids.device)
        with torch.no_grad():
            logits = model.forward_packed(
                whole_sequences((len(ids),), ids.device), ids, positions, BASE_SLOT, positions, ())
        total += float(F.cross_entropy(logits[:-1], ids[1:], reduction='sum'))
        count += len(ids) - 1
    return {'perplexity': math.exp(total / count), 'tokens': count}


# -- checks ------------------------------------------------------------------------------


# A precision of ours, a system and a precision to compare with, and the target of the ratio.
DECODE_TARGETS: tuple[tuple[str, Name, str], ...] = (
    ('bfloat16', ('hf_generate', 'bfloat16'), '<= 0.85'),
    ('int4', ('mace_ros', 'int8'), '<= 0.75'),
    ('int4', ('llama_cpp', 'int4'), '<= 1.5'))


def decode_name(precision: str, other: Name) -> str:
    """Return the name of a ratio of times per token."""
    system = 'ours' if other[0] == 'mace_ros' else other[0]
    return f'decode ms/token, ours {precision} / {system} {other[1]}'


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks."""
    default = samples['default_precision']
    text = f'{samples["perplexity"][0]["tokens"]} tokens of chat'
    fp32 = ratio(samples, ('mace_ros', 'float32'), ('hf_generate', 'float32'))
    shipped = ratio(samples, ('mace_ros', default), ('hf_generate', 'float32'))
    found = [
        check('decode ms/token, ours float32 / HF generate with PEFT float32', fp32.median,
              '<= 0.85', fp32.spread),
        check(f'decode ms/token, ours {default} (the default) / HF generate with PEFT float32',
              shipped.median, '<= 0.5', shipped.spread),
        check(f'perplexity, {default} (the default) / float32',
              perplexity_ratio(samples, default, 'float32'), '<= 1.02', text)]
    for precision, other, target in DECODE_TARGETS:
        times = ratio(samples, ('mace_ros', precision), other)
        found.append(check(decode_name(precision, other), times.median, target, times.spread))
    return [
        *found,
        check('perplexity, int4 / float32', perplexity_ratio(samples, 'int4', 'float32'),
              '<= 1.005', text),
        check('memory of the linear layers and the head, int4 / int8', memory_ratio(samples),
              '<= 0.6')]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the ratios without a target."""
    precisions = [p['precision'] for p in samples['perplexity']]
    pairs: list[tuple[str, Name]] = [
        (p, (peer, p)) for p in precisions
        for peer in ('hf_generate', 'llama_cpp', 'llama_cpp without adapter')]
    pairs += [(p, ('hf_generate', 'bfloat16')) for p in ('int8', 'int4')]
    rows = []
    for precision, other in pairs:
        found = ratio(samples, ('mace_ros', precision), other)
        if found.blocks:
            rows.append(Reported(decode_name(precision, other), found.median,
                                 '1.5' if other[0] == 'llama_cpp' else '', found.spread))
    rows += [Reported(f'perplexity, {p} / float32', perplexity_ratio(samples, p, 'float32'))
             for p in precisions if p != 'float32']
    checked = {c.name for c in checks(samples)}
    return [row for row in rows if row.name not in checked]


def table(samples: Mapping[str, Any]) -> Table:
    """Return the table with a row for each system and precision."""
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


def ratio(samples: Mapping[str, Any], above: Name, below: Name) -> Ratio:
    """Return the ratio of the times per token of two systems, per repeat."""
    def times(name: Name) -> dict[int, float]:
        return {r['repeat']: r['tpot_ms'] for r in samples['answers']
                if (r['system'], r['precision']) == name}
    return paired(times(above), times(below))


def perplexity_ratio(samples: Mapping[str, Any], above: str, below: str) -> float | None:
    """Return the ratio of the perplexities of two precisions."""
    found = {p['precision']: p['perplexity'] for p in samples['perplexity']}
    return found[above] / found[below] if above in found and below in found else None


def memory_ratio(samples: Mapping[str, Any]) -> float | None:
    """Return the memory of the weights in 4 bits over that in 8 bits."""
    found = {p['precision']: p.get('weights_mb') for p in samples['perplexity']}
    above, below = found.get('int4'), found.get('int8')
    return above / below if above and below else None


if __name__ == '__main__':
    main()
