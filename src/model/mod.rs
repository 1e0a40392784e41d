//! One decoder definition, served and trained: only the attention mode ([`Attend`]) and the LoRA rows differ.

mod config;
mod decoder;
#[cfg(test)]
mod fault;
mod format;
mod kv;
mod layer;
mod lora;
mod memory;
mod rotary;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use decoder::{Attend, Decoder};
pub use format::{LoadOptions, WeightFormat};
pub use kv::KvPool;
pub(crate) use layer::tensor_bytes;
pub use lora::{Adapter, LoraParams, LoraRows, RowGroup, SITES};
pub(crate) use memory::flat_step_rows;
pub use memory::{TrainingMemory, TrainingSize};
pub use rotary::Rotary;

/// The device that serving and training share.
pub use crate::ops::gpu;
/// How much memory its device has.
pub use crate::ops::{DeviceMemory, device_memory};
/// Tokens drawn from [`Decoder::logits`] on a GPU.
pub use crate::ops::{Edit, Pick, SampleRow, Sampled, sample};
/// What makes log-probabilities of a row of [`Decoder::logits`].
pub use crate::ops::{PIECE, RowLogprobs, softmax_row, sum_row};
/// What [`Attend`] takes for a step over paged sequences.
pub use crate::ops::{PagedBatch, PagedSequence};
