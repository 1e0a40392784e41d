//! File formats: GGUF, Hugging Face folders, PEFT adapters. Nobody else knows them.

mod adapter;
mod blocks;
mod checkpoint;
mod gguf;
mod gguf_tokenizer;
mod hf;

pub use adapter::{AdapterFile, LoraConfig, check_pattern};
pub use blocks::Blocks;
pub use checkpoint::{Checkpoint, GenerationDefaults};
