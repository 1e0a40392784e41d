//! The pool of key/value blocks: memory only; who owns which block is the engine's business.

use candle_core::{DType, Device, Tensor};

use super::ModelConfig;
use crate::error::{Error, Result};
use crate::ops::KvLayer;

/// One [`KvLayer`] per decoder layer, all with the same number of blocks.
pub struct KvPool {
    /// Per decoder layer.
    pub layers: Vec<KvLayer>,
    /// Blocks per layer.
    pub num_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
}

impl KvPool {
    /// Bytes one block takes over all layers.
    pub fn block_bytes(config: &ModelConfig, block_size: usize, dtype: DType) -> usize {
        let row = config.num_key_value_heads * config.head_dim;
        2 * config.num_hidden_layers * block_size * row * dtype.size_in_bytes()
    }

    /// Allocates `num_blocks` zeroed blocks per layer.
    pub fn new(
        config: &ModelConfig,
        num_blocks: usize,
        block_size: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if num_blocks == 0 || block_size == 0 {
            return Err(Error::invalid("kv_cache.memory", "The key/value cache must hold at least one block."));
        }
        let shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim);
        let layers = (0..config.num_hidden_layers)
            .map(|_| Ok(KvLayer { k: Tensor::zeros(shape, dtype, device)?, v: Tensor::zeros(shape, dtype, device)? }))
            .collect::<Result<Vec<_>>>()?;
        Ok(KvPool { layers, num_blocks, block_size })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.layers.iter().map(|layer| of(&layer.k) + of(&layer.v)).sum()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_takes_what_its_blocks_take() {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let block = KvPool::block_bytes(&config, 16, DType::F32);
        assert_eq!(block, 3 * 2 * 16 * 2 * 8 * 4);
        assert_eq!(KvPool::block_bytes(&config, 16, DType::BF16), block / 2);
        let pool = KvPool::new(&config, 5, 16, DType::F32, &Device::Cpu).unwrap();
        assert_eq!((pool.layers.len(), pool.bytes()), (3, 5 * block));
        assert!(KvPool::new(&config, 0, 16, DType::F32, &Device::Cpu).is_err());
    }
}
