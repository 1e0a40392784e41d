//! The store: jobs, their rows of work, their events.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::error::Result;

/// Text id, `rdpo-…`.
pub type JobId = String;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waiting for the worker.
    Queued,
    /// The teacher answers, criticizes, revises.
    Synthesizing,
    /// The reward model scores both answers.
    Scoring,
    /// The student learns.
    Training,
    /// The report is made.
    Evaluating,
    /// The adapter goes live.
    Publishing,
    /// Done.
    Succeeded,
    /// Ended with an error; rows are kept, it can be resumed.
    Failed,
    /// Ended by the user.
    Cancelled,
    /// Halted by the user; can be resumed.
    Paused,
}

impl Status {
    /// Whether nothing more happens without a resume.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Succeeded | Status::Failed | Status::Cancelled | Status::Paused)
    }

    /// Whether the state machine allows `self → next`.
    pub fn allows(self, _next: Status) -> bool {
        todo!()
    }
}

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
    /// Why it failed.
    pub error: Option<Value>,
    /// Counters by stage: `{"synthesizing": {"done": 3, "total": 16}, …}` and whatever the body reports.
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

/// The database. Cheap to clone; one connection behind a lock, WAL.
#[derive(Clone)]
pub struct Store {}

impl Store {
    /// Opens or creates the file (parents too).
    pub fn open(_path: &Path) -> Result<Self> {
        todo!()
    }

    /// A new job, queued.
    pub fn create(&self, _request: &Value) -> Result<Job> {
        todo!()
    }

    /// A job; 404 if there is none.
    pub fn get(&self, _id: &str) -> Result<Job> {
        todo!()
    }

    /// Jobs, newest first, after the job `after`.
    pub fn list(&self, _after: Option<&str>, _limit: usize) -> Result<Page<Job>> {
        todo!()
    }

    /// One transition, with its event, in one transaction; 409 if the state machine does not allow it.
    pub fn set_status(&self, _id: &str, _next: Status, _error: Option<Value>) -> Result<Job> {
        todo!()
    }

    /// Stores what was done of `kind` for item `index`; overwrites.
    pub fn put_row(&self, _id: &str, _kind: &str, _index: usize, _value: &Value) -> Result<()> {
        todo!()
    }

    /// Rows of `kind`, by index.
    pub fn rows(&self, _id: &str, _kind: &str) -> Result<Vec<(usize, Value)>> {
        todo!()
    }

    /// Merges an object into `progress`.
    pub fn set_progress(&self, _id: &str, _patch: &Value) -> Result<()> {
        todo!()
    }

    /// Merges an object into `result`.
    pub fn set_result(&self, _id: &str, _patch: &Value) -> Result<()> {
        todo!()
    }

    /// Appends an event.
    pub fn event(&self, _id: &str, _level: &str, _kind: &str, _message: &str, _data: &Value) -> Result<()> {
        todo!()
    }

    /// Events after `after`, oldest first.
    pub fn events(&self, _id: &str, _after: i64, _limit: usize) -> Result<Vec<EventRow>> {
        todo!()
    }
}
