//! Rotary embedding (arXiv 2104.09864), gated activation (arXiv 2002.05202) and seeded dropout.

use candle_core::Tensor;

use crate::error::Result;

/// The gate's activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x·σ(x)`.
    Silu,
    /// Gaussian error linear unit, tanh approximation.
    GeluTanh,
}

/// `act(gate) ⊙ up`. gate, up: (N, F) → (N, F). Differentiable in both.
pub fn gated(_gate: &Tensor, _up: &Tensor, _activation: Activation) -> Result<Tensor> {
    todo!()
}

/// Rotates pairs `(i, i + D/2)` of each head (Hugging Face's half-split layout). x: (N, H, D); cos, sin: (N, D/2), f32, already
/// picked for the tokens' positions. Differentiable in `x`.
pub fn rope(_x: &Tensor, _cos: &Tensor, _sin: &Tensor) -> Result<Tensor> {
    todo!()
}

/// Inverted dropout with probability `p`, whose mask is a function of `seed` and the element index alone, so that a recomputed
/// layer sees the same mask. Differentiable in `x`.
pub fn dropout(_x: &Tensor, _p: f32, _seed: u64) -> Result<Tensor> {
    todo!()
}
