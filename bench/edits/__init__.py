# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Knowledge editing: a correction changes what it is about, and nothing else.

The questions and answers are those of others (--data: ZsRE, CounterFact, WikiBigEdit, QAEdit and
files like them). Answers are decoded freely: greedy, 32 tokens, cut at "." or newline, normalised
as in SQuAD, compared word for word. The same edits are taught to baselines on the same model.
Results: bench/results/edits.json.
"""
