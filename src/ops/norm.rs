//! Root-mean-square normalization (arXiv 1910.07467).

use candle_core::Tensor;

use crate::error::Result;

/// `x / sqrt(mean(x²) + eps) · weight` over the last axis. x: (…, C), weight: (C), frozen. Differentiable in `x`.
/// Gemma's `(1 + w)` form is the caller's: it adds one to the weight at load.
pub fn rms_norm(_x: &Tensor, _weight: &Tensor, _eps: f64) -> Result<Tensor> {
    todo!()
}
