//! Attention over the paged key/value cache. Forward only: a tensor that records a graph is an error.

use candle_core::Tensor;

use crate::error::Result;

/// One layer's cache. k, v: (blocks, block_size, K, D).
#[derive(Clone, Debug)]
pub struct KvLayer {
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// One sequence's part of a flat step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedSequence {
    /// First row of the sequence in the step.
    pub start: usize,
    /// New tokens of the sequence in this step.
    pub len: usize,
    /// Tokens in the cache once this step is written, the new ones included; row `start + i` sees the first `context - len + i + 1`.
    pub context: usize,
    /// The sequence's blocks, in order.
    pub blocks: Vec<u32>,
}

/// Where a flat step's tokens live in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedBatch {
    /// Tokens a block holds.
    pub block_size: usize,
    /// Flat cache slot (`block · block_size + offset`) each row is written to, (N).
    pub slots: Vec<u32>,
    /// The sequences, covering rows `0..N` in order.
    pub sequences: Vec<PagedSequence>,
}

/// Writes k, v: (N, K, D) into the cache in place at `batch.slots`.
pub fn kv_write(_cache: &KvLayer, _k: &Tensor, _v: &Tensor, _batch: &PagedBatch) -> Result<()> {
    todo!()
}

/// Softmax attention of q: (N, H, D) over the cache → (N, H, D). A key `window` or more positions back is not seen.
pub fn paged_attention(
    _q: &Tensor,
    _cache: &KvLayer,
    _batch: &PagedBatch,
    _scale: f32,
    _window: Option<usize>,
) -> Result<Tensor> {
    todo!()
}
