//! The pool of key/value blocks: memory only; who owns which block is the engine's business.

use candle_core::{DType, Device};

use super::ModelConfig;
use crate::error::Result;
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
    pub fn block_bytes(_config: &ModelConfig, _block_size: usize, _dtype: DType) -> usize {
        todo!()
    }

    /// Allocates `num_blocks` zeroed blocks per layer.
    pub fn new(
        _config: &ModelConfig,
        _num_blocks: usize,
        _block_size: usize,
        _dtype: DType,
        _device: &Device,
    ) -> Result<Self> {
        todo!()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        todo!()
    }
}
