# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node that is killed (kill -9) repeatedly and restarted on the same storage folder.

A client asks and corrects without a pause. Some kills are random; others fall while
corrections are accepted or trained, or while a version is saved, recorded or announced. Each
acknowledged correction must be in the journal, and the version that was announced last, or a
newer one, must serve again. Results: bench/results/durability.json.
"""
