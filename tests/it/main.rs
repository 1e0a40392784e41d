//! The integration tests, one binary.

#![allow(clippy::unwrap_used)]

mod binary;
mod device;
mod engine;
mod evaluation;
mod gguf;
mod gradients;
mod grammar;
mod hot_swap;
mod jobs;
mod lookup;
mod memory;
mod method;
#[cfg(feature = "mistralrs")]
mod mistral;
mod openapi;
mod parity;
mod real_model;
mod remote;
mod remote_faults;
mod tidy;
mod training;
