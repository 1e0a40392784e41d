//! A model on disk, whatever its format: configuration, tensors by Hugging Face name, tokenizer, chat template.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// What the text side needs: everything comes as Hugging Face's own files do, also from a GGUF file.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// The text of `tokenizer.json`; built from the vocabulary in the metadata for a GGUF file.
    pub tokenizer_json: String,
    /// Jinja source, if the checkpoint has one.
    pub chat_template: Option<String>,
    /// Text of the BOS token, if there is one (templates name it).
    pub bos_token: Option<String>,
    /// Text of the EOS token.
    pub eos_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// Whether plain-text prompts get BOS in front.
    pub add_bos_token: bool,
    /// All ids that end generation (generation_config, config, the template's end-of-turn).
    pub eos_token_ids: Vec<u32>,
}

/// `generation_config.json`'s sampling defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<usize>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// An open checkpoint; tensors are read on demand.
pub struct Checkpoint {}

impl Checkpoint {
    /// Opens a `.gguf` file, a folder holding exactly one, or a Hugging Face folder. A truncated or unreadable file is a 422
    /// naming the file.
    pub fn open(_path: &Path) -> Result<Self> {
        todo!()
    }

    /// Canonical path: two roles naming the same one share the weights.
    pub fn path(&self) -> &PathBuf {
        todo!()
    }

    /// The model's configuration in the shape of Hugging Face's `config.json`.
    pub fn config(&self) -> &serde_json::Value {
        todo!()
    }

    /// Tokenizer, special tokens, template.
    pub fn tokenizer(&self) -> Result<TokenizerFiles> {
        todo!()
    }

    /// Sampling defaults.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        todo!()
    }

    /// Whether a tensor of that Hugging Face name exists.
    pub fn has(&self, _name: &str) -> bool {
        todo!()
    }

    /// Hugging Face names of all tensors.
    pub fn names(&self) -> Vec<String> {
        todo!()
    }

    /// A tensor by Hugging Face name in Hugging Face layout (GGUF's permuted Llama q/k rows are put back), converted to `dtype`;
    /// 422 naming the tensor when missing or not of `shape`.
    pub fn get(&self, _name: &str, _shape: &[usize], _dtype: DType, _device: &Device) -> Result<Tensor> {
        todo!()
    }

    /// What the weights are stored as, e.g. `Q4_1`, `BF16`.
    pub fn stored_dtype(&self) -> String {
        todo!()
    }
}
