-- Schema version 3: webhooks. What a task's end, start and outputs owe to a client, as rows of the same transaction.
-- Runs inside one transaction, on a database of version 2.
--
--                claim, settle, cancel             2xx
--   (no row) ─────────────────────────▶ pending ─────────▶ delivered
--                                       ▲ │ ▲ │ ─────────▶ failed      all tries are used up
--                                       │ └─┘ │ ─────────▶ gone        410
--                                       │ again, at `next_at`
--                                       └───────────────── redeliver
--
--   pending     `next_at` says when it is tried next
--   the others  `ended_at` says since when nothing more is tried

-- Where the client wants to hear of its task, and of what; NULL is nowhere.
ALTER TABLE tasks ADD COLUMN webhook TEXT CHECK (webhook GLOB '{*}');

-- A task as it was when it owed something: a value of `tasks.py` as JSON, so a field there is never renamed without
-- a migration. One row serves every delivery of one transition.
CREATE TABLE subjects (
    number INTEGER PRIMARY KEY,
    task   INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    value  BLOB    NOT NULL
) STRICT;
CREATE INDEX subjects_task ON subjects (task);

CREATE TABLE deliveries (
    number     INTEGER PRIMARY KEY,  -- the order in which they became owed
    id         TEXT    NOT NULL UNIQUE,  -- made from the task, its `seq` and the event: one event is owed once
    task       INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    key_id     TEXT    CHECK (key_id <> ''),  -- the task's, which never changes: lists go by it
    type       TEXT    NOT NULL
               CHECK (type IN ('task.started', 'task.output', 'task.completed', 'task.failed', 'task.canceled')),
    output     INTEGER CHECK (output >= 0),
    url        TEXT    NOT NULL CHECK (url <> ''),
    endpoint   TEXT    NOT NULL CHECK (endpoint <> ''),
    subject    INTEGER NOT NULL REFERENCES subjects (number),
    created_at INTEGER NOT NULL,
    status     TEXT    NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed', 'gone')),
    next_at    INTEGER,
    round      INTEGER NOT NULL DEFAULT 0 CHECK (round >= 0),
    ended_at   INTEGER,
    CHECK ((type = 'task.output') = (output IS NOT NULL)),
    CHECK ((status = 'pending') = (next_at IS NOT NULL)),
    CHECK ((status = 'pending') = (ended_at IS NULL))
) STRICT;

-- What is due, the longest waiting first; and the same by endpoint, to step over one that has many waiting.
-- `status` stands in both for the reason that stands at `tasks_queue`.
CREATE INDEX deliveries_due ON deliveries (next_at, number, endpoint, status) WHERE status = 'pending';
CREATE INDEX deliveries_endpoint ON deliveries (endpoint, next_at, number, status) WHERE status = 'pending';
-- Lists, newest first: every index ends in `number`, the rowid.
CREATE INDEX deliveries_task ON deliveries (task);
CREATE INDEX deliveries_status ON deliveries (status);
CREATE INDEX deliveries_key ON deliveries (key_id) WHERE key_id IS NOT NULL;
-- For the foreign key alone.
CREATE INDEX deliveries_subject ON deliveries (subject);

CREATE TABLE delivery_tries (
    delivery    INTEGER NOT NULL REFERENCES deliveries (number) ON DELETE CASCADE,
    number      INTEGER NOT NULL CHECK (number > 0),
    at          INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL CHECK (duration_ms >= 0),
    status      INTEGER,
    error       TEXT,
    PRIMARY KEY (delivery, number),
    CHECK (status IS NOT NULL OR error IS NOT NULL)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER deliveries_edges BEFORE UPDATE OF status ON deliveries
WHEN OLD.status <> 'pending' AND NEW.status NOT IN ('pending', OLD.status)
BEGIN SELECT RAISE(ABORT, 'an ended delivery can only become pending again'); END;
