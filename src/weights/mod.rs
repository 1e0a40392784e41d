//! File formats: GGUF, Hugging Face folders, PEFT adapters. Nobody else knows them.

mod adapter;
mod blocks;
mod checkpoint;
mod gguf;
mod gguf_tokenizer;
mod hf;

use sha2::{Digest, Sha256};

pub use adapter::{AdapterFile, LoraConfig, check_pattern};
pub use blocks::Blocks;
pub use checkpoint::{Checkpoint, GenerationDefaults};

/// A digest as it is written.
pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
