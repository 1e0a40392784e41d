//! Causal attention over a flat step of several segments, with shared prefixes; forward and backward never store the `(H, N, N)`
//! matrix on the CPU.

use std::ops::Range;

use candle_core::Tensor;

use crate::error::Result;

/// One run of tokens: each sees all of `prefix` (an earlier run of the same step) and, causally, its own run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token of the run, as a row of the flat step.
    pub start: usize,
    /// Tokens in the run.
    pub len: usize,
    /// Rows every token of the run also sees; empty for none.
    pub prefix: Range<usize>,
}

/// Who sees whom in a flat training step, and every token's position (the sliding window counts positions).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalMask {
    /// Runs that cover rows `0..N` in order.
    pub segments: Vec<Segment>,
    /// Position of each row, (N).
    pub positions: Vec<u32>,
}

/// Softmax attention under `mask`. q: (N, H, D); k, v: (N, K, D) with `H % K == 0` → (N, H, D). A key further back than `window`
/// positions (`pos_q − pos_k ≥ window`) is not seen. Differentiable in q, k and v.
pub fn causal_attention(
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _mask: &CausalMask,
    _scale: f32,
    _window: Option<usize>,
) -> Result<Tensor> {
    todo!()
}
