//! The decoder: embedding, layers, final norm, head.

use candle_core::{DType, Device, Tensor};

use super::{KvPool, LoraRows, ModelConfig};
use crate::error::Result;
use crate::ops::{CausalMask, FrozenLinear, PagedBatch};
use crate::weights::Checkpoint;

/// How the tokens of a flat step see each other.
#[derive(Clone, Copy)]
pub enum Attend<'a> {
    /// Training and scoring without a cache.
    Causal(&'a CausalMask),
    /// Serving: new tokens are written to the pool, then attend over it.
    Paged {
        /// The cache.
        pool: &'a KvPool,
        /// Where this step's tokens go.
        batch: &'a PagedBatch,
    },
}

/// Where and in what width to hold the weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Device of the weights.
    pub device: Device,
    /// Width of the linear weights. On the CPU activations are f32 whatever this is; on a GPU they have this dtype.
    pub dtype: DType,
}

/// A loaded model. Immutable; shared by every role and by training.
pub struct Decoder {}

impl Decoder {
    /// Loads every tensor of the checkpoint; names the tensor when one is missing or has the wrong shape.
    pub fn load(_checkpoint: &Checkpoint, _options: &LoadOptions) -> Result<Self> {
        todo!()
    }

    /// Its shape and flags.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// Device of the weights.
    pub fn device(&self) -> &Device {
        todo!()
    }

    /// Dtype of activations.
    pub fn compute_dtype(&self) -> DType {
        todo!()
    }

    /// Bytes of weights held.
    pub fn bytes(&self) -> usize {
        todo!()
    }

    /// Token embeddings, scaled where the architecture scales them. N ids → (N, C).
    pub fn embed(&self, _ids: &[u32]) -> Result<Tensor> {
        todo!()
    }

    /// Rotary tables for the positions of a step, computed once a step and passed to every layer.
    pub fn rotary(&self, _positions: &[u32]) -> Result<Rotary> {
        todo!()
    }

    /// One layer. x: (N, C) → (N, C).
    pub fn layer(
        &self,
        _index: usize,
        _x: &Tensor,
        _rotary: &Rotary,
        _attend: Attend<'_>,
        _lora: LoraRows<'_>,
    ) -> Result<Tensor> {
        todo!()
    }

    /// Final norm. x: (N, C) → (N, C).
    pub fn final_norm(&self, _x: &Tensor) -> Result<Tensor> {
        todo!()
    }

    /// The whole body: embed, every layer, final norm. `between_layers` is called before each layer and may stop the run.
    pub fn forward(
        &self,
        _ids: &[u32],
        _positions: &[u32],
        _attend: Attend<'_>,
        _lora: LoraRows<'_>,
        _between_layers: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        todo!()
    }

    /// The language-model head `(V, C)`, for [`crate::ops::token_logprobs`].
    pub fn head(&self) -> Result<&FrozenLinear> {
        todo!()
    }

    /// Logits in f32. hidden: (M, C) after the final norm → (M, V).
    pub fn logits(&self, _hidden: &Tensor) -> Result<Tensor> {
        todo!()
    }

    /// Raw score of a sequence-classification head with one label, in f32. hidden: (M, C) after the final norm → M scores.
    pub fn scores(&self, _hidden: &Tensor) -> Result<Vec<f32>> {
        todo!()
    }
}

/// Cosines and sines of a step's positions, for global and for sliding layers.
pub struct Rotary {}
