//! Durable jobs: a SQLite store with one transaction per transition, and the worker loop that runs one job at a time. Knows
//! nothing of what a job does: the body is passed in.

mod store;
mod worker;

pub use store::{EventRow, Job, JobId, Page, Status, Store};
pub use worker::{Body, Context, Jobs};
