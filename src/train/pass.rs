//! Forward and backward of one flat step, one residual block (attention or MLP) after the other.
//!
//! The forward keeps each block's input and, for as many blocks as the memory allowed takes, the graph the block recorded. The
//! backward pulls the vector-Jacobian product through one block at a time and recomputes a block whose graph was not kept; the
//! result is the same bit for bit. Between any two blocks the device can go to somebody else.

use std::collections::HashSet;

use candle_core::{Tensor, Var};

use super::optim::Gradients;
use super::pack::Pack;
use super::trainer::Pace;
use crate::error::{Error, Result};
use crate::model::{Attend, Decoder, LoraParams, LoraRows};
use crate::ops::{pull, token_logprobs};

/// A model with the variables that are trained on it.
pub(crate) struct Pass<'a> {
    /// The base.
    pub(crate) model: &'a Decoder,
    /// The adapter's variables.
    pub(crate) params: &'a LoraParams,
    /// Seed of this pass's dropout masks.
    pub(crate) dropout_seed: Option<u64>,
    /// Memory for kept graphs, bytes.
    pub(crate) keep_bytes: usize,
}

/// What the forward leaves of a block: its input and, if it was kept, its output with the graph behind it.
struct Tape {
    input: Tensor,
    output: Option<Tensor>,
}

/// What a pass used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PassStats {
    /// Blocks whose graph was kept.
    pub(crate) kept_blocks: usize,
    /// Bytes of the kept graphs and inputs.
    pub(crate) activation_bytes: usize,
}

impl Pass<'_> {
    /// Log-probs of the pack's targets, their upstream gradients from `upstream` (log-probs, (T) → one scalar each, (T)), and the
    /// gradients of the variables added to `gradients`.
    pub(crate) fn forward_backward(
        &self,
        pack: &Pack,
        upstream: &mut dyn FnMut(&[f32]) -> Result<Vec<f32>>,
        gradients: &mut Gradients,
        pace: &mut Pace<'_>,
    ) -> Result<PassStats> {
        let model = self.model;
        let blocks = model.num_blocks();
        let rotary = model.rotary(&pack.mask.positions)?;
        let attend = Attend::Causal(&pack.mask);
        let lora = LoraRows::Train { params: self.params, dropout_seed: self.dropout_seed };

        // (N, C); nothing below the first block is trained, so its input is no variable.
        let mut x = model.embed(&pack.ids)?.detach();
        let mut tapes: Vec<Tape> = Vec::with_capacity(blocks);
        let measured = blocks.min(4) - 2;
        let mut kept_from = 0;
        let mut layer_bytes = 0;
        for block in 0..blocks {
            turn(model, pace)?;
            let input = if block == 0 { x } else { Var::from_tensor(&x)?.into_inner() };
            let output = model.block(block, &input, &rotary, attend, lora)?;
            x = output.detach();
            // The first block's graph has no branch into its input, so the second layer is the measure of all.
            if (measured..measured + 2).contains(&block) {
                layer_bytes += graph_bytes(&output);
            }
            if block == measured + 1 {
                kept_from = blocks.saturating_sub(2 * self.keep_bytes / layer_bytes.max(1));
                tapes.iter_mut().take(kept_from).for_each(|tape| tape.output = None);
            }
            tapes.push(Tape { input, output: (block >= kept_from).then_some(output) });
        }
        let kept_blocks = blocks - kept_from;
        let input_bytes = x.elem_count() * x.dtype().size_in_bytes();
        let stats = PassStats { kept_blocks, activation_bytes: kept_blocks * layer_bytes / 2 + blocks * input_bytes };

        let mut dy = self.head_backward(&x, pack, upstream, pace)?;
        let counts = self.params.counts(blocks);
        let mut variables = self.params.sites.values().flat_map(|(a, b)| [a, b]).enumerate().collect::<Vec<_>>();
        for block in (0..blocks).rev() {
            turn(model, pace)?;
            let tape = tapes.pop().expect("the forward left one tape a block. This is a bug.");
            let output = match tape.output {
                Some(output) => output,
                None => model.block(block, &tape.input, &rotary, attend, lora)?,
            };
            let found = vector_jacobian(&output, &dy)?;
            for (index, variable) in variables.split_off(variables.len() - counts[block]) {
                let gradient = found.get(variable).ok_or_else(|| {
                    Error::internal(format!("no gradient reached LoRA variable {index}. This is a bug."))
                })?;
                gradients.add(index, gradient)?;
            }
            if block > 0 {
                dy = gradient_of(&found, &tape.input, "a block's input")?;
            }
        }
        Ok(stats)
    }

    /// From the last layer's output, (N, C), to the gradient that comes back to it.
    fn head_backward(
        &self,
        hidden: &Tensor,
        pack: &Pack,
        upstream: &mut dyn FnMut(&[f32]) -> Result<Vec<f32>>,
        pace: &mut Pace<'_>,
    ) -> Result<Tensor> {
        let model = self.model;
        let hidden = Var::from_tensor(hidden)?;
        let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), model.device())?;
        // (T, C)
        let normed = model.final_norm(&hidden.as_tensor().index_select(&rows, 0)?)?;
        let values = token_logprobs(&normed, model.head()?, &pack.targets, pace)?;
        let upstream = upstream(&values.to_vec1::<f32>()?)?;
        let found = vector_jacobian(&values, &Tensor::from_vec(upstream, values.shape(), model.device())?)?;
        gradient_of(&found, hidden.as_tensor(), "the last layer's output")
    }
}

/// Log-probs of the pack's targets without gradients. Runs the same operations as the training forward, so that a policy equal to
/// the reference has the same bits.
pub(crate) fn logprobs(model: &Decoder, pack: &Pack, lora: LoraRows<'_>, pace: &mut Pace<'_>) -> Result<Vec<f32>> {
    let rotary = model.rotary(&pack.mask.positions)?;
    let mut x = model.embed(&pack.ids)?.detach();
    for block in 0..model.num_blocks() {
        turn(model, pace)?;
        x = model.block(block, &x, &rotary, Attend::Causal(&pack.mask), lora)?.detach();
    }
    let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), model.device())?;
    let normed = model.final_norm(&x.index_select(&rows, 0)?)?.detach();
    Ok(token_logprobs(&normed, model.head()?, &pack.targets, pace)?.to_vec1::<f32>()?)
}

/// The end of a turn on the device. A GPU runs behind the thread that feeds it, so what was asked of it is done first: else the next
/// to have the device would wait behind a queue of this one's work.
fn turn(model: &Decoder, pace: &mut Pace<'_>) -> Result<()> {
    model.device().synchronize()?;
    pace()
}

/// Gradients of `Σ y ⊙ dy` by every variable behind `y`.
fn vector_jacobian(y: &Tensor, dy: &Tensor) -> Result<candle_core::backprop::GradStore> {
    Ok(pull(y, dy)?.backward()?)
}

fn gradient_of(found: &candle_core::backprop::GradStore, variable: &Tensor, name: &str) -> Result<Tensor> {
    match found.get(variable) {
        Some(gradient) => Ok(gradient.detach()),
        None => Err(Error::internal(format!("no gradient reached {name}. This is a bug."))),
    }
}

/// Bytes of the distinct tensors in the graph behind `output`, variables left out.
fn graph_bytes(output: &Tensor) -> usize {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for node in output.sorted_nodes() {
        let (storage, _) = node.storage_and_layout();
        if !node.is_variable() && seen.insert(std::ptr::from_ref(&*storage).addr()) {
            bytes += node.elem_count() * node.dtype().size_in_bytes();
        }
    }
    bytes
}
