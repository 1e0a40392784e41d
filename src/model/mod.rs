//! One decoder definition, served and trained: only the attention mode ([`Attend`]) and the LoRA rows differ.

mod config;
mod decoder;
mod format;
mod kv;
mod layer;
mod lora;
mod rotary;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use decoder::{Attend, Decoder};
pub use format::{LoadOptions, WeightFormat};
pub use kv::KvPool;
pub use lora::{Adapter, LoraParams, LoraRows, RowGroup, SITES};
pub use rotary::Rotary;

/// What makes log-probabilities of a row of [`Decoder::logits`].
pub use crate::ops::RowLogprobs;
/// The device that serving and training share.
pub use crate::ops::gpu;
/// What [`Attend`] takes for a step over paged sequences.
pub use crate::ops::{PagedBatch, PagedSequence};
