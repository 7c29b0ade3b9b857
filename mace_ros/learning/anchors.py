# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The anchors: questions whose answers by the base model learning must not change.

They are short, of many kinds, and represent all questions without a correction: training protects
questions of a kind that is among them best. The base model answers them once. None of them is
measured by bench.learning.
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
    'Recommend a book for a child.', 'How does a magnet work?', 'What are clouds made of?',
    'What is the capital of Colombia?', 'What is the capital of Mexico?',
    'What is the capital of Chile?', 'What is the capital of Nigeria?',
    'What is the capital of Vietnam?', 'What is the capital of Morocco?',
    'What is the capital of Scotland?', 'What is the capital of New Zealand?',
    'What is the capital of Romania?', 'What is the capital of Pakistan?',
    'Which planet is the smallest?', 'Which planet is the hottest?',
    'How many planets are in the solar system?', 'How many oceans are there?',
    'How many colours are in a rainbow?', 'How many bones does a person have?',
    'How many sides does a hexagon have?', 'How many seconds are in a minute?',
    'How many wheels does a bicycle have?', 'How many weeks are in a year?',
    'How many states does Germany have?', 'Who wrote Faust?', 'Who wrote Pride and Prejudice?',
    'Who wrote Oliver Twist?', 'Who wrote The Iliad?', 'Who wrote Robinson Crusoe?',
    'Who wrote Alice in Wonderland?', 'Who wrote The Raven?', 'Who painted The Last Supper?',
    'Who painted The Scream?', 'Who painted Water Lilies?',
    'Who painted Girl with a Pearl Earring?', 'Who composed the Messiah?',
    'Who composed Swan Lake?', 'Who composed the Blue Danube?', 'Who invented the light bulb?',
    'Who invented the printing press?', 'Who invented the radio?', 'Who built the first car?',
    'Who discovered oxygen?', 'Who discovered X-rays?', 'Who discovered the electron?',
    'Who was Napoleon?', 'Who was Julius Caesar?', 'Who was Isaac Newton?',
    'Who was Florence Nightingale?', 'Who was the first woman in space?',
    'Who was Abraham Lincoln?', 'In which country is Stonehenge?', 'In which country is Petra?',
    'In which country is Angkor Wat?', 'In which country is the Leaning Tower?',
    'In which city is the Brandenburg Gate?', 'In which city is the Kremlin?',
    'In which city is the Golden Gate Bridge?', 'On which continent is Norway?',
    'On which continent is Chile?', 'On which continent is Thailand?',
    'What language is spoken in Iran?', 'What language is spoken in Peru?',
    'What language is spoken in Egypt?', 'What language is spoken in Quebec?',
    'What is the currency of Switzerland?', 'What is the currency of Russia?',
    'What is the currency of Brazil?', 'What is the opposite of early?',
    'What is the opposite of empty?', 'What is the opposite of young?',
    'What is the past tense of run?', 'What is the plural of tooth?', 'What is five times six?',
    'What is twelve minus four?', 'What is the chemical symbol of sodium?',
    'What is the chemical symbol of carbon?', 'What is the largest animal on land?',
    'What is the largest country?', 'What is the longest river in Europe?',
    'What is the highest mountain in Africa?', 'What is the largest lake in Africa?',
    'What is the smallest bird?', 'What is bread made of?', 'What is cheese made from?',
    'What is steel made of?', 'What do rabbits eat?', 'What do fish breathe with?',
    'What colour is a lemon?', 'What colour is snow?', 'What colour are carrots?',
    'Which animal gives wool?', 'Which animal is known for its stripes?',
    'Which organ do we think with?', 'Which gas do we breathe out?',
    'Which month is the shortest?', 'Which day comes after Friday?',
    'Which sea lies between Europe and Africa?', 'Which metal is attracted by a magnet?',
    'What is the freezing point of water?', 'What is gravity?', 'What is photosynthesis?',
    'What is an atom?', 'What is a noun?', 'What is a continent?', 'What is a telescope used for?',
    'What does a baker do?')

# Maximum length of an anchor's answer.
ANCHOR_TOKENS = 24

# One anchor in this many is a probe that the gate guards; the others are replayed. A probe must
# not be replayed: it would be memorised, and no longer represent other answers.
PROBE_EVERY = 4
