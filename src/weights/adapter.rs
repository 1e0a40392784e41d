//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The part of PEFT's LoraConfig this server honours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training.
    pub lora_dropout: f32,
    /// Sites by Hugging Face name.
    pub target_modules: Vec<String>,
    /// Scale by `alpha / √r`.
    pub use_rslora: bool,
    /// Module-name pattern → rank.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Module-name pattern → alpha.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Name of the base model, for the reader.
    pub base_model_name_or_path: Option<String>,
}

impl LoraConfig {
    /// Rank and scale of the module at `path` (`model.layers.0.self_attn.q_proj`), patterns applied as PEFT does.
    pub fn rank_and_scale(&self, _path: &str) -> (usize, f64) {
        todo!()
    }
}

/// An adapter as it lies on disk: configuration and f32 tensors under PEFT's names.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// The configuration.
    pub config: LoraConfig,
    /// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → tensor.
    pub tensors: BTreeMap<String, Tensor>,
}

impl AdapterFile {
    /// Reads a folder. What cannot be honoured (DoRA, modules_to_save, PiSSA-style init …) is a 422 naming the key or tensor.
    pub fn read(_folder: &Path) -> Result<Self> {
        todo!()
    }

    /// Writes a folder aside, syncs it and renames it into place; deterministic bytes.
    pub fn write(&self, _folder: &Path) -> Result<()> {
        todo!()
    }

    /// SHA-256 in hex over configuration and weights.
    pub fn generation(&self) -> Result<String> {
        todo!()
    }
}
