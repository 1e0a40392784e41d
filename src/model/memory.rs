//! What adapters and their training take of the device's memory, before any of it is allocated.

use candle_core::DType;

use super::layer::site_shape;
use super::lora::{SITES, module_path};
use super::{Decoder, ModelConfig};
use crate::ops::logprobs_scratch_bytes;
use crate::weights::LoraConfig;

/// Fewest rows of a flat step: shorter ones waste the device.
const LEAST_ROWS: usize = 512;
/// Most rows of a flat step on a GPU; a CPU gains little beyond the fewest.
const MOST_ROWS: usize = 16384;

/// How large the steps of a run may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingSize {
    /// Most tokens of prompt + answer.
    pub max_length: usize,
    /// Pairs per forward-backward.
    pub batch_size: usize,
    /// Bytes for tapes kept between forward and backward.
    pub keep_bytes: usize,
}

/// Bytes that training an adapter takes at most, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainingMemory {
    /// A and B, their gradients and both moments, f32.
    pub optimizer: usize,
    /// Tapes kept between forward and backward.
    pub graphs: usize,
    /// All else of a step: the inputs of every block, the block under way with its gradients, the head's chunk.
    pub step: usize,
    /// The frozen copy that is published.
    pub copy: usize,
}

impl TrainingMemory {
    /// What the layers' work takes.
    pub fn activations(&self) -> usize {
        self.graphs + self.step
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.optimizer + self.activations() + self.copy
    }
}

impl Decoder {
    /// Bytes of a published adapter of that shape, as [`super::Adapter`] holds it.
    pub fn adapter_bytes(&self, lora: &LoraConfig) -> usize {
        lora_parameters(self.layers_root(), self.config(), lora) * self.linear(0, 0).low_rank_dtype().size_in_bytes()
    }

    /// What training such an adapter in steps of such a size takes at most: every pair as long as it may be, its prompt as short.
    pub fn training_memory(&self, lora: &LoraConfig, size: &TrainingSize) -> TrainingMemory {
        let (config, on_cpu) = (self.config(), self.device().is_cpu());
        // A prompt of next to nothing with both answers behind it.
        let pair = 2 * size.max_length.min(config.max_position_embeddings);
        let rows = pair.max((pair * size.batch_size).min(flat_step_rows(self, size.keep_bytes)));
        let layers = config.num_hidden_layers;
        let input = rows * config.hidden_size * self.compute_dtype().size_in_bytes();
        let [attention, mlp] =
            kept_values(config, on_cpu).map(|values| self.compute_dtype().size_in_bytes() * values * rows);
        let graphs = (layers * (attention + mlp)).min(size.keep_bytes);
        // What the block under way keeps and the gradients along it are alike in size. The head works on the rows of the answers,
        // which are nearly all: its input, normed and as gradients, and what comes back.
        let block = 2 * attention.max(mlp) + if on_cpu { 0 } else { input };
        let head = 6 * input + logprobs_scratch_bytes(rows, config.vocab_size, on_cpu);
        // The first two layers are held to be measured before it is known how many may stay.
        let measured = (layers.min(2) * (attention + mlp)).saturating_sub(graphs) + 5 * input;
        TrainingMemory {
            optimizer: 4 * lora_parameters(self.layers_root(), self.config(), lora) * DType::F32.size_in_bytes(),
            graphs,
            step: (2 * layers * input + block.max(head)).max(measured),
            copy: self.adapter_bytes(lora),
        }
    }
}

/// Numbers in A and B of all sites; `root` is where the layers are.
fn lora_parameters(root: &str, config: &ModelConfig, lora: &LoraConfig) -> usize {
    let of = |layer: usize, site: usize| {
        let (input, out) = site_shape(config, site);
        lora.rank_and_scale(&module_path(root, layer, site)).0 * (input + out)
    };
    let targets = |site: &usize| lora.target_modules.iter().any(|name| name == SITES[*site]);
    let layers = 0..config.num_hidden_layers;
    layers.map(|layer| (0..SITES.len()).filter(targets).map(|site| of(layer, site)).sum::<usize>()).sum()
}

/// Numbers that the way back through a layer's attention and through its MLP reads of a row, but for the blocks' inputs: what linears,
/// attention, the gate and norms within the block were given, and two numbers of each softmax. On a GPU what norms and the gate made is
/// made again.
fn kept_values(config: &ModelConfig, on_cpu: bool) -> [usize; 2] {
    let heads = config.num_attention_heads * config.head_dim;
    let kv_heads = config.num_key_value_heads * config.head_dim;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let after = if config.gemma_norms { hidden } else { 0 };
    let normed = if config.qk_norm { heads + kv_heads } else { 0 };
    let again = if on_cpu { [hidden, hidden + inner] } else { [0, 0] };
    [
        again[0] + 2 * heads + 2 * kv_heads + 2 * config.num_attention_heads + normed + after,
        again[1] + 2 * inner + after,
    ]
}

/// Rows of a flat step whose layers' tapes fit `bytes`. Longer steps gain little on a CPU, so memory decides. A function of the
/// options and the model alone: the packing decides the order of additions, which a resumed run must repeat.
pub(crate) fn flat_step_rows(model: &Decoder, bytes: usize) -> usize {
    rows_within(bytes, model.config(), model.compute_dtype(), model.device().is_cpu())
}

fn rows_within(bytes: usize, config: &ModelConfig, dtype: DType, on_cpu: bool) -> usize {
    let per_row = dtype.size_in_bytes() * kept_values(config, on_cpu).iter().sum::<usize>() * config.num_hidden_layers;
    (bytes / per_row.max(1)).clamp(LEAST_ROWS, if on_cpu { LEAST_ROWS } else { MOST_ROWS })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(layers: usize) -> ModelConfig {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
        });
        ModelConfig::from_json(&config).unwrap()
    }

    #[test]
    fn parameters_follow_targets_and_patterns() {
        let mut lora = LoraConfig {
            r: 2,
            lora_alpha: 4.0,
            lora_dropout: 0.0,
            target_modules: vec!["q_proj".into(), "down_proj".into()],
            use_rslora: false,
            rank_pattern: Default::default(),
            alpha_pattern: Default::default(),
            base_model_name_or_path: None,
        };
        let (q, down) = (32 + 32, 80 + 32);
        assert_eq!(lora_parameters("model.", &config(3), &lora), 3 * 2 * (q + down));
        lora.rank_pattern.insert("layers.1.self_attn.q_proj".into(), 5);
        assert_eq!(lora_parameters("model.", &config(3), &lora), 3 * 2 * (q + down) + 3 * q);
    }

    #[test]
    fn flat_steps_grow_with_the_memory_on_a_gpu_only() {
        let per_row = 2 * (2 * 32 + 2 * 16 + 2 * 4 + 2 * 80) * 3;
        let rows = |bytes, on_cpu| rows_within(bytes, &config(3), DType::BF16, on_cpu);
        assert_eq!(rows(700 * per_row, false), 700);
        assert_eq!(rows(700 * per_row, true), LEAST_ROWS);
        assert_eq!(rows(usize::MAX / 2, false), MOST_ROWS);
    }
}
