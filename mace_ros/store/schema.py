# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the journal, as the migrations that lead to them."""

# Entry n turns schema version n into n + 1. A released entry never changes.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE answers (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            query_id TEXT NOT NULL UNIQUE,
            conversation_id TEXT NOT NULL,
            profile TEXT NOT NULL,
            prompt_ids TEXT NOT NULL,
            messages TEXT NOT NULL,
            text TEXT NOT NULL,
            output_ids TEXT NOT NULL,
            adapter_version INTEGER NOT NULL,
            no_learn INTEGER NOT NULL,
            time REAL NOT NULL,
            question TEXT NOT NULL)
        """,
        "CREATE INDEX answers_conversation ON answers (conversation_id) "
        "WHERE conversation_id <> ''",
        'CREATE INDEX answers_replay ON answers (profile, question, query_id) WHERE no_learn = 0',
        """
        CREATE TABLE corrections (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            query_id TEXT NOT NULL,
            conversation_id TEXT NOT NULL,
            profile TEXT NOT NULL,
            prompt_ids TEXT NOT NULL,
            messages TEXT NOT NULL,
            rejected TEXT NOT NULL,
            corrected TEXT NOT NULL,
            weight REAL NOT NULL,
            source TEXT NOT NULL,
            received REAL NOT NULL,
            state INTEGER NOT NULL,
            reason TEXT NOT NULL,
            adapter_version INTEGER NOT NULL,
            question TEXT NOT NULL)
        """,
        'CREATE INDEX corrections_state ON corrections (state, profile)',
        'CREATE INDEX corrections_query ON corrections (query_id)',
        'CREATE INDEX corrections_question ON corrections (profile, question)',
        """
        CREATE TABLE versions (
            profile TEXT NOT NULL,
            version INTEGER NOT NULL,
            parent INTEGER NOT NULL,
            state INTEGER NOT NULL,
            reason TEXT NOT NULL,
            correction_ids TEXT NOT NULL,
            score_before REAL,
            score_after REAL,
            train_tokens INTEGER NOT NULL,
            train_seconds REAL NOT NULL,
            path TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            created REAL NOT NULL,
            PRIMARY KEY (profile, version))
        """,
        # last_version is the highest number ever reserved, so that no number is used twice.
        """
        CREATE TABLE profiles (
            profile TEXT PRIMARY KEY,
            live_version INTEGER NOT NULL DEFAULT 0,
            last_version INTEGER NOT NULL DEFAULT 0)
        """,
    ),
    (
        # The profile whose version answered; for a person's profile it may be the robot's.
        "ALTER TABLE answers ADD COLUMN lineage TEXT NOT NULL DEFAULT ''",
        'CREATE INDEX answers_question ON answers (profile, question)',
        # The robot's version that the profile's own lineage starts from; NULL: not chosen yet.
        'ALTER TABLE profiles ADD COLUMN fork INTEGER',
    ),
    (
        # Serves answer_outcomes(), which runs after each correction.
        'CREATE INDEX answers_lineage ON answers (lineage, number)',
    ),
    (
        # The base model's answers to the anchor questions, which learning must preserve.
        """
        CREATE TABLE base_answers (
            prompt_ids TEXT PRIMARY KEY,
            output_ids TEXT NOT NULL,
            model TEXT NOT NULL)
        """,
    ),
    (
        # The robot's version that this version's lineage started from.
        'ALTER TABLE versions ADD COLUMN fork INTEGER',
        'UPDATE versions SET fork = '
        '(SELECT fork FROM profiles WHERE profiles.profile = versions.profile)',
    ),
    (
        # '': that of the parameter adapter.scope.
        "ALTER TABLE corrections ADD COLUMN scope TEXT NOT NULL DEFAULT ''",
        # The learned correction that an answer drew on.
        "ALTER TABLE answers ADD COLUMN matched_correction_id TEXT NOT NULL DEFAULT ''",
        # Whether a live version of the answer's profile, or the robot's, was passed over.
        'ALTER TABLE answers ADD COLUMN out_of_scope INTEGER NOT NULL DEFAULT 0',
    ),
    (
        # How to answer instead, if the right answer is not given.
        "ALTER TABLE corrections ADD COLUMN hint TEXT NOT NULL DEFAULT ''",
    ),
    (
        # The version whose weights this one's training began from; 0: a fresh adapter.
        'ALTER TABLE versions ADD COLUMN continues INTEGER NOT NULL DEFAULT 0',
        'UPDATE versions SET continues = parent',
    ),
    (
        # What the prompt offers, without which the question can't be put in other words.
        "ALTER TABLE answers ADD COLUMN tools TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE corrections ADD COLUMN tools TEXT NOT NULL DEFAULT '[]'",
        'ALTER TABLE answers ADD COLUMN calls_tool INTEGER NOT NULL DEFAULT 0',
        'CREATE INDEX answers_tool_calls ON answers (profile, number) WHERE calls_tool = 1',
    ),
    (
        # Of the question to that of the nearest correction.
        'ALTER TABLE answers ADD COLUMN similarity REAL NOT NULL DEFAULT 0',
        # An earlier correction of the same question in other words.
        "ALTER TABLE corrections ADD COLUMN replaces TEXT NOT NULL DEFAULT ''",
    ),
    (
        # Whether the version was trained to answer every question.
        'ALTER TABLE versions ADD COLUMN everywhere INTEGER NOT NULL DEFAULT 0',
        # A profile's versions begin from what the robot has live then.
        'ALTER TABLE profiles DROP COLUMN fork',
        'ALTER TABLE versions DROP COLUMN fork',
    ),
    (
        # Questions of deleted corrections, which versions that learned them may still know.
        """
        CREATE TABLE deleted_questions (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            profile TEXT NOT NULL,
            wording TEXT NOT NULL,
            UNIQUE (profile, wording))
        """,
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)
