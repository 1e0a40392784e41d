//! The integration tests, one binary.

#![allow(clippy::unwrap_used)]

mod engine;
mod jobs;
mod parity;
mod real_model;
mod tidy;
mod training;
