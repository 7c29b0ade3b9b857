# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The SROS2 policy, and refusal to start without the security that is enabled."""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
POLICY = ElementTree.parse(ROOT / 'security/mace.policy.xml').getroot()

# The schema of sros2 0.2.0: child elements, and required and allowed attributes.
CHILDREN = {
    'policy': {'enclaves'}, 'enclaves': {'enclave'}, 'enclave': {'profiles'},
    'profiles': {'profile'}, 'profile': {'topics', 'services', 'actions'},
    'topics': {'topic'}, 'services': {'service'}, 'actions': {'action'},
    'topic': set(), 'service': set(), 'action': set()}
REQUIRED = {'policy': {'version'}, 'enclave': {'path'}, 'profile': {'ns', 'node'}}
RULES = {'topics': {'publish', 'subscribe'}, 'services': {'reply', 'request'},
         'actions': {'call', 'execute'}}

# Interfaces of every node, beside the documented ones.
EVERY_NODE = {'/rosout', '/parameter_events', '/clock'}
PARAMETERS = {'~/describe_parameters', '~/get_parameter_types', '~/get_parameters',
              '~/list_parameters', '~/set_parameters', '~/set_parameters_atomically',
              '~/get_type_description'}


def allowed(enclave: str, kind: str, rule: str) -> set[str]:
    """Return the names that a rule allows the node ``mace`` of an enclave."""
    profile = f"enclaves/enclave[@path='/{enclave}']/profiles/profile[@node='mace']"
    return {item.text for group in POLICY.findall(f'{profile}/{kind}[@{rule}="ALLOW"]')
            for item in group}


def documented(pattern: str) -> set[str]:
    text = (ROOT / 'docs/reference/interfaces.md').read_text()
    return set(re.findall(rf'^\| `(~?/[\w/]+)` \| `{pattern}', text, re.MULTILINE))


def test_the_policy_follows_the_schema_of_sros2() -> None:
    assert (POLICY.tag, POLICY.get('version')) == ('policy', '0.2.0')
    for element in POLICY.iter():
        assert {child.tag for child in element} <= CHILDREN[element.tag]
        assert REQUIRED.get(element.tag, set()) <= set(element.attrib)
        rules = RULES.get(element.tag, set())
        assert set(element.attrib) <= REQUIRED.get(element.tag, set()) | rules
        if rules:
            assert element.attrib
            assert set(element.attrib.values()) == {'ALLOW'}
        if not CHILDREN[element.tag]:
            assert re.fullmatch(r'(~/|/)\w+', element.text or '')


def test_the_policy_allows_the_documented_interfaces() -> None:
    """test_documented_interfaces.py compares the documentation with the running node."""
    topics = documented(r'\w+/msg/\w+` \| in ')
    published = documented(r'\w+/msg/\w+` \| out')
    services, actions = documented(r'\w+/srv/'), documented(r'\w+/action/')
    assert min(map(len, (topics, published, services, actions))) > 0
    assert allowed('mace', 'topics', 'subscribe') - EVERY_NODE == topics
    assert allowed('mace', 'topics', 'publish') - EVERY_NODE == published
    assert allowed('mace', 'services', 'reply') == services | PARAMETERS
    assert allowed('mace', 'actions', 'execute') == actions
    assert allowed('mace_client', 'topics', 'publish') - EVERY_NODE == topics
    assert allowed('mace_client', 'topics', 'subscribe') - EVERY_NODE == published
    assert allowed('mace_client', 'services', 'request') == services | PARAMETERS
    assert allowed('mace_client', 'actions', 'call') == actions
    for kind, rule in (('services', 'request'), ('actions', 'call')):
        assert allowed('mace', kind, rule) == set()
    for kind, rule in (('services', 'reply'), ('actions', 'execute')):
        assert allowed('mace_client', kind, rule) == set()


FILES = ('identity_ca.cert.pem', 'cert.pem', 'key.pem', 'permissions_ca.cert.pem',
         'governance.p7s', 'permissions.p7s')


def run_secured(folder: Path, keys: str, strategy: str | None, module: str, *arguments: str,
          enclave: str) -> subprocess.CompletedProcess[str]:
    """Run a module with security enabled and keys missing or invalid."""
    keystore = folder / 'keys'
    if keys != 'no keystore':
        enclaves = keystore / f'enclaves/{enclave}'
        enclaves.mkdir(parents=True)
        if keys == 'invalid keys':
            for name in FILES:
                (enclaves / name).write_text('invalid')
        else:
            enclaves.rmdir()
    environment = {
        **os.environ, 'ROS_SECURITY_ENABLE': 'true', 'ROS_SECURITY_KEYSTORE': str(keystore),
        'ROS_SECURITY_ENCLAVE_OVERRIDE': f'/{enclave}',
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'OFF', 'ROS_LOG_DIR': str(folder)}
    environment.pop('ROS_SECURITY_STRATEGY', None)
    if strategy:
        environment['ROS_SECURITY_STRATEGY'] = strategy
    return subprocess.run(
        [sys.executable, '-m', module, *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=200)


KEYS = ('no keystore', 'no enclave', 'invalid keys')


@pytest.mark.parametrize('strategy', [None, 'Enforce'])
@pytest.mark.parametrize('keys', KEYS)
def test_a_node_without_security_does_not_start(
    tmp_path: Path, keys: str, strategy: str | None,
) -> None:
    node = run_secured(tmp_path, keys, strategy, 'mace_ros.ros.node', '--ros-args', '-p',
                 f'storage.folder:={tmp_path / "storage"}', enclave='mace')
    assert node.returncode == 2, node.stderr
    assert 'mace_node: RCLError: ' in node.stderr
    assert re.search('security', node.stderr, re.IGNORECASE)
    assert 'Traceback' not in node.stderr
    assert not (tmp_path / 'storage').exists()


@pytest.mark.parametrize('keys', KEYS)
def test_a_program_without_security_fails_with_a_message(
        tmp_path: Path, keys: str) -> None:
    asked = run_secured(tmp_path, keys, None, 'mace_ros.cli.ask', 'Hi', enclave='mace_client')
    assert (asked.returncode, asked.stdout) == (2, ''), asked.stderr
    assert re.search('RCLError: .*security', asked.stderr, re.IGNORECASE)
    assert 'Traceback' not in asked.stderr
