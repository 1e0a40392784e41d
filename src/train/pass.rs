//! Forward and backward of one flat step, one residual block (attention or MLP) after the other.
//!
//! The forward keeps each block's input and, for as many blocks as the memory allowed takes, the tape the block recorded, or at least
//! what attention gave. The backward pulls the vector-Jacobian product through one block at a time and recomputes a block whose tape was
//! not kept; the result is the same bit for bit. Between any two blocks the device can go to somebody else.

use candle_core::{Tensor, Var};

use super::optim::Gradients;
use super::pack::{Pack, check_ids};
use super::trainer::Pace;
use crate::error::{Error, Result};
use crate::model::{Attend, Decoder, LoraParams, LoraRows, tensor_bytes};
use crate::ops::{self, Dear, Lag, Tape, record, record_again, token_logprobs};
use crate::weights::AdapterFile;

/// A model with the variables that are trained on it.
pub(crate) struct Pass<'a> {
    /// The base.
    pub(crate) model: &'a Decoder,
    /// The adapter's variables.
    pub(crate) params: &'a LoraParams,
    /// Seed of this pass's dropout masks.
    pub(crate) dropout_seed: Option<u64>,
    /// Memory for kept tapes, bytes.
    pub(crate) keep_bytes: usize,
}

/// What the forward leaves of a block beside its input.
enum Left {
    /// Its output and the tape between them.
    All(Tensor, Box<Tape>),
    /// What of that tape was dear, or nothing.
    Dear(Vec<Dear>),
}

/// Bytes that a layer's take, or of how many layers, from the last on, they are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kept {
    /// What attention gave.
    dear: usize,
    /// Beside that, the tape of attention.
    attention: usize,
    /// The tape of the MLP.
    mlp: usize,
}

/// What a pass used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PassStats {
    /// Blocks whose tape was kept.
    pub(crate) kept_blocks: usize,
    /// Bytes of the kept tapes and inputs.
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
        let mut variables = self.params.sites.values().flat_map(|(a, b)| [a, b]).enumerate();
        let of_block = |count: usize| variables.by_ref().take(count).collect::<Vec<_>>();
        let of_blocks: Vec<_> = self.params.counts(blocks).into_iter().map(of_block).collect();
        // Nothing below the first block is trained: its input wants no gradient.
        let run = |again: Option<Vec<Dear>>, block: usize, input: &Tensor, variables: &[(usize, &Var)]| {
            let leaves = variables.iter().map(|(_, variable)| variable.as_tensor());
            let leaves = leaves.chain((block > 0).then_some(input));
            let work = || model.block(block, input, &rotary, attend, lora);
            match again {
                Some(dear) => record_again(leaves, dear, work),
                None => record(leaves, work),
            }
        };

        // (N, C)
        let mut x = model.embed(&pack.ids)?.detach();
        let (layers, measured) = (blocks / 2, blocks.min(4) - 2);
        let mut passed: Vec<(Tensor, Left)> = Vec::with_capacity(blocks);
        let mut bytes = Kept::default();
        let mut kept = Kept { dear: layers, attention: layers, mlp: layers };
        let mut lag = Lag::default();
        for (block, variables) in of_blocks.iter().enumerate() {
            turn(model, &mut lag, pace)?;
            let (output, tape) = run(None, block, &x, variables)?;
            // The first block's tape has no way to its input, so the second layer is the measure of all.
            if block == measured {
                bytes.dear = tape.dear().iter().flatten().map(tensor_bytes).sum();
                bytes.attention = tape.bytes() - bytes.dear;
            } else if block == measured + 1 {
                bytes.mlp = tape.bytes();
            }
            let input = std::mem::replace(&mut x, output.clone());
            passed.push((input, Left::All(output, Box::new(tape))));
            if block <= measured {
                continue;
            }
            let mut new = block;
            if block == measured + 1 {
                (kept, new) = (most_kept(bytes, layers, self.keep_bytes), 0);
            }
            for (at, (_, left)) in passed.iter_mut().enumerate().skip(new) {
                let from_last = layers - at / 2;
                if let Left::All(_, tape) = left
                    && from_last > [kept.attention, kept.mlp][at % 2]
                {
                    let dear = if from_last > kept.dear { &[] } else { tape.dear() };
                    *left = Left::Dear(dear.to_vec());
                }
            }
        }
        let of_tapes = kept.dear * bytes.dear + kept.attention * bytes.attention + kept.mlp * bytes.mlp;
        let activation_bytes = of_tapes + blocks * tensor_bytes(&x);
        let stats = PassStats { kept_blocks: kept.attention + kept.mlp, activation_bytes };

        let mut dy = self.head_backward(&x, pack, upstream, pace)?;
        for (block, variables) in of_blocks.iter().enumerate().rev() {
            turn(model, &mut lag, pace)?;
            let (input, left) = passed.pop().expect("the forward left something of every block. This is a bug.");
            let (output, tape) = match left {
                Left::All(output, tape) => (output, *tape),
                Left::Dear(dear) => run(Some(dear), block, &input, variables)?,
            };
            let mut found = tape.backward([(&output, dy)])?;
            for (index, variable) in variables {
                gradients.add(*index, &taken(&mut found, variable.as_tensor(), "a LoRA variable")?)?;
            }
            if block == 0 {
                break;
            }
            dy = taken(&mut found, &input, "a block's input")?;
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
        let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), model.device())?;
        // (T, C)
        let picked = hidden.index_select(&rows, 0)?;
        let (values, tape) =
            record([&picked], || token_logprobs(&model.final_norm(&picked)?, model.head()?, &pack.targets, pace))?;
        let upstream = upstream(&values.to_vec1::<f32>()?)?;
        let mut found = tape.backward([(&values, Tensor::from_vec(upstream, values.shape(), model.device())?)])?;
        let picked = taken(&mut found, &picked, "the rows of the answers")?;
        Ok(hidden.zeros_like()?.index_add(&rows, &picked, 0)?)
    }
}

/// Log-probs of the pack's targets without gradients. Runs the same operations as the training forward, so that a policy equal to
/// the reference has the same bits.
pub(crate) fn logprobs(model: &Decoder, pack: &Pack, lora: LoraRows<'_>, pace: &mut Pace<'_>) -> Result<Vec<f32>> {
    let rotary = model.rotary(&pack.mask.positions)?;
    let mut x = model.embed(&pack.ids)?.detach();
    let mut lag = Lag::default();
    for block in 0..model.num_blocks() {
        turn(model, &mut lag, pace)?;
        x = model.block(block, &x, &rotary, Attend::Causal(&pack.mask), lora)?.detach();
    }
    let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), model.device())?;
    let normed = model.final_norm(&x.index_select(&rows, 0)?)?.detach();
    Ok(token_logprobs(&normed, model.head()?, &pack.targets, pace)?.to_vec1::<f32>()?)
}

/// The end of a turn on the device.
fn turn(model: &Decoder, lag: &mut Lag, pace: &mut Pace<'_>) -> Result<()> {
    lag.turn(model.device())?;
    pace()
}

/// Of how many layers what is kept, where it takes so many `bytes` each. What attention gave is first, which spares most work a byte where
/// sequences are so long that not all fits, then an MLP's tape.
fn most_kept(bytes: Kept, layers: usize, keep_bytes: usize) -> Kept {
    let mut left = keep_bytes;
    let [dear, mlp, attention] = [bytes.dear, bytes.mlp, bytes.attention].map(|bytes| {
        let count = layers.min(left / bytes.max(1));
        left -= count * bytes;
        count
    });
    Kept { dear, mlp, attention: attention.min(dear) }
}

fn taken(found: &mut ops::Gradients, leaf: &Tensor, name: &str) -> Result<Tensor> {
    found.remove(leaf).ok_or_else(|| Error::internal(format!("no gradient reached {name}. This is a bug.")))
}

/// Log-probs of `response` after `prompt`, token by token, in nats, without gradients.
pub fn token_logprobs_of(
    model: &Decoder,
    prompt: &[u32],
    response: &[u32],
    lora: LoraRows<'_>,
    pace: &mut Pace<'_>,
) -> Result<Vec<f32>> {
    if prompt.is_empty() {
        return Err(Error::invalid("prompt", "an empty prompt has no token to predict the response from."));
    }
    check_ids(prompt, model.config(), || "prompt".into())?;
    check_ids(response, model.config(), || "response".into())?;
    if response.is_empty() {
        return Ok(Vec::new());
    }
    logprobs(model, &Pack::single(prompt, response), lora, pace)
}

/// The same under a stored adapter.
pub fn adapter_logprobs(
    model: &Decoder,
    adapter: &AdapterFile,
    prompt: &[u32],
    response: &[u32],
    pace: &mut Pace<'_>,
) -> Result<Vec<f32>> {
    let params = LoraParams::from_file(adapter, model)?;
    token_logprobs_of(model, prompt, response, LoraRows::Train { params: &params, dropout_seed: None }, pace)
}
