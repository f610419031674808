-- Tables of version 4, frozen. Revision 0001 creates them. version_4.py fills in the types that differ by database.
CREATE TABLE IF NOT EXISTS schema_version (
  version ${version} NOT NULL,
  at ${double},
  PRIMARY KEY (version)
);
CREATE TABLE IF NOT EXISTS installation (
  id VARCHAR(64) NOT NULL,
  sweep VARCHAR(64) NOT NULL,
  sweep_before VARCHAR(64) NOT NULL,
  swept_at ${double} NOT NULL,
  created_at ${double} NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE IF NOT EXISTS assets (
  name VARCHAR(96) NOT NULL,
  stored_at ${double} NOT NULL,
  unnamed_since ${double},
  trashed_at ${double},
  PRIMARY KEY (name)
);
CREATE TABLE IF NOT EXISTS jobs (
  number ${serial},
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  kind VARCHAR(32) NOT NULL,
  status VARCHAR(16) NOT NULL,
  priority INTEGER NOT NULL,
  cost ${double} NOT NULL,
  request JSON NOT NULL,
  extra JSON NOT NULL,
  fingerprint VARCHAR(128),
  wanted VARCHAR(8),
  deleted BOOLEAN NOT NULL,
  progress INTEGER NOT NULL,
  phase VARCHAR(32),
  checkpoint JSON NOT NULL,
  attempts INTEGER NOT NULL,
  token INTEGER NOT NULL,
  worker VARCHAR(128),
  lease_until ${double},
  run_after ${double} NOT NULL,
  error JSON,
  created_at ${double} NOT NULL,
  started_at ${double},
  completed_at ${double},
  deadline ${double},
  expires_at ${double},
  UNIQUE (id)
);
CREATE TABLE IF NOT EXISTS job_counts (
  status VARCHAR(16) NOT NULL,
  count BIGINT NOT NULL,
  PRIMARY KEY (status)
);
CREATE TABLE IF NOT EXISTS results (
  job ${key} NOT NULL,
  token INTEGER NOT NULL,
  assets JSON NOT NULL,
  receipt JSON NOT NULL,
  created_at ${double} NOT NULL,
  PRIMARY KEY (job),
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS job_attempts (
  job ${key} NOT NULL,
  token INTEGER NOT NULL,
  worker VARCHAR(128) NOT NULL,
  began_at ${double} NOT NULL,
  ended_at ${double},
  outcome VARCHAR(16),
  error JSON,
  PRIMARY KEY (job, token),
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS idempotency_keys (
  owner VARCHAR(128) NOT NULL,
  "key" VARCHAR(255) NOT NULL,
  fingerprint VARCHAR(128) NOT NULL,
  job ${key} NOT NULL,
  created_at ${double} NOT NULL,
  PRIMARY KEY (owner, "key"),
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS owners (
  owner VARCHAR(128) NOT NULL,
  served ${double} NOT NULL,
  PRIMARY KEY (owner)
);
CREATE TABLE IF NOT EXISTS workers (
  name VARCHAR(128) NOT NULL,
  device VARCHAR(64) NOT NULL,
  started_at ${double} NOT NULL,
  seen_at ${double} NOT NULL,
  PRIMARY KEY (name)
);
CREATE TABLE IF NOT EXISTS events (
  number ${serial},
  job ${key} NOT NULL,
  owner VARCHAR(128) NOT NULL,
  type VARCHAR(64) NOT NULL,
  data JSON NOT NULL,
  created_at ${double} NOT NULL,
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS webhook_endpoints (
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  url TEXT NOT NULL,
  event_types JSON NOT NULL,
  secret TEXT NOT NULL,
  old_secret TEXT,
  old_secret_until ${double},
  created_at ${double} NOT NULL,
  updated_at ${double} NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE IF NOT EXISTS webhook_deliveries (
  number ${serial},
  endpoint VARCHAR(64) NOT NULL,
  event VARCHAR(64) NOT NULL,
  payload JSON NOT NULL,
  attempts INTEGER NOT NULL,
  next_at ${double},
  status_code INTEGER,
  created_at ${double} NOT NULL,
  UNIQUE (endpoint, event),
  FOREIGN KEY(endpoint) REFERENCES webhook_endpoints (id) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS api_keys (
  id VARCHAR(12) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  scopes JSON NOT NULL,
  digest VARCHAR(64) NOT NULL,
  created_at ${double} NOT NULL,
  expires_at ${double},
  last_used_at ${double},
  revoked_at ${double},
  PRIMARY KEY (id)
);
CREATE TABLE IF NOT EXISTS files (
  number ${serial},
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  purpose VARCHAR(32) NOT NULL,
  name TEXT NOT NULL,
  asset TEXT NOT NULL,
  size BIGINT NOT NULL,
  created_at ${double} NOT NULL,
  UNIQUE (id)
);
CREATE TABLE IF NOT EXISTS characters (
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  asset TEXT NOT NULL,
  created_at ${double} NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE IF NOT EXISTS likenesses (
  character VARCHAR(64) NOT NULL,
  likeness JSON NOT NULL,
  consent JSON,
  PRIMARY KEY (character),
  FOREIGN KEY(character) REFERENCES characters (id) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS batches (
  number ${serial},
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  input_file VARCHAR(64) NOT NULL,
  metadata JSON NOT NULL,
  output_file VARCHAR(64),
  error_file VARCHAR(64),
  created_at ${double} NOT NULL,
  expires_at ${double} NOT NULL,
  completed_at ${double},
  cancelled_at ${double},
  total INTEGER DEFAULT 0 NOT NULL,
  next_line INTEGER DEFAULT 0 NOT NULL,
  completed INTEGER DEFAULT 0 NOT NULL,
  failed INTEGER DEFAULT 0 NOT NULL,
  UNIQUE (id)
);
CREATE TABLE IF NOT EXISTS batch_lines (
  batch ${key} NOT NULL,
  line INTEGER NOT NULL,
  custom_id TEXT NOT NULL,
  body JSON NOT NULL,
  job VARCHAR(64),
  error JSON,
  PRIMARY KEY (batch, line),
  FOREIGN KEY(batch) REFERENCES batches (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS batch_jobs (
  job VARCHAR(64) NOT NULL,
  batch ${key} NOT NULL,
  line INTEGER NOT NULL,
  PRIMARY KEY (job),
  FOREIGN KEY(batch) REFERENCES batches (number) ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS refusals (
  rule VARCHAR(200) NOT NULL,
  target VARCHAR(16) NOT NULL,
  code VARCHAR(32) NOT NULL,
  count BIGINT NOT NULL,
  PRIMARY KEY (rule, target, code)
);
