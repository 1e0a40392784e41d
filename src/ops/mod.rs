//! The only differentiable vocabulary of the crate: every op has a forward and a backward that are tested against finite
//! differences. What runs in [`record`] leaves a [`Tape`]; a forward-only op refuses a tensor whose gradient is asked for instead of
//! cutting it silently.
//!
//! The ops run on [`crate::kernels`]; on a GPU those of f16, and of heads that no kernel takes, are composed of candle's own.

mod adamw;
mod attention;
mod composed;
mod cpu;
mod cuda;
mod linear;
mod logprobs;
mod lora;
mod norm;
mod paged;
mod pointwise;
mod sample;
mod tape;
mod trained;

pub use adamw::{AdamWUpdate, adamw};
pub use attention::{CausalMask, Segment, causal_attention};
pub use cuda::{Lag, gpu};
pub use linear::{Codes, FrozenLinear};
pub(crate) use logprobs::logprobs_scratch_bytes;
pub use logprobs::{RowLogprobs, token_logprobs};
pub use lora::{ServedRows, Trained, linears, low_rank};
pub use norm::rms_norm;
pub use paged::{KvLayer, PagedBatch, PagedSequence, kv_write, paged_attention};
pub use pointwise::{Activation, add, dropout, gated, reshape, rope};
pub use sample::{Edit, Pick, SampleRow, Sampled, sample};
pub use tape::{Dear, Gradients, Tape, only_added, record, record_again};

pub use crate::kernels::cpu::{PIECE, softmax_row, sum_row};
pub use crate::kernels::memory::{DeviceMemory, device_memory, device_peak};
