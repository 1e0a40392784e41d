//! Durable jobs: a SQLite store with one transaction per transition, and the worker loop that runs one job at a time. Knows
//! nothing of what a job does: the body is passed in.

mod status;
mod store;
mod worker;

pub use status::Status;
pub use store::{EventRow, Job, JobId, Page, Store};
pub use worker::{Body, Context, Jobs};
