//! What a checkpoint's `config.json` says, as flags of the one decoder.

use crate::error::Result;

/// Native architectures; each is a set of flags in [`ModelConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama, SmolLM2, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5: bias on q, k, v.
    Qwen2,
    /// Qwen3: RMS norm on each head's q and k.
    Qwen3,
    /// Gemma 3 text.
    Gemma3,
}

/// Frequency scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3's banded scaling.
    Llama3 {
        /// Divisor of the low band.
        factor: f64,
        /// Low band border.
        low_freq_factor: f64,
        /// High band border.
        high_freq_factor: f64,
        /// Context the model was first trained with, tokens.
        original_context: usize,
    },
}

/// Shape and flags of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which family it is.
    pub architecture: Architecture,
    /// V, tokens.
    pub vocab_size: usize,
    /// C.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// H.
    pub num_attention_heads: usize,
    /// K.
    pub num_key_value_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Added under the root of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies (of global layers, where layers differ).
    pub rope_theta: f64,
    /// Base of the rotary frequencies of sliding layers, where it differs.
    pub rope_local_theta: Option<f64>,
    /// Rotary scaling (of global layers, where layers differ).
    pub rope_scaling: Option<RopeScaling>,
    /// Longest context, tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Bias on q, k, v projections.
    pub qkv_bias: bool,
    /// RMS norm over each head of q and k.
    pub qk_norm: bool,
    /// Gemma: norms after attention and MLP too, `(1 + w)` weights, embedding scaled by √C.
    pub gemma_norms: bool,
    /// The gate's activation.
    pub activation: crate::ops::Activation,
    /// Softmax scale; `1/√D` unless the checkpoint says otherwise.
    pub attention_scale: f32,
    /// Sliding window in tokens, for the layers where `is_sliding` holds.
    pub sliding_window: Option<usize>,
    /// Per layer: attends within the sliding window only.
    pub is_sliding: Vec<bool>,
    /// Labels of a sequence-classification head; 0 for a language model.
    pub num_labels: usize,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json` (a GGUF file's metadata arrives in the same shape).
    pub fn from_json(_config: &serde_json::Value) -> Result<Self> {
        todo!()
    }
}
