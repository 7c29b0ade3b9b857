# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Learning a correction: how soon, how well, and how it changes other answers.

The benchmark has three parts. ``one``: several idle robots learn corrections one after the
other, each to a live answer. ``forty``: one robot learns many in a row. ``drift``: a trace of
questions with shifting topics, under several policies. Results: bench/results/learning.json.
"""
