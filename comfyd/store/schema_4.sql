-- Schema version 4: assets, the names and hashes of artefacts, and tasks that came with credentials.
-- Runs inside one transaction, on a database of version 3.

-- Whether the task came with credentials for ComfyUI. They themselves are in no table.
ALTER TABLE tasks ADD COLUMN credentials INTEGER NOT NULL DEFAULT 0 CHECK (credentials IN (0, 1));

-- NULL for what was stored before this version.
ALTER TABLE artefacts ADD COLUMN blake3 TEXT CHECK (length(blake3) = 64 AND blake3 NOT GLOB '*[^0-9a-f]*');

-- `Artefact.id`. It is made from the key, and one key is one file: should two rows ever share a key, the first of them
-- alone has the id, because a task must be able to end whatever its nodes are called.
ALTER TABLE artefacts ADD COLUMN id TEXT CHECK (length(id) = 36);
CREATE UNIQUE INDEX artefacts_id ON artefacts (id);
UPDATE OR IGNORE artefacts SET id = artefact_id(key);  -- a function of the connection that runs this

-- Records over uploads: many may share the bytes of one.
CREATE TABLE assets (
    number       INTEGER PRIMARY KEY,  -- the order of creation
    id           TEXT    NOT NULL UNIQUE CHECK (id <> ''),
    file         TEXT    NOT NULL CHECK (file <> ''),
    blake3       TEXT    NOT NULL CHECK (length(blake3) = 64 AND blake3 NOT GLOB '*[^0-9a-f]*'),
    size_bytes   INTEGER NOT NULL CHECK (size_bytes >= 0),
    content_type TEXT    NOT NULL CHECK (content_type <> ''),
    file_path    TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    key_id       TEXT    CHECK (key_id <> '')
) STRICT;

-- An owner's records over the same bytes, the newest last: the index ends in `number`, the rowid.
CREATE INDEX assets_bytes ON assets (blake3, key_id);
-- What expires next.
CREATE INDEX assets_expiry ON assets (expires_at);
-- The uploads that are in use.
CREATE INDEX assets_file ON assets (file);
