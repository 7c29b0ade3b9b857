# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling: transformers' logits processors are the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mace_ros.model.logit_changes import LogitChanges
from mace_ros.model.sampling import Row, sample, Sampling

VOCABULARY = 1500       # more than the candidates of any top_k
DRAWS = 2000


def logits_of(rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    return sample(logits.clone(), rows).tokens.tolist()


def mask_of(*allowed: int) -> bytes:
    bits = np.zeros(-(-VOCABULARY // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder='little').tobytes()


def test_greedy_rows_take_the_best_token() -> None:
    logits = logits_of(5)
    assert tokens(logits, [Row(Sampling())] * 5) == logits.argmax(-1).tolist()
    mixed = [Row(Sampling()), Row(Sampling(temperature=1.0, seed=3))] * 2 + [Row(Sampling())]
    assert tokens(logits, mixed)[::2] == logits.argmax(-1)[::2].tolist()


@pytest.mark.parametrize('values', [
    {}, {'temperature': 0.6}, {'top_k': 1}, {'top_k': 7}, {'top_k': 64}, {'top_k': 100},
    {'top_p': 0.8}, {'top_p': 0.01}, {'min_p': 0.05}, {'min_p': 1.0},
    {'temperature': 1.7, 'top_k': 50, 'top_p': 0.9, 'min_p': 0.02},
    {'temperature': 0.3, 'top_k': 1000, 'top_p': 0.95}], ids=str)
def test_draws_have_the_distribution_of_transformers(values: dict[str, float]) -> None:
    logits = logits_of(1)
    given = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, **values}
    warpers = LogitsProcessorList([TemperatureLogitsWarper(given['temperature'])])
    if given['top_k']:
        warpers.append(TopKLogitsWarper(given['top_k']))
    if given['top_p'] < 1.0:
        warpers.append(TopPLogitsWarper(given['top_p']))
    if given['min_p']:
        warpers.append(MinPLogitsWarper(given['min_p']))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone())[0].softmax(-1)
    rows = [Row(Sampling(**given, seed=seed)) for seed in range(DRAWS)]
    drawn = torch.bincount(torch.tensor(tokens(logits.expand(DRAWS, -1), rows)),
                           minlength=VOCABULARY)
    assert not drawn[expected == 0].any()
    # Five standard deviations of the count of each token that is drawn often enough.
    mean = expected * DRAWS
    often = mean > 5
    assert ((drawn - mean).abs()[often] < 5 * mean[often].sqrt()).all()
    assert abs(int(drawn[~often].sum()) - float(mean[~often].sum())) < 5 * math.sqrt(DRAWS)


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    kinds = [Sampling(1.0), Sampling(0.8, 0.9), Sampling(1.0, top_k=40), Sampling(1.2, top_k=500),
             Sampling(1.0, min_p=0.1), Sampling(), Sampling(1.0, 0.7, top_k=1000),
             Sampling(1.0, changes=LogitChanges(frequency_penalty=1.0)),
             Sampling(1.0, alternatives=3)]
    rows = [Row(replace(kind, seed=seed), ids=[1, 2, seed], prompt_tokens=2)
            for seed in range(20) for kind in kinds]
    logits = logits_of(len(rows), spread=1.0)
    together = tokens(logits, rows)
    assert together == [tokens(logits[i:i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together[::-1] == tokens(logits.flip(0), rows[::-1])


def test_position_and_seed_decide_the_draw() -> None:
    logits = logits_of(1, spread=0.1).expand(300, -1)
    by_seed = tokens(logits, [Row(Sampling(1.0, seed=s)) for s in range(-150, 150)])
    by_place = tokens(logits, [Row(Sampling(1.0), ids=[0] * n) for n in range(300)])
    for drawn in (by_seed, by_place):
        assert len(set(drawn)) > 250
    assert len(set(zip(by_seed, by_place, strict=True))) == 300


@pytest.mark.parametrize('sampling', [Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, 0.999)])
def test_two_tokens_are_drawn_by_their_probabilities(sampling: Sampling) -> None:
    logits = torch.full((5000, VOCABULARY), -torch.inf)
    logits[:, [3, 700]] = torch.tensor([0.2, 0.8]).log()
    drawn = tokens(logits, [Row(replace(sampling, seed=seed)) for seed in range(5000)])
    assert set(drawn) == {3, 700}
    assert drawn.count(3) == pytest.approx(1000, abs=5 * math.sqrt(800))


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """A flat distribution, whose logits differ in their last bits from batch to batch."""
    logits = logits_of(DRAWS, spread=0.5)
    rounded = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator()))
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=1000), Sampling(1.0, 0.9)):
        rows = [Row(replace(sampling, seed=seed)) for seed in range(DRAWS)]
        changed = np.not_equal(tokens(logits, rows), tokens(rounded, rows))
        assert changed.sum() <= 2


def test_a_tiny_temperature_and_a_tiny_top_p_are_greedy() -> None:
    logits = logits_of(4)
    rows = [Row(Sampling(temperature=1e-38)), Row(Sampling(1.0, top_p=0.0)),
            Row(Sampling(1e-38, 0.5)), Row(Sampling(1e-38, top_k=3))]
    assert tokens(logits, rows) == logits.argmax(-1).tolist()


# -- changes of logits ---------------------------------------------------------------------


def test_repetition_is_penalised_as_by_transformers() -> None:
    logits, changed = logits_of(3), logits_of(3)
    histories = [[5, 6, 7, 5], [900], [5, 1499, 3]]
    rows = [Row(Sampling(changes=LogitChanges(repetition_penalty=p)), ids, 2)
            for p, ids in zip((1.3, 1.0, 0.7), histories, strict=True)]
    sample(changed, rows)
    for i, (row, ids) in enumerate(zip(rows, histories, strict=True)):
        reference = RepetitionPenaltyLogitsProcessor(row.sampling.changes.repetition_penalty)
        assert torch.equal(changed[i], reference(torch.tensor([ids]), logits[i:i + 1].clone())[0])


def test_output_tokens_are_penalised_by_their_number_and_their_presence() -> None:
    logits, changed = logits_of(2), logits_of(2)
    penalties = LogitChanges(
        frequency_penalty=0.5, presence_penalty=-1.5, bias=((9, 3.0), (8, -4.0)))
    sample(changed, [Row(Sampling(changes=penalties), [1, 2, 3, 3, 2, 3, 8], 3), Row(Sampling())])
    difference = torch.zeros(VOCABULARY)
    difference[[3, 2, 8, 9]] = torch.tensor([-1.0 + 1.5, -0.5 + 1.5, -0.5 + 1.5 - 4.0, 3.0])
    torch.testing.assert_close(changed[0], logits[0] + difference)
    assert torch.equal(changed[1], logits[1])


@pytest.mark.parametrize('sampling', [
    Sampling(), Sampling(1.0), Sampling(1.0, 0.9), Sampling(1.0, top_k=50),
    Sampling(5.0, min_p=0.3)])
def test_only_tokens_of_the_mask_are_sampled(sampling: Sampling) -> None:
    logits = logits_of(200)
    allowed = [0, 7, 8, 31, 32, 1000, VOCABULARY - 1]
    rows = [Row(replace(sampling, seed=n), mask=mask_of(*allowed))
            for n in range(200)]
    rows[::2] = [Row(row.sampling) for row in rows[::2]]
    drawn = tokens(logits, rows)
    assert set(drawn[1::2]) <= set(allowed)
    assert len(set(drawn[1::2])) > 3
    free = [tokens(logits[i:i + 1], [rows[i]])[0] for i in range(0, 200, 2)]
    assert drawn[::2] == free


# -- log-probabilities ---------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = logits_of(4)
    expected = logits.log_softmax(-1)
    changes = LogitChanges(bias=((3, 100.0),))
    found = sample(logits.clone(), [
        Row(Sampling()), Row(Sampling(alternatives=0)),
        Row(Sampling(2.0, changes=changes, alternatives=5)), Row(Sampling(1.0, alternatives=2))])
    drawn, scores = found.tokens.tolist(), found.scores()
    assert drawn[2] == 3
    assert sorted(scores) == [1, 2, 3]
    for row, count in ((1, 0), (2, 5), (3, 2)):
        assert scores[row].logprob == pytest.approx(float(expected[row, drawn[row]]), rel=1e-5)
        best = expected[row].topk(count)
        assert [token for token, _ in scores[row].best] == best.indices.tolist()
        assert [value for _, value in scores[row].best] == pytest.approx(best.values.tolist())
