//! The integration tests, one binary.

mod training;
