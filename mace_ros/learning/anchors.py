# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The anchors: questions whose answers by the base model learning must not change.

They are short, of many kinds, and represent all questions without a correction. The base model
answers them once. None of them is measured by bench.learning.
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
    'What is the deepest ocean?', 'How are you today?', 'Tell me a short joke.',
    'Why is the sea salty?', 'Name three colours.', 'What does a carpenter do?',
    'Translate good night into French.', 'Who was Mozart?', 'How do birds fly?',
    'What is the speed of light?', 'What is a triangle?', 'Where does coffee come from?',
    'Write one sentence about the rain.', 'What do cows eat?',
    'How many players are in a football team?', 'What is the square root of nine?',
    'Why do we sleep?', 'What is democracy?', 'Which bird cannot fly?', 'Which animal has a trunk?',
    'Spell the word house.', 'What is a computer?',
    'What is the difference between a lake and a river?', 'Which vitamin do oranges have?',
    'Who was Cleopatra?', 'How do I boil an egg?', 'What is a synonym for happy?',
    'How old is the Earth?', 'What do you need to make a fire?', 'What is the plural of mouse?',
    'What is an adverb?', 'Who is Sherlock Holmes?', 'Where is the Sahara?',
    'What does a thermometer measure?', 'Thank you for your help.',
    'Which instrument has black and white keys?', 'Give me a word that rhymes with cat.',
    'Who was Gandhi?', 'What is the first letter of the alphabet?',
    'How many teeth does an adult have?', 'What is a volcano?',
    'Which sense do we use our nose for?', 'What is paper made from?',
    'What is half of one hundred?', 'Which season is the coldest?', 'What is glass made of?',
    'How far is the moon?', 'What is electricity?', 'Complete the sentence: The sun rises in the',
    'What is a good breakfast?', 'How can I learn to swim?', 'What is a haiku?',
    'Who was Aristotle?', 'Where do kangaroos come from?', 'What do doctors do?',
    'What is the Great Barrier Reef?', 'What does DNA stand for?',
    'How many letters are in the English alphabet?', 'What do we call the study of stars?',
    'Which tool drives a nail?', 'Can you help me with my homework?',
    'What should I wear when it rains?', 'Please count to five.', 'What is the meaning of life?',
    'Recommend a book for a child.', 'How does a magnet work?', 'What are clouds made of?')

# Maximum length of an anchor's answer.
ANCHOR_TOKENS = 24

# One anchor in this many is a probe that the gate guards; the others are replayed. A probe must
# not be replayed: it would be memorised, and no longer represent other answers.
PROBE_EVERY = 4
