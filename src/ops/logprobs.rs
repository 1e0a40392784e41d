//! Log-probabilities of given tokens without the `(N, V)` logits.

use candle_core::Tensor;

use crate::error::Result;

use super::FrozenLinear;

/// `log softmax(hidden·Wᵀ)[target]` in row chunks. hidden: (T, C) after the final norm; head: (V, C); targets: T ids → (T), f32, nats.
/// Differentiable in `hidden`: when it records a graph, the unit gradient of each row is computed in the same pass (its upstream
/// gradient is one scalar a row), so the backward multiplies and recomputes nothing.
pub fn token_logprobs(_hidden: &Tensor, _head: &FrozenLinear, _targets: &[u32]) -> Result<Tensor> {
    todo!()
}
