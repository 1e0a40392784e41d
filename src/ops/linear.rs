//! Linear layer over a frozen weight: the backward gives `dX = dY·W` and nothing else.

use candle_core::Tensor;

use crate::error::Result;

/// A frozen `(out, in)` weight in its compute form: packed for the kernel on the CPU, a plain tensor on a GPU. Cloning shares it.
#[derive(Clone)]
pub struct FrozenLinear {}

impl FrozenLinear {
    /// Takes a weight `(out, in)` in f32, f16 or bf16 (kept in that width; products accumulate in f32 on the CPU) and an optional
    /// bias `(out)`.
    pub fn new(_weight: &Tensor, _bias: Option<&Tensor>) -> Result<Self> {
        todo!()
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        todo!()
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        todo!()
    }

    /// Bytes of memory it holds.
    pub fn bytes(&self) -> usize {
        todo!()
    }

    /// `x·Wᵀ + b`. x: (N, in) → (N, out). Differentiable in `x` only. Each output row depends on its input row alone, bit for bit.
    pub fn forward(&self, _x: &Tensor) -> Result<Tensor> {
        todo!()
    }

    /// Rows of the weight, as an embedding table. ids: N token ids → (N, in), in the compute dtype.
    pub fn rows(&self, _ids: &[u32]) -> Result<Tensor> {
        todo!()
    }
}
