# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node under stress as a robot sees it: a real node and real messages.

Two hundred queries arrive in one second while corrections wait to be learned. Measured are
whether each gets its response, and whether other callbacks (a 10 Hz timer, reading a
parameter) are served in time; how soon an answer ends that is interrupted; what a client
costs that watches the node ten times a second; and what OpenAI's API over HTTP adds, and
withstands. Results: bench/results/operation.json.
"""
