# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The simulator's command line, from its arguments to a report in a browser."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
from threading import Thread

import pytest
from support.arrivals import write_trace

from mace_ros.simulation.__main__ import main
from mace_ros.simulation.report import TITLES

CHROMIUM = next((path for path in map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome')) if path), None)
SMALL = ('--requests', '40', '--load-requests', '10', '--loads', '1,2', '--seed', '3')

# Inserted into a copy of the report: reports how the browser renders it.
PROBE = """<script>
addEventListener('load', () => {
  const seen = [...document.querySelectorAll('figure')].map(figure => {
    const box = figure.querySelector('svg').getBoundingClientRect();
    return {id: figure.id, width: box.width, height: box.height,
            paths: figure.querySelectorAll('svg path').length};
  });
  document.body.innerHTML = '<pre id="probe">' + JSON.stringify({
    figures: seen, title: document.title,
    requests: performance.getEntriesByType('resource').map(entry => entry.name)}) + '</pre>';
});
</script></body>"""


def opened(html: str, folder: Path) -> dict:
    """Open a page in a browser; return the output of the probe."""
    page = folder / 'page.html'
    page.write_text(html.replace('</body>', PROBE))
    shown = subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
         '--disable-background-networking', f'--user-data-dir={folder / "profile"}',
         '--virtual-time-budget=2000', '--dump-dom', page.as_uri()],
        check=True, capture_output=True, text=True, timeout=200).stdout
    return json.loads(re.search(r'<pre id="probe">(.*?)</pre>', shown)[1])


@pytest.fixture(scope='module')
def trace_file(tmp_path_factory) -> Path:
    return write_trace(tmp_path_factory.mktemp('trace') / 'trace.csv')


@pytest.fixture(scope='module')
def report(trace_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('report')
    assert main(['--trace', str(trace_file), '--output', str(folder), *SMALL,
                 '--processes', '1']) == 0
    return folder


def test_a_report_has_all_its_parts(report):
    data = json.loads((report / 'simulation.json').read_text())
    policies = [row['policy'] for row in data['policies']]
    assert policies == ['mace', 'periodic', 'continuous', 'inference_only']
    assert all(row['requests'] == 40 and row['rejected'] == 0 for row in data['policies'])
    assert len(data['loads']) == 2 * len(policies)
    table = (report / 'table.md').read_text()
    assert all(f'| {policy} |' in table for policy in policies)
    assert len((report / 'table.csv').read_text().splitlines()) == 5
    html = (report / 'report.html').read_text()
    assert 'A simulation.' in html
    for name in TITLES:
        assert (report / f'{name}.svg').read_text() in html
    # Assumptions are marked as such, and nothing is fetched.
    assert html.count('assumed') >= 4
    assert not re.findall(r'(?:src|href)="(?!#)', html.replace('xlink:', ''))
    assert '@import' not in html and 'url(http' not in html


def test_the_same_seed_gives_the_same_bytes(report, trace_file, tmp_path):
    again, other = tmp_path / 'again', tmp_path / 'other'
    # In another process, with another number of workers.
    subprocess.run([sys.executable, '-m', 'mace_ros.simulation', '--trace', str(trace_file),
                    '--output', str(again), *SMALL, '--processes', '2'], check=True,
                   capture_output=True, timeout=200)
    names = sorted(path.name for path in report.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (report / name).read_bytes() == (again / name).read_bytes(), name
    main(['--trace', str(trace_file), '--output', str(other), *SMALL, '--seed', '4',
          '--loads', 'none', '--policy', 'mace', '--processes', '1'])
    assert (other / 'table.md').read_text().splitlines()[2] not in (
        report / 'table.md').read_text()


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium to open the report in')
def test_a_browser_shows_the_report_without_requests(report, tmp_path):
    html = (report / 'report.html').read_text()
    found = opened(html, tmp_path)
    assert found['title'] == 'llama-3.2-1b on orin-agx-64 (maxn)'
    assert {figure['id'] for figure in found['figures']} == set(TITLES)
    for figure in found['figures']:
        assert figure['width'] > 200 and figure['height'] > 100
        assert figure['paths'] > 10
    assert found['requests'] == []
    # Check that the probe would have noticed a request.
    serve = partial(SimpleHTTPRequestHandler, directory=report)
    with ThreadingHTTPServer(('127.0.0.1', 0), serve) as server:
        Thread(target=server.serve_forever).start()
        picture = f'http://127.0.0.1:{server.server_port}/ttft.svg'
        asking = opened(html.replace('</body>', f'<img src="{picture}"></body>'), tmp_path)
        server.shutdown()
    assert asking['requests'] == [picture]


@pytest.mark.parametrize(('arguments', 'reason'), [
    (('--arrivals', 'poisson', '--policy', 'best'), "'best' is not one of"),
    (('--arrivals', 'poisson', '--device', 'this-machine'), '--calibration belongs to'),
    (('--arrivals', 'poisson', '--power-mode', '30w'), 'has maxn, maxq, not'),
    (('--arrivals', 'poisson', '--set', 'slo.ttft=3'), 'no such parameter'),
    (('--arrivals', 'poisson', '--requests', '0'), 'must be greater than 0'),
    (('--arrivals', 'poisson', '--device', 'orin-nano-8', '--model', 'llama-3-8b'),
     'llama-3-8b takes'),
    (('--trace', '/nowhere/trace.csv'), 'No such file')])
def test_invalid_arguments_are_refused_with_the_reason(
        arguments, reason, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, '--output', str(tmp_path / 'out')])
    assert stopped.value.code == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_the_node_loads_tuned_parameters(trace_file, tmp_path, monkeypatch):
    from rclpy.context import Context
    from rclpy.node import Node

    from mace_ros.ros.parameters import ParameterServer

    monkeypatch.setattr('mace_ros.simulation.tuning.CANDIDATES', {
        'scheduler.max_batch_tokens': (128, 512), 'scheduler.max_slowdown': (1.0, 1.2),
        'finetune.max_blocking_ms': (25.0, 50.0), 'finetune.min_share': (0.1,)})
    assert main(['--trace', str(trace_file), '--tune', '--learning', 'always', '--requests', '20',
                 '--set', 'slo.ttft_ms=300', 'slo.admission=reject', '--processes', '1',
                 '--output', str(tmp_path)]) == 0
    context = Context()
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'OFF')
    context.init(args=[])
    node = Node('mace', context=context, cli_args=[
        '--ros-args', '--params-file', str(tmp_path / 'params.yaml')])
    try:
        settings = ParameterServer(node, lambda settings: None).settings
    finally:
        node.destroy_node()
        context.shutdown()
    assert settings.slo.ttft_ms == 300.0
    assert settings.slo.admission == 'reject'
    assert settings.scheduler.policy == 'mace'
    # There is plenty of slack, so that the largest slowdown learns most.
    assert settings.scheduler.max_slowdown == 1.2
