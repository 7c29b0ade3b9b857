# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Agents of robots, by their own code: a turn that uses a tool.

ROSA and RAI need versions of LangChain that exclude each other, so each is installed in a virtual
environment of its own, whose Python is named by ``ROSA_PYTHON`` or ``RAI_PYTHON``
(docs/evidence/ros-tools.md). Without one, the package must be importable here.
"""

from __future__ import annotations

from collections.abc import Iterator
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
import sysconfig

import pytest
from support.graph import ENVIRONMENT, wait_until
from support.openai_server import served_node, ServerProcess

from mace_ros.cli.journal_admin import opened

pytestmark = pytest.mark.timeout(600)

TURN_S = 200.0
QUESTION = 'What is 2 plus 3?'
CALL = '<tool_call>\n{"name": "add_all", "arguments": {"numbers": [2, 3]}}\n</tool_call>'

# Each prints a line of JSON for a tool's result, and one for its answer. rclpy is found after
# the packages of the agent.
BEGIN = """
import asyncio, json, site, sys
packages, url, question = sys.argv[1:]
site.addsitedir(packages)
def tell(**what):
    print(json.dumps(what), flush=True)
"""
AGENTS = {
    'rosa': """
from langchain_openai import ChatOpenAI
from rosa import ROSA

agent = ROSA(ros_version=2, max_iterations=2, llm=ChatOpenAI(
    base_url=url, api_key='none', model='mace', temperature=0.0, max_tokens=60))

async def turn():
    async for event in agent.astream(question):
        if event['type'] == 'tool_end':
            tell(tool=event['name'], result=float(event['output']))
        if event['type'] in ('final', 'error'):
            tell(**{event['type']: event['content']})

asyncio.run(turn())
""",
    'rai': """
from pathlib import Path
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from rai import get_llm_model
from rai.agents.langchain import create_react_runnable

@tool
def add_all(numbers: list[float]) -> float:
    'Returns the sum of a list of numbers.'
    return sum(numbers)

Path('config.toml').write_text(f'''
[vendor]
simple_model = "openai"
complex_model = "openai"
embeddings_model = "openai"

[openai]
simple_model = "mace"
complex_model = "mace"
embeddings_model = ""
base_url = "{url}"
''')
llm = get_llm_model('complex_model', streaming=True)
agent = create_react_runnable(llm, [add_all], 'You are a robot.')
turn = agent.invoke({'messages': [HumanMessage(question)]}, {'recursion_limit': 6})
for message in turn['messages']:
    if isinstance(message, ToolMessage):
        tell(tool=message.name, result=float(message.content))
tell(final=message.content)
"""}


@pytest.fixture(params=AGENTS)
def agent(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return the name of an agent, and the Python in which its package is installed."""
    name = str(request.param)
    python = os.environ.get(f'{name.upper()}_PYTHON', '')
    if not python and importlib.util.find_spec(name) is None:
        pytest.skip(f'{name} is not installed here, and {name.upper()}_PYTHON names no Python '
                    f'that has it (docs/evidence/ros-tools.md)')
    return name, python or sys.executable


@pytest.fixture
def server(agent: tuple[str, str], tmp_path: Path, model_folder: Path) -> Iterator[ServerProcess]:
    """Yield a server of a node that takes ROSA's prompt, of about 7000 tokens."""
    config = json.loads((model_folder / 'config.json').read_text())
    longer = tmp_path / 'longer'
    longer.mkdir()
    for path in model_folder.iterdir():
        (longer / path.name).symlink_to(path)
    (longer / 'config.json').unlink()
    (longer / 'config.json').write_text(json.dumps({**config, 'max_position_embeddings': 32768}))
    with served_node(tmp_path, longer, **{
            'finetune.max_sample_tokens': 8192, 'memory.kv_cache_tokens': 32768,
            'generation.max_tokens': 60}) as made:
        yield made


def turn(agent: tuple[str, str], server: ServerProcess) -> list[dict[str, object]]:
    """Return what the agent tells of its turn."""
    name, python = agent
    done = subprocess.run(
        [python, '-c', BEGIN + AGENTS[name], sysconfig.get_path('platlib'), server.url, QUESTION],
        cwd=server.folder, env={**os.environ, **ENVIRONMENT, 'OPENAI_API_KEY': 'none'},
        capture_output=True, text=True, timeout=TURN_S)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    print(name, told)
    assert not any('error' in what for what in told), told
    return told


def test_a_turn_uses_a_tool(agent: tuple[str, str], server: ServerProcess) -> None:
    [told] = turn(agent, server)        # a random model calls nothing yet
    assert told['final']

    def newest() -> str:
        with opened(server.folder / 'storage') as journal:
            return next((a.query_id for a in journal.replay_candidates('', 1)), '')

    assert wait_until(newest, 60.0)
    status = server.status(
        server.feedback(id=newest(), corrected=CALL), 'learned', 'failed')
    assert status['status'] == 'learned', status
    called, *_ = turn(agent, server)
    assert called == {'tool': 'add_all', 'result': 5.0}
