-- Schema version 2: where a storage put a file, small files in their rows, uploads, and bytes in all.
-- Runs inside one transaction, on a database of version 1.

-- What the storage said of where it put the file; `data` is the file itself where the client asked for that.
ALTER TABLE artefacts ADD COLUMN location TEXT;
ALTER TABLE artefacts ADD COLUMN data BLOB;

-- The uploaded files that a task's graph names: one that no task names may be deleted.
CREATE TABLE task_uploads (
    task INTEGER NOT NULL REFERENCES tasks (number) ON DELETE CASCADE,
    file TEXT    NOT NULL CHECK (file <> ''),
    PRIMARY KEY (task, file)
) STRICT, WITHOUT ROWID;
CREATE INDEX task_uploads_file ON task_uploads (file);

-- The bytes of all artefacts, kept by the triggers below.
CREATE TABLE artefact_bytes (
    one        INTEGER PRIMARY KEY CHECK (one = 1),
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0)
) STRICT;
INSERT INTO artefact_bytes SELECT 1, coalesce(sum(size_bytes), 0) FROM artefacts;

CREATE TRIGGER artefacts_counted_in AFTER INSERT ON artefacts
BEGIN UPDATE artefact_bytes SET size_bytes = size_bytes + NEW.size_bytes WHERE one = 1; END;

CREATE TRIGGER artefacts_counted_out AFTER DELETE ON artefacts
BEGIN UPDATE artefact_bytes SET size_bytes = size_bytes - OLD.size_bytes WHERE one = 1; END;

-- Files whose row is gone, until their storage has deleted them: it may be down at that moment.
CREATE TABLE unwanted_files (
    storage TEXT NOT NULL,
    key     TEXT NOT NULL,
    PRIMARY KEY (storage, key)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER artefacts_unwanted AFTER DELETE ON artefacts
BEGIN INSERT OR IGNORE INTO unwanted_files VALUES (OLD.storage, OLD.key); END;
