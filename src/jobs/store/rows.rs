//! Rows of the tables: how jobs are read from theirs, and how rows and events are written.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde_json::{Map, Value};

use super::{Job, JobId, now};
use crate::jobs::Status;

const COLUMNS: &str = "id, status, request, created_at, started_at, finished_at, error, progress, result";
/// The same without what may be megabytes: the prompts and pairs of the request, the samples of the report.
pub(super) const SHORT_COLUMNS: &str =
    "id, status, json_remove(request, '$.prompts', '$.pairs', '$.eval_prompts'), created_at, started_at,
    finished_at, error, progress, json_remove(result, '$.report.samples')";

/// A job as its row has it: what may be megabytes of JSON is parsed once the lock is given back.
pub(super) struct Stored {
    id: JobId,
    status: Status,
    request: String,
    created_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
    error: Option<String>,
    progress: String,
    result: String,
}

impl Stored {
    pub(super) fn parse(self) -> rusqlite::Result<Job> {
        Ok(Job {
            id: self.id,
            status: self.status,
            request: json_of(&self.request, 2)?,
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            error: self.error.map(|error| json_of(&error, 6)).transpose()?,
            progress: json_of(&self.progress, 7)?,
            result: json_of(&self.result, 8)?,
        })
    }
}

pub(super) fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    Ok(Stored {
        id: row.get(0)?,
        status: status_at(row, 1)?,
        request: row.get(2)?,
        created_at: row.get(3)?,
        started_at: row.get(4)?,
        finished_at: row.get(5)?,
        error: row.get(6)?,
        progress: row.get(7)?,
        result: row.get(8)?,
    })
}

fn json_of(text: &str, column: usize) -> rusqlite::Result<Value> {
    serde_json::from_str(text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
    })
}

pub(super) fn json_at(row: &Row<'_>, column: usize) -> rusqlite::Result<Value> {
    json_of(&row.get::<_, String>(column)?, column)
}

fn status_at(row: &Row<'_>, column: usize) -> rusqlite::Result<Status> {
    let status: String = row.get(column)?;
    Status::from_name(&status)
        .ok_or_else(|| rusqlite::Error::InvalidColumnType(column, status, rusqlite::types::Type::Text))
}

pub(super) fn read_job(connection: &Connection, id: &str) -> rusqlite::Result<Option<Stored>> {
    connection.query_row(&format!("select {COLUMNS} from jobs where id = ?"), [id], stored).optional()
}

pub(super) fn read_status(connection: &Connection, id: &str) -> rusqlite::Result<Option<Status>> {
    let mut statement = connection.prepare_cached("select status from jobs where id = ?")?;
    statement.query_row([id], |row| status_at(row, 0)).optional()
}

pub(super) fn insert_row(
    transaction: &Transaction<'_>,
    id: &str,
    kind: &str,
    index: usize,
    value: &Value,
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached(
            "insert into rows (job, kind, position, value) values (?, ?, ?, ?)
             on conflict (job, kind, position) do update set value = excluded.value",
        )?
        .execute(params![id, kind, index as i64, value.to_string()])
        .map(drop)
}

pub(super) fn insert_event(
    transaction: &Transaction<'_>,
    id: &str,
    level: &str,
    kind: &str,
    message: &str,
    data: &Value,
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("insert into events (job, created_at, level, kind, message, data) values (?, ?, ?, ?, ?, ?)")?
        .execute(params![id, now(), level, kind, message, data.to_string()])
        .map(drop)
}

pub(super) fn merge(transaction: &Transaction<'_>, column: &str, id: &str, patch: &Value) -> rusqlite::Result<()> {
    let old = transaction.query_row(&format!("select {column} from jobs where id = ?"), [id], |row| json_at(row, 0))?;
    let mut merged = old.as_object().cloned().unwrap_or_else(Map::new);
    merged.extend(patch.as_object().cloned().unwrap_or_default());
    transaction
        .execute(&format!("update jobs set {column} = ? where id = ?"), params![Value::Object(merged).to_string(), id])
        .map(drop)
}
