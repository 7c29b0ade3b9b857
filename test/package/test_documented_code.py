# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The code in the documentation that needs a node: it runs beside one, as it is printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import re
import subprocess
import sys

import pytest
from support.openai_server import served_node, ServerProcess

from bench.common.pages import pages, ROOT

pytest.importorskip('langchain_openai')

RUN = re.compile(
    r'^<!-- run beside a node -->\n```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = [(page.relative_to(ROOT).as_posix(), language, code)
          for page in pages() for language, code in RUN.findall(page.read_text())]
URL = 'http://127.0.0.1:8000/v1'

# What `ros2 run` does with the programs of this package.
ROS2_RUN = 'ros2() { [ "$1 $2" = "run mace_ros" ]; ".venv/bin/mace_$3" "${@:4}"; }'
BLOCK_S = 200.0


@pytest.fixture(scope='module')
def server(tmp_path_factory: pytest.TempPathFactory,
           model_folder: Path) -> Iterator[ServerProcess]:
    with served_node(tmp_path_factory.mktemp('documented'), model_folder) as made:
        yield made


def test_each_mark_is_followed_by_code() -> None:
    marks = sum(page.read_text().count('<!-- run beside a node -->') for page in pages())
    assert len(BLOCKS) == marks > 0


@pytest.mark.parametrize(
    ('page', 'language', 'code'), BLOCKS, ids=[f'{page}-{code[:20]}' for page, _, code in BLOCKS])
def test_code_runs_beside_a_node(
        server: ServerProcess, page: str, language: str, code: str, tmp_path: Path) -> None:
    if language == 'python':
        exec(compile(code.replace(URL, server.url), page, 'exec'), {})
        return
    (tmp_path / '.venv').symlink_to(sys.prefix)
    if not (tmp_path / '.venv/bin/mace_ask').exists():
        pytest.skip('the programs are not installed in this environment')
    done = subprocess.run(['bash', '-ec', f'{ROS2_RUN}\n{code}'], cwd=tmp_path, text=True,
                          capture_output=True, timeout=BLOCK_S)
    assert done.returncode == 0, done.stdout + done.stderr
