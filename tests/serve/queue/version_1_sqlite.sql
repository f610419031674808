CREATE TABLE schema_version (
  version INTEGER NOT NULL,
  at DOUBLE,
  PRIMARY KEY (version)
);
CREATE TABLE jobs (
  number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  kind VARCHAR(32) NOT NULL,
  status VARCHAR(16) NOT NULL,
  priority INTEGER NOT NULL,
  cost DOUBLE NOT NULL,
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
  lease_until DOUBLE,
  run_after DOUBLE NOT NULL,
  error JSON,
  created_at DOUBLE NOT NULL,
  started_at DOUBLE,
  completed_at DOUBLE,
  deadline DOUBLE,
  expires_at DOUBLE,
  UNIQUE (id)
);
CREATE INDEX jobs_fingerprint ON jobs (owner, fingerprint);
CREATE INDEX jobs_of_owner ON jobs (owner, kind, number);
CREATE INDEX jobs_expiry ON jobs (expires_at);
CREATE INDEX jobs_active ON jobs (status, owner) WHERE status IN ('queued', 'in_progress', 'paused');
CREATE TABLE owners (
  owner VARCHAR(128) NOT NULL,
  served DOUBLE NOT NULL,
  PRIMARY KEY (owner)
);
CREATE TABLE workers (
  name VARCHAR(128) NOT NULL,
  device VARCHAR(64) NOT NULL,
  started_at DOUBLE NOT NULL,
  seen_at DOUBLE NOT NULL,
  PRIMARY KEY (name)
);
CREATE TABLE webhook_endpoints (
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  url TEXT NOT NULL,
  event_types JSON NOT NULL,
  secret TEXT NOT NULL,
  old_secret TEXT,
  old_secret_until DOUBLE,
  created_at DOUBLE NOT NULL,
  updated_at DOUBLE NOT NULL,
  PRIMARY KEY (id)
);
CREATE INDEX ix_webhook_endpoints_owner ON webhook_endpoints (owner);
CREATE TABLE refusals (
  rule VARCHAR(200) NOT NULL,
  target VARCHAR(16) NOT NULL,
  code VARCHAR(32) NOT NULL,
  count BIGINT NOT NULL,
  PRIMARY KEY (rule, target, code)
);
CREATE TABLE api_keys (
  id VARCHAR(12) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  scopes JSON NOT NULL,
  digest VARCHAR(64) NOT NULL,
  created_at DOUBLE NOT NULL,
  expires_at DOUBLE,
  last_used_at DOUBLE,
  revoked_at DOUBLE,
  PRIMARY KEY (id)
);
CREATE TABLE batches (
  number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  input_file VARCHAR(64) NOT NULL,
  metadata JSON NOT NULL,
  output_file VARCHAR(64),
  error_file VARCHAR(64),
  created_at DOUBLE NOT NULL,
  expires_at DOUBLE NOT NULL,
  completed_at DOUBLE,
  cancelled_at DOUBLE,
  UNIQUE (id)
);
CREATE INDEX batches_of_owner ON batches (owner, number);
CREATE TABLE files (
  number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  purpose VARCHAR(32) NOT NULL,
  name TEXT NOT NULL,
  asset TEXT NOT NULL,
  size BIGINT NOT NULL,
  created_at DOUBLE NOT NULL,
  UNIQUE (id)
);
CREATE INDEX files_of_owner ON files (owner, number);
CREATE TABLE characters (
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(128) NOT NULL,
  name TEXT NOT NULL,
  asset TEXT NOT NULL,
  created_at DOUBLE NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE results (
  job INTEGER NOT NULL,
  token INTEGER NOT NULL,
  assets JSON NOT NULL,
  receipt JSON NOT NULL,
  created_at DOUBLE NOT NULL,
  PRIMARY KEY (job),
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE TABLE idempotency_keys (
  owner VARCHAR(128) NOT NULL,
  "key" VARCHAR(255) NOT NULL,
  fingerprint VARCHAR(128) NOT NULL,
  job INTEGER NOT NULL,
  created_at DOUBLE NOT NULL,
  PRIMARY KEY (owner, "key"),
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE INDEX ix_idempotency_keys_created_at ON idempotency_keys (created_at);
CREATE TABLE events (
  number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  job INTEGER NOT NULL,
  owner VARCHAR(128) NOT NULL,
  type VARCHAR(64) NOT NULL,
  data JSON NOT NULL,
  created_at DOUBLE NOT NULL,
  FOREIGN KEY(job) REFERENCES jobs (number) ON DELETE CASCADE
);
CREATE INDEX events_of_job ON events (job, number);
CREATE TABLE webhook_deliveries (
  number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  endpoint VARCHAR(64) NOT NULL,
  event VARCHAR(64) NOT NULL,
  payload JSON NOT NULL,
  attempts INTEGER NOT NULL,
  next_at DOUBLE,
  status_code INTEGER,
  created_at DOUBLE NOT NULL,
  UNIQUE (endpoint, event),
  FOREIGN KEY(endpoint) REFERENCES webhook_endpoints (id) ON DELETE CASCADE
);
CREATE INDEX ix_webhook_deliveries_endpoint ON webhook_deliveries (endpoint);
CREATE INDEX ix_webhook_deliveries_next_at ON webhook_deliveries (next_at);
CREATE TABLE batch_lines (
  batch INTEGER NOT NULL,
  line INTEGER NOT NULL,
  custom_id TEXT NOT NULL,
  body JSON NOT NULL,
  job VARCHAR(64),
  error JSON,
  PRIMARY KEY (batch, line),
  FOREIGN KEY(batch) REFERENCES batches (number) ON DELETE CASCADE
);
CREATE TABLE likenesses (
  character VARCHAR(64) NOT NULL,
  likeness JSON NOT NULL,
  consent JSON,
  PRIMARY KEY (character),
  FOREIGN KEY(character) REFERENCES characters (id) ON DELETE CASCADE
);
