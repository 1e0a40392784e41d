//! The store: jobs, their rows of work, their events. One transaction per change, on disk before the call returns.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::Status;
use crate::error::{Error, Result};
use crate::telemetry::metrics;

mod rows;

use rows::{SHORT_COLUMNS, Stored, insert_event, insert_row, json_at, merge, read_job, read_status, stored};

/// Text id, `rdpo-…`; sorts by time of creation.
pub type JobId = String;

/// A job as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Id.
    pub id: JobId,
    /// State.
    pub status: Status,
    /// The request, defaults filled in.
    pub request: Value,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds the worker first took it.
    pub started_at: Option<i64>,
    /// Unix seconds of the final state.
    pub finished_at: Option<i64>,
    /// Why it failed, or paused by itself.
    pub error: Option<Value>,
    /// Counters by stage: `{"synthesizing": {"done": 3, "total": 16}, …}`; `waiting` with a reason while an endpoint is waited for.
    pub progress: Value,
    /// What the body left: report, adapter version.
    pub result: Value,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventRow {
    /// Increasing per store.
    pub id: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// `info`, `warn`, `error`.
    pub level: String,
    /// `message`, `status`, `progress` or `metrics`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Text.
    pub message: String,
    /// Numbers.
    #[schema(value_type = Object)]
    pub data: Value,
}

/// A page of a list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// Rows, newest first.
    pub data: Vec<T>,
    /// Whether more follow.
    pub has_more: bool,
}

const SCHEMA: &str = "
create table if not exists jobs (
    seq integer primary key autoincrement,
    id text not null unique,
    status text not null,
    request text not null,
    created_at integer not null,
    started_at integer,
    finished_at integer,
    error text,
    progress text not null default '{}',
    result text not null default '{}'
);
create index if not exists jobs_by_status on jobs (status, seq);
create table if not exists rows (
    job text not null references jobs (id),
    kind text not null,
    position integer not null,
    value text not null,
    primary key (job, kind, position)
) without rowid;
create table if not exists events (
    id integer primary key autoincrement,
    job text not null references jobs (id),
    created_at integer not null,
    level text not null,
    kind text not null,
    message text not null,
    data text not null
);
create index if not exists events_by_job on events (job, id);
";
const SCHEMA_VERSION: i64 = 1;

/// The database. Cheap to clone; one connection behind a lock, WAL. A second process on the same file is refused: two
/// workers would run the same job.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// A std mutex: never held across an await.
    connection: Mutex<Connection>,
    changes: watch::Sender<u64>,
}

impl Store {
    /// Opens or creates the file (parents too).
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|error| {
                Error::internal(format!("cannot create the folder {}: {error}", parent.display())).at("store.path")
            })?;
        }
        let connect = || -> rusqlite::Result<(Connection, i64)> {
            let mut connection = Connection::open(path)?;
            connection.busy_timeout(Duration::from_secs(2))?;
            connection.pragma_update(None, "locking_mode", "exclusive")?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "full")?;
            connection.pragma_update(None, "foreign_keys", true)?;
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
            let version = transaction.query_row("pragma user_version", [], |row| row.get(0))?;
            if version <= SCHEMA_VERSION {
                transaction.execute_batch(SCHEMA)?;
                transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            }
            transaction.commit()?;
            Ok((connection, version))
        };
        let (connection, version) = connect().map_err(|error| explain(path, &error))?;
        if version > SCHEMA_VERSION {
            return Err(Error::unprocessable(
                "store.path",
                format!("{} was written by a newer rdpo (schema {version}); use that, or another file", path.display()),
            ));
        }
        let shared =
            Shared { path: path.to_owned(), connection: Mutex::new(connection), changes: watch::Sender::new(0) };
        let store = Store { shared: Arc::new(shared) };
        store.count()?;
        Ok(store)
    }

    /// A new job, queued.
    pub fn create(&self, request: &Value) -> Result<Job> {
        let id = format!("rdpo-{}", uuid::Uuid::now_v7().simple());
        self.write(|transaction| {
            transaction.execute(
                "insert into jobs (id, status, request, created_at) values (?, ?, ?, ?)",
                params![id, Status::Queued.name(), request.to_string(), now()],
            )?;
            insert_event(transaction, &id, "info", "status", "queued", &json!({"status": "queued"}))?;
            read_job(transaction, &id)
        })
        .and_then(|job| {
            self.count()?;
            self.parsed(job, &id)
        })
    }

    /// A job; 404 if there is none.
    pub fn get(&self, id: &str) -> Result<Job> {
        let job = read_job(&self.lock(), id).map_err(|error| self.explain(error))?;
        self.parsed(job, id)
    }

    /// Where a job is, without reading the rest of it; 404 if there is none.
    pub fn status(&self, id: &str) -> Result<Status> {
        let status = read_status(&self.lock(), id).map_err(|error| self.explain(error))?;
        self.found(status, id)
    }

    /// Jobs, newest first, after the job `after`; without `prompts`, `pairs` and `eval_prompts` of the request and the report's samples.
    pub fn list(&self, after: Option<&str>, limit: usize) -> Result<Page<Job>> {
        let read = || -> rusqlite::Result<Option<Vec<Stored>>> {
            let connection = self.lock();
            let below = match after {
                None => i64::MAX,
                Some(id) => {
                    let seq =
                        connection.query_row("select seq from jobs where id = ?", [id], |row| row.get(0)).optional()?;
                    match seq {
                        Some(seq) => seq,
                        None => return Ok(None),
                    }
                }
            };
            let mut statement = connection
                .prepare_cached(&format!("select {SHORT_COLUMNS} from jobs where seq < ? order by seq desc limit ?"))?;
            let jobs = statement.query_map(params![below, (limit + 1) as i64], stored)?;
            Ok(Some(jobs.collect::<rusqlite::Result<_>>()?))
        };
        let found = read().map_err(|error| self.explain(error))?;
        let mut data =
            found.ok_or_else(|| Error::invalid("after", "no job has this id; take the last id of the page before"))?;
        let has_more = data.len() > limit;
        data.truncate(limit);
        let data = data.into_iter().map(Stored::parse).collect::<rusqlite::Result<_>>();
        Ok(Page { data: data.map_err(|error| self.explain(error))?, has_more })
    }

    /// One transition, with its event, in one transaction; 409 if the state machine does not allow it.
    pub fn set_status(&self, id: &str, next: Status, error: Option<Value>) -> Result<Job> {
        let outcome = self.write(|transaction| {
            let Some(status) = read_status(transaction, id)? else { return Ok(None) };
            if !status.allows(next) {
                return Ok(Some(Err(status)));
            }
            let finished = next.is_final().then(now);
            transaction.execute(
                "update jobs set status = ?, error = ?, finished_at = ? where id = ?",
                params![next.name(), error.as_ref().map(Value::to_string), finished, id],
            )?;
            let message = match error.as_ref().and_then(|error| error["message"].as_str()) {
                Some(reason) => format!("{}: {reason}", next.name()),
                None => next.name().to_owned(),
            };
            let level = match next {
                Status::Failed => "error",
                _ if error.is_some() => "warn",
                _ => "info",
            };
            insert_event(transaction, id, level, "status", &message, &json!({"status": next.name()}))?;
            Ok(read_job(transaction, id)?.map(Ok))
        })?;
        self.count()?;
        match self.found(outcome, id)? {
            Ok(job) => self.parsed(Some(job), id),
            Err(status) => Err(Error::conflict(format!(
                "job {id} is {} and cannot become {}{}",
                status.name(),
                next.name(),
                match status {
                    Status::Publishing => ": what goes live is not taken back, roll the adapter back instead",
                    status if status.is_final() && next != Status::Queued => ": it has ended",
                    _ => "",
                }
            ))
            .at("id")),
        }
    }

    /// Stores what was done of `kind` for item `index`; overwrites.
    pub fn put_row(&self, id: &str, kind: &str, index: usize, value: &Value) -> Result<()> {
        self.write(|transaction| insert_row(transaction, id, kind, index, value))
    }

    /// The same for several items in one transaction: all of them or none.
    pub fn put_rows(&self, id: &str, kind: &str, rows: &[(usize, Value)]) -> Result<()> {
        self.write(|transaction| {
            rows.iter().try_for_each(|(index, value)| insert_row(transaction, id, kind, *index, value))
        })
    }

    /// Rows of `kind`, by index.
    pub fn rows(&self, id: &str, kind: &str) -> Result<Vec<(usize, Value)>> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Vec<(usize, Value)>> {
            let mut statement = connection
                .prepare_cached("select position, value from rows where job = ? and kind = ? order by position")?;
            let rows = statement.query_map([id, kind], |row| Ok((row.get::<_, i64>(0)? as usize, json_at(row, 1)?)))?;
            rows.collect()
        };
        read().map_err(|error| self.explain(error))
    }

    /// Merges an object into `progress`, key by key.
    pub fn set_progress(&self, id: &str, patch: &Value) -> Result<()> {
        self.write(|transaction| merge(transaction, "progress", id, patch))
    }

    /// Merges an object into `result`, key by key.
    pub fn set_result(&self, id: &str, patch: &Value) -> Result<()> {
        self.write(|transaction| merge(transaction, "result", id, patch))
    }

    /// Merges an object into `progress` and says so in an event, in one transaction.
    pub(super) fn report_progress(&self, id: &str, patch: &Value, message: &str, data: &Value) -> Result<()> {
        self.write(|transaction| {
            merge(transaction, "progress", id, patch)?;
            insert_event(transaction, id, "info", "progress", message, data)
        })
    }

    /// Appends an event.
    pub fn event(&self, id: &str, level: &str, kind: &str, message: &str, data: &Value) -> Result<()> {
        self.write(|transaction| insert_event(transaction, id, level, kind, message, data))
    }

    /// Events after `after`, oldest first.
    pub fn events(&self, id: &str, after: i64, limit: usize) -> Result<Vec<EventRow>> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Option<Vec<EventRow>>> {
            if read_status(&connection, id)?.is_none() {
                return Ok(None);
            }
            let mut statement = connection.prepare_cached(
                "select id, created_at, level, kind, message, data from events where job = ? and id > ? order by id limit ?",
            )?;
            let rows = statement.query_map(params![id, after, limit as i64], |row| {
                Ok(EventRow {
                    id: row.get(0)?,
                    created_at: row.get(1)?,
                    level: row.get(2)?,
                    kind: row.get(3)?,
                    message: row.get(4)?,
                    data: json_at(row, 5)?,
                })
            })?;
            rows.collect::<rusqlite::Result<_>>().map(Some)
        };
        self.found(read().map_err(|error| self.explain(error))?, id)
    }

    /// The oldest queued job, marked as started; one that was going live when the process ended comes first.
    pub(super) fn claim(&self) -> Result<Option<Job>> {
        let claimed = self.write(|transaction| {
            let next = transaction
                .query_row(
                    "select id from jobs where status in ('queued', 'publishing') order by status = 'queued', seq limit 1",
                    [],
                    |row| row.get::<_, String>(0),
                )
                .optional()?;
            let Some(id) = next else { return Ok(None) };
            transaction
                .execute("update jobs set started_at = coalesce(started_at, ?) where id = ?", params![now(), id])?;
            read_job(transaction, &id)
        })?;
        claimed.map(Stored::parse).transpose().map_err(|error| self.explain(error))
    }

    /// Queues the jobs that were in progress when the process ended. One whose adapter may be live already stays what it is: were it queued,
    /// it could be cancelled.
    pub(super) fn requeue_interrupted(&self) -> Result<()> {
        let live = "status in ('synthesizing', 'scoring', 'training', 'evaluating', 'publishing')";
        self.write(|transaction| {
            let mut statement = transaction.prepare(&format!("select id, status from jobs where {live}"))?;
            let found = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
            for (id, status) in found.collect::<rusqlite::Result<Vec<_>>>()? {
                let (next, what) = match status.as_str() {
                    "publishing" => ("publishing", "taken up"),
                    _ => ("queued", "queued"),
                };
                transaction.execute("update jobs set status = ? where id = ?", [next, &id])?;
                let message = format!("{what} again: the server stopped while {status}");
                insert_event(transaction, &id, "warn", "status", &message, &json!({ "status": next }))?;
            }
            Ok(())
        })?;
        self.count()
    }

    /// Wakes at every change of any job.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    fn write<T>(&self, change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>) -> Result<T> {
        let mut connection = self.lock();
        let run = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        let value = run().map_err(|error| self.explain(error))?;
        drop(connection);
        self.shared.changes.send_modify(|version| *version += 1);
        Ok(value)
    }

    fn count(&self) -> Result<()> {
        let connection = self.lock();
        for status in Status::ALL {
            let jobs = connection
                .prepare_cached("select count(*) from jobs where status = ?")
                .and_then(|mut statement| statement.query_row([status.name()], |row| row.get::<_, i64>(0)))
                .map_err(|error| self.explain(error))?;
            metrics().train_jobs.with_label_values(&[status.name()]).set(jobs);
        }
        Ok(())
    }

    // A panic elsewhere cannot leave half a change behind: an open transaction rolls back when dropped.
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.shared.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn explain(&self, error: rusqlite::Error) -> Error {
        explain(&self.shared.path, &error)
    }

    fn parsed(&self, job: Option<Stored>, id: &str) -> Result<Job> {
        self.found(job, id)?.parse().map_err(|error| self.explain(error))
    }

    fn found<T>(&self, job: Option<T>, id: &str) -> Result<T> {
        job.ok_or_else(|| Error::not_found(format!("There is no job `{id}`. GET /v1/rdpo/train lists them.")).at("id"))
    }
}

fn explain(path: &Path, error: &rusqlite::Error) -> Error {
    let advice = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "the disk is full; free some space, then resume the job",
        Some(ErrorCode::SystemIoFailure) => "the disk cannot be read or written; check it and its free space",
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => "the file is not writable",
        Some(ErrorCode::CannotOpen) => "the file cannot be opened; check the path and its permissions",
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another process has the file open; stop that server, or set another store.path"
        }
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            "the file is not a readable job store; move it away or restore a copy"
        }
        _ => "unexpected",
    };
    Error::internal(format!("job store {}: {advice} ({error})", path.display())).at("store.path")
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
