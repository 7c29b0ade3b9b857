# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The report of a study: JSON, tables, plots, and one HTML file with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
from html import escape
import io
import json
import math
from pathlib import Path
from typing import Any

from mace_ros.simulation.arrival_trace import rate_of
from mace_ros.simulation.devices import DEVICES
from mace_ros.simulation.models import MODELS
from mace_ros.simulation.plots import draw
from mace_ros.simulation.replay import memory_gb, Outcome, summary, tpot_s
from mace_ros.simulation.study import Study

VALIDATION = Path(__file__).with_name('validation.json')

TITLES = {
    'ttft': 'Time to first token', 'tpot': 'Time per output token',
    'stages': 'Device time by stage', 'shares': 'Shares of the device over time',
    'freshness': 'Freshness', 'attainment': 'Requests in time, by load'}

# The claims of MACE (arXiv 2510.03283), on an AGX Orin.
CLAIMS = (
    ('prefill latency, against periodic and continuous retraining', 'up to -63 %'),
    ('decode latency, against periodic and continuous retraining', 'up to -30 %'),
    ('utilisation of the GPU', '> 85 %'))

NOT_COMPARABLE = (
    "The paper's models, lengths, objectives, data and definition of utilisation are not public, "
    'and its numbers were measured on a device, while these are simulated. What can be compared '
    'is the direction and the order of magnitude of the differences between policies, not one '
    'number with the other. Our utilisation is the share of the time in which the device works, '
    'and it can be high only if there is enough to learn.')

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: right }
td:first-child, th:first-child, .words td, .words th { text-align: left }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
figcaption { font-weight: 600 }
svg { max-width: 100%; height: auto }
"""

Row = Sequence[str]


def write(study: Study, outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write the report of a study into ``folder``; return the path of the HTML file."""
    main = outcomes[:len(study.policies)]
    rows = [summary(each) for each in outcomes]
    data = {
        'study': describe(study), 'validation': validation(), 'paper': compared(rows[:len(main)]),
        'policies': rows[:len(main)], 'loads': rows[len(main):],
        'sources': [list(row) for row in sources(study)],
        'samples': {o.policy: {
            'ttft_ms': [1e3 * ((r.first_token_at or 0.0) - r.arrival) for r in o.requests],
            'tpot_ms': [1e3 * tpot_s(r) for r in o.requests if r.output_tokens > 1],
            'shares': o.shares} for o in main}}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / 'simulation.json', json.dumps(plain(data), allow_nan=False) + '\n')
    head, table = policy_table(rows[:len(main)])
    _write(folder / 'table.md', markdown(head, table))
    _write(folder / 'table.csv', _csv(head, table))
    slo = study.settings.slo
    pictures = draw(main, rows, {'ttft_ms': slo.ttft_ms, 'tpot_ms': slo.tpot_ms})
    for name, svg in pictures.items():
        _write(folder / f'{name}.svg', svg)
    report = folder / 'report.html'
    _write(report, html(study, data, pictures))
    return report


def describe(study: Study) -> dict[str, Any]:
    """Return the inputs of a study, as plain data."""
    target, settings = study.target, study.settings
    arrivals = study.source.arrivals(study.requests, study.seed)
    learning: dict[str, Any] = {'kind': study.learning}
    if study.learning == 'corrections':
        learning.update(vars(study.mistakes))
    elif study.learning == 'always':
        learning['sample_tokens'] = study.sample_tokens
    return {
        'device': target.device, 'power_mode': target.mode, 'model': target.model,
        'weight_bytes': target.weight_bytes, 'arrivals': study.source.name,
        'scale': study.source.scale, 'requests': study.requests, 'seed': study.seed,
        'requests_per_s': rate_of(arrivals), 'span_s': arrivals[-1].at,
        'memory_gb': memory_gb(MODELS[target.model], settings, target.weight_bytes),
        'learning': learning, 'loads': list(study.loads), 'load_requests': study.load_requests,
        'parameters': {name: settings.value(name) for name in SHOWN}}


SHOWN = ('slo.ttft_ms', 'slo.tpot_ms', 'slo.freshness_s', 'slo.admission',
         'scheduler.max_slowdown', 'scheduler.max_batch_tokens', 'scheduler.max_requests',
         'scheduler.max_queue', 'memory.kv_cache_tokens', 'finetune.budget',
         'finetune.min_share', 'finetune.max_blocking_ms', 'finetune.period_s',
         'finetune.period_steps', 'finetune.replay_samples', 'finetune.recompute')


def validation() -> dict[str, Any] | None:
    """Return the simulator's errors against the real engine; None if not measured."""
    if not VALIDATION.is_file():
        return None
    found: dict[str, Any] = json.loads(VALIDATION.read_text())
    return found


def validation_text() -> str:
    """Return :func:`validation` as a sentence."""
    found = validation()
    if found is None:
        return 'The simulator was not compared with the real engine.'
    errors = ', '.join(f'{name} {error:+.1%}' for name, error in found['errors'].items())
    return (f'Simulated against the real engine ({found["model"]} on {found["machine"]}, '
            f'{found["blocks"]} blocks of {found["requests"]} requests): {errors}. '
            'No Jetson was at hand to compare with.')


def sources(study: Study) -> list[Row]:
    """Return the numbers that the simulation uses: name, value, source."""
    target = study.target
    if target.calibration is not None:
        return [('all times', '', 'measured on this machine by bench.simulation')]
    numbers = DEVICES[target.device].numbers(target.mode)
    rows: list[Row] = [
        (name, f'{number.value:.4g}', number.source) for name, number in numbers.items()]
    rows.append(('model', target.model, MODELS[target.model].source))
    if study.learning == 'corrections':
        rows.append(('corrections', f'{study.mistakes.share:.3g} of the answers',
                     'assumed, as are drift and the number of steps'))
    return rows


def policy_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Row, list[Row]]:
    """Return the header and the rows of the table of policies."""
    head = ('policy', 'TTFT p50 ms', 'TTFT p95 ms', 'TPOT p50 ms', 'TPOT p95 ms', 'in time',
            'fine-tune tokens/s', 'corrections live', 'freshness mean s', 'freshness p95 s',
            'utilisation')
    return head, [(
        row['policy'], *(_number(row[x][p]) for x in ('ttft_ms', 'tpot_ms')
                         for p in ('p50', 'p95')),
        f'{row["slo_attainment"]:.1%}', _number(row['finetune_tokens_per_s']),
        f'{row["corrections_learned"]} of {row["corrections"]}' if row['corrections'] else '-',
        *(_number(row['freshness_s'][x]) if row['corrections'] else '-'
          for x in ('mean', 'p95')),
        f'{row["utilisation"]:.1%}') for row in rows]


def _number(value: float) -> str:
    """Return a number with three significant digits, or all digits before the point."""
    return f'{value:.0f}' if abs(value) >= 100.0 else f'{value:.3g}'


def compared(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Compare the paper's claims with the simulated ``mace``: what, claim, found."""
    by_policy = {row['policy']: row for row in rows}
    mace = by_policy.get('mace')
    if mace is None:
        return []
    found = []
    for key in ('ttft_mean_ms', 'tpot_mean_ms'):
        found.append(', '.join(
            f'{mace[key] / by_policy[other][key] - 1.0:+.0%} ({other})'
            for other in ('periodic', 'continuous')
            if other in by_policy and by_policy[other][key] > 0.0) or 'not simulated')
    found.append(f'{mace["utilisation"]:.0%}')
    return [(*claim, here) for claim, here in zip(CLAIMS, found, strict=True)]


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def html(study: Study, data: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return the report as one page that loads nothing else."""
    about = data['study']
    title = f'{about["model"]} on {about["device"]} ({about["power_mode"]})'
    head, rows = policy_table(data['policies'])
    parts = [
        f'<h1>{escape(title)}</h1>',
        f'<p>{about["requests"]} requests ({escape(about["arrivals"])}, scale '
        f'{about["scale"]:g}): {about["requests_per_s"]:.3g} per second for '
        f'{about["span_s"] / 60.0:.1f} minutes. Learning: {escape(about["learning"]["kind"])}. '
        f'Seed {about["seed"]}.</p>',
        f'<p><strong>A simulation.</strong> {escape(validation_text())}</p>',
        '<h2>Policies</h2>', _html_table(head, rows)]
    if data['paper']:
        parts += ['<h2>Beside the paper</h2>', _html_table(
            ('', 'MACE (arXiv 2510.03283)', 'mace here, means'), data['paper'], 'words'),
            f'<p>{escape(NOT_COMPARABLE)}</p>']
    parts.append('<h2>Pictures</h2>')
    parts += [f'<figure id="{name}"><figcaption>{TITLES[name]}</figcaption>{svg}</figure>'
              for name, svg in pictures.items()]
    if not pictures:
        parts.append("<p>matplotlib is not importable: pip install 'mace-ros[simulation]'</p>")
    if data['loads']:
        parts += ['<h2>By load</h2>', _html_table(
            ('policy', 'load', 'TTFT p95 ms', 'TPOT p95 ms', 'in time', 'utilisation'),
            [(row['policy'], f'{row["load"]:g}', _number(row['ttft_ms']['p95']),
              _number(row['tpot_ms']['p95']), f'{row["slo_attainment"]:.1%}',
              f'{row["utilisation"]:.1%}') for row in data['loads']])]
    parts += [
        '<h2>Numbers and their sources</h2>',
        _html_table(('number', 'value', 'source'), data['sources'], 'words'),
        '<h2>Parameters</h2>',
        _html_table(('parameter', 'value'),
                    [(k, str(v)) for k, v in about['parameters'].items()], 'words')]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n'
            + '\n'.join(parts) + '\n</body></html>\n')


def _html_table(head: Row, rows: Sequence[Row], kind: str = '') -> str:
    def line(cells: Row, tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{escape(str(c))}</{tag}>' for c in cells) + '</tr>'
    return (f'<table class="{kind}">' + line(head, 'th')
            + ''.join(line(row, 'td') for row in rows) + '</table>')


def _csv(head: Row, rows: Sequence[Row]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator='\n').writerows([head, *rows])
    return file.getvalue()


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def plain(data: Any) -> Any:
    """Return ``data`` as JSON can hold it: null for NaN, floats of six significant digits."""
    if isinstance(data, Mapping):
        return {str(k): plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(x) for x in data]
    if isinstance(data, float):
        return float(f'{data:.6g}') if math.isfinite(data) else None
    return data
