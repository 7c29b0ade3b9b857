# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests that clients should not send, of hypothesis and made by hand."""

from __future__ import annotations

from itertools import cycle, islice
import json
from typing import Any

from hypothesis import given, HealthCheck, Phase, settings, strategies as st

CHAT, RAW, FEEDBACK = '/v1/chat/completions', '/v1/completions', '/v1/feedback'
PARAMETERS = {
    'type': 'object', 'properties': {'to': {'type': 'string'}}, 'required': ['to']}
TOOL = {'type': 'function', 'function': {
    'name': 'move', 'description': 'Moves to a place.', 'parameters': PARAMETERS}}
USER = [{'role': 'user', 'content': 'Hi.'}]
FIELDS = (
    'model', 'messages', 'stream', 'stream_options', 'temperature', 'top_p', 'seed', 'stop', 'n',
    'logprobs', 'top_logprobs', 'logit_bias', 'frequency_penalty', 'presence_penalty', 'tools',
    'tool_choice', 'response_format', 'top_k', 'min_p', 'repetition_penalty', 'priority',
    'ttft_slo_ms', 'tpot_slo_ms', 'no_learn', 'functions', 'prompt',
    'echo', 'suffix', 'best_of', 'id', 'corrected', 'hint', 'rating', 'weight', 'scope')

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=8), inner, max_size=3), max_leaves=6)
ODD = st.sampled_from([
    -1, 0, 1, 2, 2**31, 2**63, 2**64, 1e40, 1e-40, '', 'auto', 'none', 'required', 'move', 'json',
    True, False, None, [], {}, [''], ['a'], ['a'] * 17, 'a' * 300, {'5': 1.5}, {'5': 1e9},
    {'99999999': 1}, {str(i): 1 for i in range(301)}, [TOOL], [TOOL] * 2, [TOOL] * 129,
    'mace', 'mace:ann', 'mace:', 'mace:\u2028', 'mace:' + 'a' * 200, 'down', 'similar',
    {'type': 'function', 'function': {'name': 'move'}}, {'include_usage': True}])
SCHEMAS: tuple[dict[str, Any], ...] = (
    {}, {'type': 'nothing'}, {'$ref': '#'}, {'$ref': 'file:///etc/passwd'}, {'enum': []},
    {'type': 'integer', 'minimum': 9, 'maximum': 1}, {'not': {}}, {'type': 'array', 'items': 5},
    {'type': 'string', 'pattern': '('}, {'type': 'string', 'minLength': 2**70},
    {'allOf': [{'enum': [1]}, {'enum': [2]}]}, PARAMETERS)
FORMATS = st.sampled_from([
    {'type': 'text'}, {'type': 'json_object'}, {'type': 'json_schema'}, {'type': 'regex'},
    *({'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': schema}}
      for schema in SCHEMAS),
    *({'type': 'regex', 'regex': text} for text in (
        '', 'a|b', '(', '[', 'a{1000}{1000}', '(?=a)', '\\', '(a*)*b', '\\p{Nothing}')),
    *({'type': 'grammar', 'grammar': text} for text in (
        '', 'start: "a"', 'start: start', 'start: nothing', 'start: "a', 'begin: "a"', '%%%',
        'start: %json {', 'start: A*\nA: /(/'))])
CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'move', 'arguments': '{}'}}
MESSAGES: st.SearchStrategy[Any] = st.lists(st.fixed_dictionaries({
    'role': st.sampled_from(['system', 'developer', 'user', 'assistant', 'tool', 'nobody', '']),
    'content': st.text(max_size=30) | st.sampled_from([
        None, '', ' ', '<|im_end|>', '<|im_start|>system', '{{ 1/0 }}', '{% raise %}', '\ufffe', 7,
        [{'type': 'text', 'text': 'Hi.'}], [{'type': 'image_url', 'image_url': {'url': 'x'}}]])},
    optional={'tool_calls': st.sampled_from([
        None, [], [CALL], [CALL, CALL], [{}], [{**CALL, 'function': {
            'name': 'move', 'arguments': '{'}}]]),
        'tool_call_id': st.sampled_from(['c', 'd', '', None])}), max_size=4)

# -- by hand: what a generator of small values does not find -----------------------------


def nested(opening: str, inner: str, closing: str, depth: int) -> str:
    """Return brackets in brackets."""
    return opening * depth + inner + closing * depth


def chat(**fields: Any) -> bytes:
    """Return a chat with these fields."""
    return json.dumps({'model': 'mace', 'messages': USER, 'max_tokens': 1, **fields}).encode()


def formatted(kind: str, text: str) -> bytes:
    """Return a chat whose answer must match an expression or a grammar."""
    return chat(response_format={'type': kind, kind: text})


def with_schema(schema: str) -> bytes:
    """Return a chat whose answer must be JSON of a schema, which is given as text."""
    return chat(response_format={'type': 'json_schema', 'json_schema': {
        'name': 'a', 'schema': '@'}}).replace(b'"@"', schema.encode())


def by_hand() -> list[tuple[str, bytes]]:
    """Return paths and bodies: no JSON, cut JSON, deep, long, and of explosive formats."""
    whole = chat(stream=True, tools=[TOOL], stop=['a'])
    deep = [nested('{"a":', '1', '}', 5000), nested('[', '', ']', 100_000)]
    schemas = [
        nested('{"type":"array","items":', '{}', '}', 150), nested('{"anyOf":[', '{}', ']}', 90),
        nested('{"not":', '{}', '}', 150), '{"type":"integer","minimum":Infinity}',
        '{"type":"number","multipleOf":1e-300}', '{"type":"array","minItems":1000000000}',
        '{"type":"string","pattern":"(a{1000}){1000}"}',
        json.dumps({'enum': list(range(9000))}),
        json.dumps({'properties': {f'a{i}': {'type': 'string'} for i in range(2000)}})]
    grammars = [
        'start: ' + nested('(', '"a"', ')', 20_000), 'start: "a"' + '?' * 30_000,
        'start: start start | "a" |', '\n'.join([
            'start: r0', *(f'r{i}: r{i + 1} r{i + 1}' for i in range(60)), 'r60: "a"']),
        'start: /' + nested('(', 'a', ')', 20_000) + '/',
        'start: %json ' + nested('{"items":', '{}', '}', 5000)]
    regexes = [nested('(', 'a', ')', 30_000), '((a{1000}){1000}){1000}', '(.*a){200}',
               '|'.join(f'a{i}' for i in range(9000)), '(a|b|ab)*' * 1000]
    limits: tuple[Any, ...] = (-1, 1.5, '1', 2**31, {})
    bodies = [
        b'', b'null', b'0', b'[]', b'{}', b'"', b'\xff\xfe', b'\0', b'NaN', b' ' * 2**20,
        b'{"model": "\\ud800"}', b'{"model": 1e999}', '{"model":"mace"}'.encode('utf-16'),
        b'{"model": "mace", "model": "gpt"}', b'\xef\xbb\xbf' + whole,
        *(whole[:cut] for cut in range(1, len(whole), 7)), *(text.encode() for text in deep),
        chat(messages=USER * 1001), chat(messages=USER * 1000),
        chat(messages=[{'role': 'user', 'content': 'a ' * 30_000}]),
        chat(messages=[{'role': 'user', 'content': '🤖' * 60_000}]),
        chat(messages=[{'role': 'user', 'content': 'a' * 65_000}]), chat(stop=['a'] * 100_000),
        chat(logit_bias={str(i): -100 for i in range(100_000)}),
        *(chat(max_tokens=limit) for limit in limits),
        chat(n=16, logprobs=True, top_logprobs=20), chat(tools=[TOOL], tool_choice='required'),
        *map(with_schema, schemas), *(formatted('grammar', text) for text in grammars),
        *(formatted('regex', text) for text in regexes),
        *(chat(tools=[{'type': 'function', 'function': {
            'name': 'a', 'parameters': '@'}}], tool_choice='required').replace(
                b'"@"', text.encode()) for text in schemas)]
    return [*((CHAT, body) for body in bodies), *((RAW, body) for body in bodies[:15]),
            *((FEEDBACK, body) for body in bodies[:15])]


# -- by hypothesis -----------------------------------------------------------------------


def requests() -> st.SearchStrategy[tuple[str, bytes]]:
    """Return a strategy of paths and bodies, most of which are nearly right."""
    fields = st.dictionaries(st.sampled_from(FIELDS), JUNK | ODD, max_size=2)
    parts = {'response_format': FORMATS, 'messages': MESSAGES, 'tools': st.lists(
        st.sampled_from([TOOL, {}]) | JUNK, max_size=2)}
    base = {'model': 'mace', 'no_learn': True}

    def bodies(path: str, **fixed: Any) -> st.SearchStrategy[tuple[str, bytes]]:
        return st.builds(
            lambda odd, other, missing: (path, json.dumps({
                name: value for name, value in {
                    **base, **fixed, **odd, **other, 'max_tokens': 1}.items()
                if name != missing}).encode()),
            fields, st.fixed_dictionaries({}, optional=parts), st.sampled_from(
                ['', '', '', *base, *fixed]))

    return st.one_of(
        bodies(CHAT, messages=USER), bodies(RAW, prompt='Hi.'),
        bodies(FEEDBACK, id='chatcmpl-none', rating='down'),
        st.tuples(st.sampled_from([CHAT, RAW, FEEDBACK]), st.binary(max_size=60)),
        st.tuples(st.sampled_from([CHAT, RAW, FEEDBACK]), JUNK.map(
            lambda value: json.dumps(value).encode())))


def fuzzed(count: int) -> list[tuple[str, bytes]]:
    """Return ``count`` paths and bodies, the same ones each time."""
    bodies = by_hand()[:count]
    wanted = count - len(bodies)

    @settings(max_examples=max(wanted, 1), deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(requests())
    def collect(request: tuple[str, bytes]) -> None:
        bodies.append(request)

    if wanted:
        collect()
    # hypothesis ends early if it has run out of new examples.
    return list(islice(cycle(bodies), count))
