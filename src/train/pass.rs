//! Forward and backward of one flat step, layer by layer.
//!
//! The forward keeps each layer's input and, for as many layers as the memory allowed takes, the graph the layer recorded. The
//! backward pulls the vector-Jacobian product through one layer at a time and recomputes a layer whose graph was not kept; the
//! result is the same bit for bit. Between any two layers the device can go to somebody else.

use std::collections::HashSet;
use std::ops::Range;

use candle_core::{Tensor, Var};

use super::optim::Gradients;
use super::pack::Pack;
use super::trainer::Pace;
use crate::error::{Error, Result};
use crate::model::{Attend, Decoder, LoraParams, LoraRows};
use crate::ops::{pull, token_logprobs};

/// Response rows whose log-probs are computed between two calls of [`Pace`]: the head is as dear as many layers, so it is cut up.
const HEAD_ROWS_CPU: usize = 64;
const HEAD_ROWS_GPU: usize = 2048;

/// A model with the variables that are trained on it.
pub(crate) struct Pass<'a> {
    /// The base.
    pub(crate) model: &'a Decoder,
    /// The adapter's variables.
    pub(crate) params: &'a LoraParams,
    /// Seed of this pass's dropout masks.
    pub(crate) dropout_seed: Option<u64>,
    /// Memory for kept layer graphs, bytes.
    pub(crate) keep_bytes: usize,
}

/// What the forward leaves of a layer: its input and, if it was kept, its output with the graph behind it.
struct Tape {
    input: Tensor,
    output: Option<Tensor>,
}

/// What a pass used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PassStats {
    /// Layers whose graph was kept.
    pub(crate) kept_layers: usize,
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
        let layers = model.config().num_hidden_layers;
        let rotary = model.rotary(&pack.mask.positions)?;
        let attend = Attend::Causal(&pack.mask);
        let lora = LoraRows::Train { params: self.params, dropout_seed: self.dropout_seed };

        // (N, C); nothing below the first layer is trained, so its input is no variable.
        let mut x = model.embed(&pack.ids)?.detach();
        let mut tapes: Vec<Tape> = Vec::with_capacity(layers);
        let mut kept = layers;
        let mut layer_bytes = 0;
        for layer in 0..layers {
            pace()?;
            let input = if layer == 0 { x } else { Var::from_tensor(&x)?.into_inner() };
            let output = model.layer(layer, &input, &rotary, attend, lora)?;
            x = output.detach();
            // The first layer's graph has no branch into its input, so the second one is the measure of all.
            if layer == 1.min(layers - 1) {
                layer_bytes = graph_bytes(&output);
                kept = layers.min(self.keep_bytes / layer_bytes.max(1));
                if kept < layers {
                    tapes.iter_mut().for_each(|tape| tape.output = None);
                }
            }
            let output = (layer + kept >= layers).then_some(output);
            tapes.push(Tape { input, output });
        }
        let input_bytes = x.elem_count() * x.dtype().size_in_bytes();
        let stats = PassStats { kept_layers: kept, activation_bytes: kept * layer_bytes + layers * input_bytes };

        let mut dy = self.head_backward(&x, pack, upstream, pace)?;
        let places = self.variables_by_layer(layers);
        let mut variables = self.params.sites.values().flat_map(|(a, b)| [a, b]).enumerate().collect::<Vec<_>>();
        for layer in (0..layers).rev() {
            pace()?;
            let tape = tapes.pop().expect("the forward left one tape a layer. This is a bug.");
            let output = match tape.output {
                Some(output) => output,
                None => model.layer(layer, &tape.input, &rotary, attend, lora)?,
            };
            let found = vector_jacobian(&output, &dy)?;
            for (index, variable) in variables.drain(places[layer].clone()) {
                let gradient = found.get(variable).ok_or_else(|| {
                    Error::internal(format!(
                        "no gradient reached LoRA variable {index} of layer {layer}. This is a bug."
                    ))
                })?;
                gradients.add(index, gradient)?;
            }
            if layer > 0 {
                dy = gradient_of(&found, &tape.input, "a layer's input")?;
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
        let mut parts = Vec::new();
        let mut logprobs = Vec::with_capacity(pack.rows.len());
        for range in head_ranges(model, pack.rows.len()) {
            pace()?;
            let part = Var::from_tensor(&normed.narrow(0, range.start, range.len())?.detach())?;
            let values = token_logprobs(part.as_tensor(), model.head()?, &pack.targets[range])?;
            logprobs.extend(values.to_vec1::<f32>()?);
            parts.push((part, values));
        }
        let upstream = upstream(&logprobs)?;
        let mut start = 0;
        let mut d_normed = Vec::with_capacity(parts.len());
        for (part, values) in parts {
            pace()?;
            let len = values.elem_count();
            let scalars = Tensor::from_slice(&upstream[start..start + len], len, model.device())?;
            d_normed.push(gradient_of(&vector_jacobian(&values, &scalars)?, part.as_tensor(), "the head's input")?);
            start += len;
        }
        let found = vector_jacobian(&normed, &Tensor::cat(&d_normed, 0)?)?;
        gradient_of(&found, hidden.as_tensor(), "the last layer's output")
    }

    /// Which of the variables, in order (layer, site, A before B), belong to each layer.
    fn variables_by_layer(&self, layers: usize) -> Vec<Range<usize>> {
        let mut end = 0;
        (0..layers)
            .map(|layer| {
                let start = end;
                end += 2 * self.params.sites.range((layer, 0)..(layer + 1, 0)).count();
                start..end
            })
            .collect()
    }
}

/// Log-probs of the pack's targets without gradients. Runs the same operations as the training forward, so that a policy equal to
/// the reference has the same bits.
pub(crate) fn logprobs(model: &Decoder, pack: &Pack, lora: LoraRows<'_>, pace: &mut Pace<'_>) -> Result<Vec<f32>> {
    let rotary = model.rotary(&pack.mask.positions)?;
    let mut x = model.embed(&pack.ids)?.detach();
    for layer in 0..model.config().num_hidden_layers {
        pace()?;
        x = model.layer(layer, &x, &rotary, Attend::Causal(&pack.mask), lora)?.detach();
    }
    let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), model.device())?;
    let normed = model.final_norm(&x.index_select(&rows, 0)?)?.detach();
    let mut values = Vec::with_capacity(pack.rows.len());
    for range in head_ranges(model, pack.rows.len()) {
        pace()?;
        let part = normed.narrow(0, range.start, range.len())?.contiguous()?;
        values.extend(token_logprobs(&part, model.head()?, &pack.targets[range])?.to_vec1::<f32>()?);
    }
    Ok(values)
}

fn head_ranges(model: &Decoder, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let size = if model.device().is_cpu() { HEAD_ROWS_CPU } else { HEAD_ROWS_GPU };
    (0..rows).step_by(size).map(move |start| start..rows.min(start + size))
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
