-- The durable queue, schema version 1: the task machine as tables that refuse every row which is not in it.
-- Runs inside one transaction, on an empty database. A later version is a file of its own; this one stays.
--
--            add             claim                    settle
--   (none) ───────▶ queued ─────────▶ running ─────────────────────▶ succeeded | failed | canceled
--                   ▲ ▲ │                │                             │       ▲
--                   │ │ │                │ settle: again, at           │       │
--                   │ │ └────────────────┼──────── cancel ─────────────┼───────┘
--                   │ └──────────────────┘ `available_at`              │ retry: a new place in the queue
--                   └──────────────────────────────────────────────────┘ delete: the row goes, and all of its own
--
--   attempt: claimed ─▶ submitting ─▶ submitted ─▶ collected ─▶ settled   (may skip, never goes back)
--
--   queued      no live attempt, nobody has asked to cancel
--   running     exactly one live attempt (`ended_at IS NULL`)
--   terminal    `completed_at` is set, no live attempt; `failed` and only that has an error
--
-- JSON is written by comfyd alone; its columns are only looked at from outside, because SQLite's json_valid is
-- not allowed in a schema that is not trusted.
--
-- Times are UTC milliseconds. They are not compared with each other here: a clock that is set back must not
-- stop the queue.

-- The last `seq` that was given. A counter and not the largest `seq` in the table: a deleted task's is not reused.
CREATE TABLE sequence (
    one  INTEGER PRIMARY KEY CHECK (one = 1),
    last INTEGER NOT NULL CHECK (last >= 0)
) STRICT;
INSERT INTO sequence VALUES (1, 0);

CREATE TRIGGER sequence_rises BEFORE UPDATE ON sequence WHEN NEW.last <= OLD.last
BEGIN SELECT RAISE(ABORT, 'the sequence only rises'); END;

CREATE TABLE tasks (
    number              INTEGER PRIMARY KEY,  -- the first `seq`: the order of creation, for ever
    id                  TEXT    NOT NULL UNIQUE,
    seq                 INTEGER NOT NULL UNIQUE,  -- the place among its equals; a new one on retry
    status              TEXT    NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'canceled')),
    priority            INTEGER NOT NULL CHECK (priority BETWEEN -1000 AND 1000),
    workflow            TEXT,
    shape               TEXT    NOT NULL,
    nodes_total         INTEGER NOT NULL CHECK (nodes_total >= 0),
    policy              TEXT    NOT NULL CHECK (policy GLOB '{*}'),
    output              TEXT    NOT NULL CHECK (output GLOB '{*}'),
    key_id              TEXT    CHECK (key_id <> ''),
    created_at          INTEGER NOT NULL,
    available_at        INTEGER NOT NULL,
    started_at          INTEGER,
    completed_at        INTEGER,
    cancel_requested_at INTEGER,
    attempt_count       INTEGER NOT NULL DEFAULT 0 CHECK (attempt_count >= 0),
    failures            INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    suspects            INTEGER NOT NULL DEFAULT 0 CHECK (suspects >= 0),
    strays              INTEGER NOT NULL DEFAULT 0 CHECK (strays >= 0),
    error               TEXT    CHECK (error GLOB '{*}'),
    CHECK ((status IN ('succeeded', 'failed', 'canceled')) = (completed_at IS NOT NULL)),
    CHECK ((status = 'failed') = (error IS NOT NULL)),
    CHECK (status IN ('queued', 'canceled') OR (started_at IS NOT NULL AND attempt_count > 0)),
    CHECK (status <> 'queued' OR cancel_requested_at IS NULL)
) STRICT;

-- The scan for the next task: this index alone, in its own order. `status` stands in it because older SQLite looks
-- the condition up in the table again, although the index holds nothing else.
CREATE INDEX tasks_queue ON tasks (priority DESC, seq, available_at, id, status) WHERE status = 'queued';
-- When the next waiting task becomes ready.
CREATE INDEX tasks_due ON tasks (available_at, status) WHERE status = 'queued';
-- What retention takes next.
CREATE INDEX tasks_ended ON tasks (completed_at) WHERE completed_at IS NOT NULL;
-- Lists, newest first: every index ends in `number`, the rowid.
CREATE INDEX tasks_status ON tasks (status);
CREATE INDEX tasks_workflow ON tasks (workflow) WHERE workflow IS NOT NULL;
CREATE INDEX tasks_key ON tasks (key_id) WHERE key_id IS NOT NULL;

-- What is large and is read only for one task at a time. `inputs` first: it is read without the graph.
CREATE TABLE payloads (
    task       INTEGER PRIMARY KEY REFERENCES tasks (number) ON DELETE CASCADE,
    inputs     BLOB,
    extra_data BLOB NOT NULL,
    graph      BLOB NOT NULL
) STRICT;

CREATE TABLE metadata (
    task  INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    key   TEXT    NOT NULL,
    value TEXT    NOT NULL,
    PRIMARY KEY (task, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX metadata_pair ON metadata (key, value, task);

CREATE TABLE attempts (
    id              TEXT    PRIMARY KEY,
    task            INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    number          INTEGER NOT NULL CHECK (number > 0),
    step            TEXT    NOT NULL
                    CHECK (step IN ('claimed', 'submitting', 'submitted', 'collected', 'settled')),
    claimed_at      INTEGER NOT NULL,
    backend         TEXT,
    client_id       TEXT,
    intent_at       INTEGER,
    accepted_at     INTEGER,
    seen_running_at INTEGER,
    executed_at     INTEGER,
    execution_ms    INTEGER CHECK (execution_ms >= 0),
    collected       TEXT    NOT NULL DEFAULT '[]' CHECK (collected GLOB '[[]*]'),
    ended_at        INTEGER,
    outcome         TEXT,
    error           TEXT    CHECK (error GLOB '{*}'),
    UNIQUE (task, number),
    CHECK ((step = 'settled') = (ended_at IS NOT NULL)),
    CHECK ((outcome IS NOT NULL) = (ended_at IS NOT NULL)),
    CHECK (error IS NULL OR ended_at IS NOT NULL),
    -- The intent is on disk before ComfyUI is asked, and says whom and as whom.
    CHECK (step IN ('claimed', 'settled')
           OR (intent_at IS NOT NULL AND backend IS NOT NULL AND client_id IS NOT NULL))
) STRICT;

-- One live attempt per task.
CREATE UNIQUE INDEX attempts_live ON attempts (task) WHERE ended_at IS NULL;

CREATE TABLE artefacts (
    task         INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    position     INTEGER NOT NULL CHECK (position >= 0),
    node_id      TEXT    NOT NULL,
    "index"      INTEGER NOT NULL CHECK ("index" >= 0),
    name         TEXT    NOT NULL,
    type         TEXT    NOT NULL CHECK (type IN ('image', 'video', 'audio', 'text', 'latent', 'file')),
    content_type TEXT    NOT NULL,
    size_bytes   INTEGER NOT NULL CHECK (size_bytes >= 0),
    sha256       TEXT    NOT NULL CHECK (length(sha256) = 64),
    key          TEXT    NOT NULL CHECK (key <> ''),
    storage      TEXT    NOT NULL,
    width        INTEGER,
    height       INTEGER,
    duration     REAL,
    text         TEXT,
    PRIMARY KEY (task, position),
    UNIQUE (task, node_id, "index")
) STRICT;

-- `owner` is the id of the API key that the request came with; '' is none (an id is never empty).
CREATE TABLE idempotency (
    owner       TEXT    NOT NULL,
    key         TEXT    NOT NULL,
    body_sha256 TEXT    NOT NULL,
    task        INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (owner, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_task ON idempotency (task);

CREATE TABLE run_times (
    shape   TEXT    PRIMARY KEY,
    runs    INTEGER NOT NULL CHECK (runs > 0),
    mean_ms REAL    NOT NULL CHECK (mean_ms >= 0)
) STRICT, WITHOUT ROWID;

-- Over all shapes: the runs, and the sum of each shape's runs times its mean.
CREATE TABLE run_totals (
    one         INTEGER PRIMARY KEY CHECK (one = 1),
    runs        INTEGER NOT NULL CHECK (runs >= 0),
    weighted_ms REAL    NOT NULL
) STRICT;
INSERT INTO run_totals VALUES (1, 0, 0.0);

-- How many tasks have each status, kept by the triggers below: to count a million rows took 70 ms.
CREATE TABLE status_counts (
    status TEXT    PRIMARY KEY,
    tasks  INTEGER NOT NULL CHECK (tasks >= 0)
) STRICT, WITHOUT ROWID;
INSERT INTO status_counts VALUES ('queued', 0), ('running', 0), ('succeeded', 0), ('failed', 0), ('canceled', 0);

CREATE TRIGGER tasks_counted_in AFTER INSERT ON tasks
BEGIN UPDATE status_counts SET tasks = tasks + 1 WHERE status = NEW.status; END;

CREATE TRIGGER tasks_counted_over AFTER UPDATE OF status ON tasks WHEN NEW.status <> OLD.status
BEGIN
    UPDATE status_counts SET tasks = tasks - 1 WHERE status = OLD.status;
    UPDATE status_counts SET tasks = tasks + 1 WHERE status = NEW.status;
END;

CREATE TRIGGER tasks_counted_out AFTER DELETE ON tasks
BEGIN UPDATE status_counts SET tasks = tasks - 1 WHERE status = OLD.status; END;

-- The edges of the machine. A claim inserts its attempt first, a settlement ends its attempt first.
CREATE TRIGGER tasks_begin BEFORE INSERT ON tasks WHEN NEW.status <> 'queued' OR NEW.attempt_count <> 0
BEGIN SELECT RAISE(ABORT, 'a task begins queued'); END;

CREATE TRIGGER tasks_edges BEFORE UPDATE OF status ON tasks
WHEN NEW.status <> OLD.status AND NOT (
    (OLD.status = 'queued' AND NEW.status IN ('running', 'canceled'))
    OR (OLD.status = 'running')
    OR (OLD.completed_at IS NOT NULL AND NEW.status = 'queued')
)
BEGIN SELECT RAISE(ABORT, 'the task machine has no such edge'); END;

CREATE TRIGGER tasks_running BEFORE UPDATE OF status ON tasks
WHEN NEW.status = 'running'
    AND NOT EXISTS (SELECT 1 FROM attempts WHERE task = NEW.number AND ended_at IS NULL)
BEGIN SELECT RAISE(ABORT, 'a running task has a live attempt'); END;

CREATE TRIGGER tasks_resting BEFORE UPDATE OF status ON tasks
WHEN NEW.status <> 'running'
    AND EXISTS (SELECT 1 FROM attempts WHERE task = NEW.number AND ended_at IS NULL)
BEGIN SELECT RAISE(ABORT, 'only a running task has a live attempt'); END;

CREATE TRIGGER tasks_end BEFORE DELETE ON tasks WHEN OLD.completed_at IS NULL
BEGIN SELECT RAISE(ABORT, 'only an ended task is deleted'); END;

CREATE TRIGGER attempts_begin BEFORE INSERT ON attempts
WHEN NEW.step <> 'claimed' OR (SELECT status FROM tasks WHERE number = NEW.task) <> 'queued'
BEGIN SELECT RAISE(ABORT, 'an attempt begins claimed, on a queued task'); END;

CREATE TRIGGER attempts_end BEFORE UPDATE ON attempts WHEN OLD.ended_at IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'an ended attempt never changes'); END;

-- The place of a step's word in this sentence is its rank.
CREATE TRIGGER attempts_steps BEFORE UPDATE OF step ON attempts
WHEN instr('claimed submitting submitted collected settled', NEW.step)
    < instr('claimed submitting submitted collected settled', OLD.step)
BEGIN SELECT RAISE(ABORT, 'a step never goes back'); END;
