# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation: short pages, true figures and links, code that runs; no Sphinx needed."""

from __future__ import annotations

from pathlib import Path
import re
import subprocess
import sys

import pytest

from bench.common.pages import FIGURE, is_day, pages, ROOT, UnknownFigure, updated
from bench.common.recording import FOLDER, read
from bench.report import REPORT, report
from mace_ros.api.settings import PARAMETERS
from tools import messages_page

DOCS = ROOT / 'docs'
PAGES = [*pages(), ROOT / 'CONTRIBUTING.md', ROOT / 'QUALITY_DECLARATION.md']
GENERATED = {'docs/reference/parameters.md', 'docs/reference/messages.md',
             'docs/evidence/report.md'}
MAX_WORDS = 1500
MAX_README_LINES = 150

COMMIT = re.compile(r'\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b')
DIARY = re.compile(r'\b(at commit|the run before|earlier runs?|in the run below)\b', re.IGNORECASE)
FENCED = re.compile(r'^(```+).*?^\1$', re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r'<!--.*?-->', re.DOTALL)
LINK = re.compile(r'\]\(([^()\s]+)\)')
RUN = re.compile(r'^<!-- run -->\n```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """Return a page without code blocks and comments."""
    return COMMENT.sub('', FENCED.sub('', path.read_text()))


def is_log(path: Path) -> bool:
    return path.parent == DOCS / 'log'


def user_pages() -> list[Path]:
    """Return the pages for users: neither generated nor of the research log."""
    return [path for path in pages() if name(path) not in GENERATED and not is_log(path)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r'^#+ (.+)$', FENCED.sub('', path.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


# -- pages -------------------------------------------------------------------------------


@pytest.mark.parametrize('path', user_pages(), ids=name)
def test_a_user_page_is_short(path: Path) -> None:
    # The hops of architecture.md are a list that tools/check_structure.py reads.
    lines = [line for line in prose(path).splitlines()
             if not re.match(r'\d+\. `mace_ros/', line)]
    assert len(' '.join(lines).split()) <= MAX_WORDS


def test_the_readme_is_short_and_names_the_command_of_the_tests() -> None:
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= MAX_README_LINES
    assert any(line.startswith('make test ') for line in lines)
    assert 'make test' in (ROOT / '.ci/run').read_text()


@pytest.mark.parametrize('path', user_pages(), ids=name)
def test_a_user_page_tells_what_is_true_now(path: Path) -> None:
    assert COMMIT.findall(prose(path)) == []
    assert DIARY.findall(prose(path)) == []


@pytest.mark.parametrize('path', sorted(DOCS.glob('log/2*.md')), ids=name)
def test_an_entry_of_the_log_has_its_four_parts(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f'# {path.name[:10]}: ')
    assert re.findall(r'^\*\*(\w+)\.\*\*', text, re.MULTILINE) == [
        'Question', 'Done', 'Result', 'Decision']
    assert path.name in (DOCS / 'log/index.md').read_text()


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in LINK.findall(FENCED.sub('', path.read_text())):
        if re.match(r'\w+:', link):
            continue
        place, _, anchor = link.partition('#')
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_the_site_contains_every_page() -> None:
    text = (DOCS / 'index.md').read_text()
    listed = {line for block in re.findall(r'^```\{toctree\}\n(.*?)^```', text, re.M | re.S)
              for line in block.splitlines() if line and not line.startswith(':')}
    found = {path.relative_to(DOCS).with_suffix('').as_posix() for path in DOCS.rglob('*.md')
             if not re.match(r'\d', path.name)}
    assert listed == found - {'index'}


def test_the_page_of_messages_is_up_to_date() -> None:
    """If it fails: ``python tools/messages_page.py > docs/reference/messages.md``."""
    assert (DOCS / 'reference/messages.md').read_text() == messages_page.page()


def test_pictures_have_a_text_and_follow_the_colour_scheme() -> None:
    shown = set()
    for path in PAGES:
        for text, place in re.findall(r'!\[(.*?)\]\(([^)]+)\)', path.read_text(), re.DOTALL):
            assert len(text) > 20, f'{name(path)}: {place}'
            shown.add((path.parent / place).resolve())
    plain = {path.name for path in shown if 'prefers-color-scheme: dark' not in path.read_text()}
    assert plain == {'demo.svg'}    # a terminal, which is dark on any page
    assert set((DOCS / 'pictures').iterdir()) <= shown


# -- figures -----------------------------------------------------------------------------


@pytest.mark.parametrize('path', pages(), ids=name)
def test_figures_equal_their_sources(path: Path) -> None:
    """If it fails: ``python -m bench.report --markdown``."""
    text = path.read_text()
    assert updated(text, read(FOLDER)) == text
    assert text.count('<!--= ') == len(FIGURE.findall(text))    # none is misspelt
    # Markdown takes a line that begins with a comment for HTML, and so not for prose.
    assert re.findall(r'^\s*<!--= .*', text, re.MULTILINE) == []


@pytest.mark.parametrize('path', user_pages(), ids=name)
def test_a_page_says_when_its_figures_were_recorded(path: Path) -> None:
    figures = list(FIGURE.finditer(path.read_text()))
    dated = {figure['bench'] for figure in figures if is_day(figure['name'])}
    undated = {figure['bench'] for figure in figures} - dated
    # Its perplexity links to the report, which has the day.
    assert undated <= ({'decode'} if path.name == 'precisions.md' else set())


def test_the_report_equals_the_results() -> None:
    """If it fails: ``python -m bench.report --markdown``."""
    assert REPORT.read_text() == report(read(FOLDER))


RESULT = {'bench': 'x', 'started': '2026-11-29T10:00:00', 'reported': [],
          'samples': {'conditions': {}, 'new': [1]},
          'earlier': {'conditions': {'started': '2026-11-01T10:00:00'}},
          'checks': [{'name': 'a: b, c / d', 'value': 0.123}],
          'tables': [{'title': 'T', 'columns': ['set', 'n', 'p95 s'],
                      'rows': [['one', 1, 4.0], ['one', 2, 5.0]]}]}


@pytest.mark.parametrize(('source', 'shown'), [
    ('x: a: b, c / d {:.0%}', '12%'), ('x: a: b, c / d {:.2f} s', '0.12 s'),
    ('x: T > one, 2 > p95 s {:.1f}', '5.0'), ('x: recorded {:}', '2026-11-29'),
    ('x: recorded: new {:}', '2026-11-29')])
def test_a_figure_is_updated(source: str, shown: str) -> None:
    text = f'It is <!--= {source} -->old<!--/--> today.'
    assert updated(text, [RESULT]) == f'It is <!--= {source} -->{shown}<!--/--> today.'


@pytest.mark.parametrize('source', [
    'y: a {:}', 'x: b {:}', 'x: T > one > p95 s {:}', 'x: T > one, 1 > p99 s {:}',
    'x: recorded: other {:}'])
def test_a_figure_without_a_source_is_refused(source: str) -> None:
    with pytest.raises(UnknownFigure, match=source.split(' {')[0]):
        updated(f'<!--= {source} -->1<!--/-->', [RESULT])


def test_parts_of_different_days_have_to_be_named() -> None:
    result = {**RESULT, 'samples': {'new': [1], 'old': [2]},
              'earlier': {'old': {'started': '2026-11-01T10:00:00'}}}
    assert updated('<!--= x: recorded: old {:} --><!--/-->', [result]) == (
        '<!--= x: recorded: old {:} -->2026-11-01<!--/-->')
    with pytest.raises(UnknownFigure, match='recorded'):
        updated('<!--= x: recorded {:} --><!--/-->', [result])


def test_the_defaults_on_the_page_of_budgets_are_those_of_the_code() -> None:
    rows = re.findall(r'^\| `([\w.]+)` \| `?([\w.]+)`? \|',
                      (DOCS / 'guides/latency.md').read_text(), re.MULTILINE)
    assert len(rows) > 10
    for parameter, shown in rows:
        default = PARAMETERS[parameter].default
        assert shown == (default if isinstance(default, str) else f'{default:g}'), parameter


# -- code --------------------------------------------------------------------------------


@pytest.mark.parametrize('path', [p for p in pages() if RUN.search(p.read_text())], ids=name)
def test_code_that_is_marked_to_run_runs(path: Path, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    for language, code in RUN.findall(path.read_text()):
        if language == 'python':
            exec(compile(code, name(path), 'exec'), names)
        else:
            done = subprocess.run(
                ['bash', '-euc', f'python() {{ "{sys.executable}" "$@"; }}\n{code}'],
                cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
