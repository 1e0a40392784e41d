//! The worker: one thread that claims the oldest queued job and runs its body; cancel and pause reach the body through
//! [`Context::check`].

use std::sync::Arc;

use serde_json::Value;

use super::{Job, Status, Store};
use crate::error::Result;

/// What a job does, step by step; it must be resumable: rows already stored are not done again.
pub type Body = Arc<dyn Fn(&Context) -> Result<()> + Send + Sync>;

/// What the body is given.
#[derive(Clone)]
pub struct Context {
    /// The job as it was when claimed.
    pub job: Job,
    /// The store.
    pub store: Store,
}

impl Context {
    /// `Err` (kind `Cancelled`) once the user asked to cancel or pause; cheap, call it often.
    pub fn check(&self) -> Result<()> {
        todo!()
    }

    /// Moves the job to its next stage.
    pub fn stage(&self, _status: Status) -> Result<()> {
        todo!()
    }

    /// Records progress of a stage, `{"done", "total"}`, as progress and as an event.
    pub fn progress(&self, _stage: Status, _done: usize, _total: usize) -> Result<()> {
        todo!()
    }

    /// Appends an event.
    pub fn event(&self, _level: &str, _kind: &str, _message: &str, _data: &Value) -> Result<()> {
        todo!()
    }
}

/// Handle: submit, look, cancel, pause, resume.
#[derive(Clone)]
pub struct Jobs {}

impl Jobs {
    /// Starts the worker thread. Jobs that were in progress when the process died are queued again first.
    pub fn start(_store: Store, _body: Body) -> Result<Self> {
        todo!()
    }

    /// The store, for reading.
    pub fn store(&self) -> &Store {
        todo!()
    }

    /// Stores and queues a job.
    pub fn submit(&self, _request: &Value) -> Result<Job> {
        todo!()
    }

    /// Cancels; 409 if it has ended.
    pub fn cancel(&self, _id: &str) -> Result<Job> {
        todo!()
    }

    /// Pauses; 409 if it is not in progress or queued.
    pub fn pause(&self, _id: &str) -> Result<Job> {
        todo!()
    }

    /// Queues a paused or failed job again; 409 otherwise.
    pub fn resume(&self, _id: &str) -> Result<Job> {
        todo!()
    }

    /// Wakes a watcher at every change of that job, for SSE.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<u64> {
        todo!()
    }

    /// Stops after the current row or layer, leaving the job to be resumed at the next start.
    pub fn shutdown(&self) {
        todo!()
    }
}
