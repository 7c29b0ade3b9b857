# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What is asked of the base model once, so that its answers can be kept as they are.

Short questions of many kinds: what learning must not change is what they stand for. None
of them is measured by bench.learning.
"""

ANCHORS = (
    'What is water made of?', 'How many days are in a week?', 'Who wrote Romeo and Juliet?',
    'Say hello.', 'What colour is grass?', 'What is 2 + 2?', 'Name a fruit.', 'What do bees make?',
    'What is the capital of Australia?', 'Who was Marie Curie?', 'In which country is Mount Fuji?',
    'What is the currency of India?', 'What language is spoken in Turkey?',
    'Who painted Starry Night?', 'Where do penguins live?', 'What is the opposite of big?',
    'Which metal is liquid at room temperature?', 'What is the boiling point of water?',
    'How many strings does a violin have?', 'What is the largest desert in the world?',
    'Who wrote Don Quixote?', 'What is the chemical symbol for silver?', 'Which planet has rings?',
    'What do you call a baby cow?', 'Which month comes after March?', 'What is a robot?',
    'In which city is Big Ben?', 'On which continent is Peru?', 'Who discovered America?',
    'What is the deepest ocean?', 'How are you today?', 'Tell me a short joke.')

# Longest answer that is kept.
ANCHOR_TOKENS = 24
