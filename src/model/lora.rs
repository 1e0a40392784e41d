//! Low-rank adapters (arXiv 2106.09685): variables while training, deep frozen copies once published.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::{Decoder, ModelConfig};
use crate::error::Result;
use crate::ops::FrozenLinear;
use crate::weights::{AdapterFile, LoraConfig};

/// Linears of a layer that may carry LoRA, by their Hugging Face names.
pub const SITES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A published adapter: frozen deep copies, safe to serve while training goes on. Holding an `Arc` of it is the lease.
pub struct Adapter {
    /// SHA-256 in hex over config and weights; seeds the prefix cache.
    pub generation: String,
    /// The PEFT configuration.
    pub config: LoraConfig,
    /// Bytes held.
    pub bytes: usize,
    /// `(layer, index into SITES)` → A: (R, in), B: (out, R), already scaled.
    pub sites: BTreeMap<(usize, usize), (FrozenLinear, FrozenLinear)>,
}

impl Adapter {
    /// Checks every tensor against the model (422 naming the tensor) and copies it.
    pub fn from_file(_file: &AdapterFile, _model: &Decoder) -> Result<Self> {
        todo!()
    }
}

/// Trainable A and B in f32.
pub struct LoraParams {
    /// The PEFT configuration.
    pub config: LoraConfig,
    /// `(layer, index into SITES)` → A: (R, in), B: (out, R).
    pub sites: BTreeMap<(usize, usize), (Var, Var)>,
}

impl LoraParams {
    /// A from kaiming-uniform(a = √5) by `seed`, B zero; a target name the model does not have is an error naming it.
    pub fn new(_config: &LoraConfig, _model: &Decoder, _seed: u64) -> Result<Self> {
        todo!()
    }

    /// Continues from a stored adapter.
    pub fn from_file(_file: &AdapterFile, _model: &Decoder) -> Result<Self> {
        todo!()
    }

    /// Deep copies under PEFT's tensor names.
    pub fn to_file(&self, _model: &ModelConfig) -> Result<AdapterFile> {
        todo!()
    }

    /// Variables in a fixed order (layer, site, A before B) with PEFT's names.
    pub fn named(&self) -> Vec<(String, Var)> {
        todo!()
    }
}

/// Contiguous rows of a flat step under one adapter.
#[derive(Clone)]
pub struct RowGroup {
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
    /// The adapter; `None` for the base.
    pub adapter: Option<Arc<Adapter>>,
}

/// Which low-rank parts a step's rows get.
#[derive(Clone, Copy)]
pub enum LoraRows<'a> {
    /// The base model for all rows.
    Base,
    /// Serving: groups that cover all rows in order.
    Served(&'a [RowGroup]),
    /// Training: the variables for all rows; `dropout_seed` turns dropout on (a function of seed, layer, site, element).
    Train {
        /// The variables.
        params: &'a LoraParams,
        /// Seed of this pass's dropout masks; `None` turns dropout off.
        dropout_seed: Option<u64>,
    },
}

impl LoraRows<'_> {
    /// `base(x)` plus the low-rank part of the rows' adapter. x: (N, in) → (N, out).
    pub fn linear(&self, _layer: usize, _site: usize, _base: &FrozenLinear, _x: &Tensor) -> Result<Tensor> {
        todo!()
    }
}
