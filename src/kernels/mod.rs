//! Plain-slice compute kernels: the only unsafe code, the only `cfg(feature = "cuda")`, no autograd and no crate imports.
//!
//! Every CPU kernel works row by row in a fixed order of additions, so the result of one row never depends on how many other
//! rows are in the call: serving is batch-invariant, bit for bit.

pub mod cpu;
pub mod cuda;
pub mod memory;
