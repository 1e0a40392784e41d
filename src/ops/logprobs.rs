//! Log-probabilities of given tokens without the `(N, V)` logits.

use candle_core::{DType, Tensor};

use super::{FrozenLinear, cpu, cuda, tape};
use crate::cores::each;
use crate::error::{Error, Result};
use crate::kernels::cpu::{scale_row, softmax_row};
use crate::kernels::cuda as gpu;

/// Rows of logits held at once: whole microkernels, enough for a quantized head to be worth unpacking (twice a chunk, as dear as 50 rows), and few
/// enough that serving is not kept waiting.
const ROWS_CPU: usize = 96;
/// A vocabulary of 128 k takes half a gigabyte in f32 for so many rows, and several such tensors live at once.
const ROWS_GPU: usize = 1024;

/// Bytes that [`token_logprobs`] holds of one chunk of `rows`, with gradients: on a CPU the logits and the head's scratch for them; composed
/// of candle's ops the logits in their own dtype, and in f32 the logits, their log-softmax with what it is made of, the one-hot and the slopes.
pub(crate) fn logprobs_scratch_bytes(rows: usize, vocabulary: usize, on_cpu: bool) -> usize {
    if on_cpu { 8 * rows.min(ROWS_CPU) * vocabulary } else { 30 * rows.min(ROWS_GPU) * vocabulary }
}

/// `log softmax(hidden·Wᵀ)[target]` in row chunks. hidden: (T, C) after the final norm; head: (V, C); targets: T ids → (T), f32, nats.
/// Differentiable in `hidden`: when it records a graph, the unit gradient of each row is computed in the same pass (its upstream
/// gradient is one scalar a row), so the backward multiplies and recomputes nothing. The head is as dear as many layers: `pace` is
/// called before each of its products, and its error ends the work.
pub fn token_logprobs(
    hidden: &Tensor,
    head: &FrozenLinear,
    targets: &[u32],
    pace: &mut dyn FnMut() -> Result<()>,
) -> Result<Tensor> {
    let (rows, width) = hidden.dims2()?;
    if rows != targets.len() || targets.iter().any(|target| *target as usize >= head.out_features()) {
        return Err(Error::internal(format!(
            "{} targets of a head with {} rows, for {rows} rows",
            targets.len(),
            head.out_features()
        )));
    }
    let plain = hidden.detach().contiguous()?;
    let (mut logprobs, mut units) = (Vec::new(), Vec::new());
    let (on_cpu, wanted) = (plain.device().is_cpu(), tape::tracked(&[hidden]));
    let most = if on_cpu { ROWS_CPU } else { ROWS_GPU };
    // A GPU runs behind the thread that feeds it: what was asked of it is done before somebody else may have it.
    let mut pace = || {
        plain.device().synchronize()?;
        pace()
    };
    for (chunk, targets) in targets.chunks(most).enumerate() {
        let rows = plain.narrow(0, chunk * most, targets.len())?;
        pace()?;
        if on_cpu {
            let mut logits = cpu::with_floats([&rows], |[rows]| Ok(head.packed()?.forward(rows)))?;
            logprobs.push(cpu::tensor(in_place(&mut logits, targets, wanted), targets.len())?);
            if wanted {
                pace()?;
                units.push(cpu::tensor(head.packed()?.backward(&logits, None), rows.shape())?);
            }
            continue;
        }
        let logits = head.product(&rows)?;
        let (found, slopes) = match cuda::takes(&logits) {
            true => on_gpu(logits, targets, wanted)?,
            false => composed(&logits, targets)?,
        };
        logprobs.push(found);
        if wanted {
            pace()?;
            units.push(head.backward(&slopes)?);
        }
    }
    if logprobs.is_empty() {
        return Ok(Tensor::zeros(0, DType::F32, hidden.device())?);
    }
    let logprobs = Tensor::cat(&logprobs, 0)?;
    if units.is_empty() {
        return Ok(logprobs);
    }
    let units = Tensor::cat(&units, 0)?.reshape((rows, width))?;
    let id = hidden.id();
    tape::push(&[hidden], &logprobs, &[&units.clone()], move |upstream, gradients| {
        let upstream = upstream.tensor.to_dtype(DType::F32)?.contiguous()?;
        if !cuda::takes(&units) {
            let slopes = units.broadcast_mul(&upstream.to_dtype(units.dtype())?.unsqueeze(1)?)?;
            return gradients.add(id, slopes);
        }
        let slopes = cuda::with_views([&units, &upstream], |[units, upstream]| gpu::scale_rows(units, upstream))?;
        gradients.add(id, cuda::tensor(slopes, units.shape(), &units)?)
    });
    Ok(logprobs)
}

/// What turns a row of logits into log-probabilities: the same bits whether they are sampled from or trained on.
pub struct RowLogprobs {
    max: f32,
    log_sum: f64,
}

impl RowLogprobs {
    /// Of V logits.
    pub fn new(logits: &[f32]) -> Self {
        let (max, sum) = softmax_row(&mut logits.to_vec(), 1.0);
        RowLogprobs { max, log_sum: sum.ln() }
    }

    /// `ln softmax` at one logit of the row, nats.
    pub fn of(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }
}

/// T log-probs; the logits, (T, V), become d log p(target) / d logits = `onehot − softmax` where that is wanted.
fn in_place(logits: &mut [f32], targets: &[u32], wanted: bool) -> Vec<f32> {
    let width = logits.len() / targets.len();
    let mut found = vec![0f32; targets.len()];
    each(logits.chunks_mut(width).zip(targets).zip(&mut found), |((row, target), found)| {
        let aim = row[*target as usize];
        let (max, sum) = softmax_row(row, 1.0);
        if wanted {
            let scale = -(1.0 / sum) as f32;
            scale_row(row, scale);
            row[*target as usize] += 1.0;
        }
        *found = RowLogprobs { max, log_sum: sum.ln() }.of(aim);
    });
    found
}

/// [`in_place`] on a GPU; the logits are this call's own.
fn on_gpu(logits: Tensor, targets: &[u32], wanted: bool) -> Result<(Tensor, Tensor)> {
    let ids = Tensor::new(targets, logits.device())?;
    let found = cuda::with_views([&logits, &ids], |[logits, ids]| gpu::token_logprobs(logits, ids, wanted))?;
    Ok((cuda::tensor(found, targets.len(), &logits)?, logits))
}

/// [`in_place`] of candle's operations.
fn composed(logits: &Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    let (rows, v) = logits.dims2()?;
    let wide = candle_nn::ops::log_softmax(&logits.to_dtype(DType::F32)?, 1)?;
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let logprobs = wide.gather(&index, 1)?.squeeze(1)?;
    let ones = Tensor::ones((rows, 1), DType::F32, logits.device())?;
    let onehot = Tensor::zeros((rows, v), DType::F32, logits.device())?.scatter_add(&index, &ones, 1)?;
    Ok((logprobs, (onehot - wide.exp()?)?.to_dtype(logits.dtype())?))
}
