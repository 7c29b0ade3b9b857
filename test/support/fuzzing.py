# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Messages and parameter values that are mostly invalid."""

from __future__ import annotations

import math
import random

import mace_ros.msg as msg
from mace_ros.msg import Response

from mace_ros.api.settings import Parameter


def bounds(parameter: Parameter) -> tuple[list[object], list[object]]:
    """Return allowed values, and values that must be refused."""
    wrong: list[object] = ['text', True, 1, 1.0, [1, 2]]
    wrong = [w for w in wrong if type(w) is not type(parameter.default)]
    if parameter.choices:
        return list(parameter.choices), [*wrong, 'no such choice', '']
    if parameter.minimum is None or parameter.maximum is None:
        return [parameter.default], wrong
    kind = type(parameter.default)
    low, high = kind(parameter.minimum), kind(parameter.maximum)
    beyond = ([low - 1, high + 1] if kind is int else
              [math.nextafter(low, -math.inf) - 1e-6, high * 1.001 + 1e-6,
               math.inf, -math.inf, math.nan])
    return [low, high], [*wrong, *beyond]


ALPHABETS = ('abc XYZ.,?', 'äöü ß é', 'こんにちは ロボット', '🤖👋🏽 ', '\x00\n\t\x07 \u202e\ufeff')
NUMBERS = (-1.0, 0.0, 1.0, 0.5, -0.5, 1e30, math.nan, math.inf, -math.inf)
INTEGERS = (-1, 0, 1, 2, -5, -2**31, 2**31 - 1)


class Fuzzer:
    """Makes messages that are mostly invalid, the same ones in each run."""

    def __init__(self, answered: Response, name: str) -> None:
        self._random = random.Random(4)
        self._answered = answered
        self._name = name       # in its ids: a test's cancellations must not reach another's

    def text(self) -> str:
        # Few are of the maximum length, or longer.
        length = self._random.choice((0, 1, 5, 20, 20, 100, 300) * 20 + (65536, 65537))
        return ''.join(self._random.choices(self._random.choice(ALPHABETS), k=length))

    def id(self) -> str:
        kind = self._random.randrange(6)
        if kind == 0:
            return ''
        if kind == 1:
            return (self._name + self.text())[:200]
        return f'{self._name} {self._random.randrange(300)}'     # often used twice

    def query(self) -> msg.Query:
        pick = self._random.choice
        return msg.Query(
            id=self.id(), conversation_id=pick(('', 'a', self.id())), profile=pick(('', '', '\n')),
            system=pick(('', self.text())), text=self.text(), max_tokens=pick((0, 1, 1, 2, -5)),
            temperature=pick(NUMBERS), top_p=pick(NUMBERS), seed=pick(INTEGERS),
            stop=pick(([], [], [self.text()], ['a'] * 20)), ttft_slo_ms=pick(NUMBERS),
            tpot_slo_ms=pick(NUMBERS), priority=pick(INTEGERS),
            reset_conversation=pick((False, True)), no_learn=True,
            **(self._sampling() if self._random.random() < 0.3 else {}))

    def _sampling(self) -> dict[str, object]:
        pick = self._random.choice
        odd = pick(({}, {'min_p': pick(NUMBERS)}, {'repetition_penalty': pick(NUMBERS)},
                    {'frequency_penalty': pick(NUMBERS)}, {'presence_penalty': pick(NUMBERS)},
                    {'top_k': 2**31 - 1}, {'logprobs': 255}, {'n': 0}, {'response_format': 255},
                    {'logit_bias_tokens': [1, 2**31 - 1], 'logit_bias_values': [1.0, math.nan]}))
        return {'top_k': pick((-1, 0, 5)), 'logprobs': pick((0, 3)), 'n': pick((1, 2)),
                'logit_bias_tokens': [5], 'logit_bias_values': [1.0],
                'response_format': pick((0, 0, 1, 2, 3, 4)),
                'response_schema': pick(('', '', '{}', 'a|b', '(', self.text())), **odd}

    def correction(self) -> msg.Correction:
        pick = self._random.choice
        return msg.Correction(
            id=self.id(), query_id=pick(('', self.id(), self._answered.query_id)),
            conversation_id=pick(('', 'a', self.id())), prompt=pick(('', self.text())),
            rejected=pick(('', self.text())), corrected=self.text(),
            profile=pick(('', '\n')), weight=pick(NUMBERS), source=self.text())

    def cancel(self) -> msg.Cancel:
        return msg.Cancel(query_id=self.id())
