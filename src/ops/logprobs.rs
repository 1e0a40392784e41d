//! Log-probabilities of given tokens without the `(N, V)` logits.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::{FrozenLinear, cpu};
use crate::error::{Error, Result};
use crate::kernels::cpu::{scale_row, softmax_row};

/// Rows of logits held at once: 128 rows of 49,152 are 24 MiB.
const ROWS: usize = 128;

/// `log softmax(hidden·Wᵀ)[target]` in row chunks. hidden: (T, C) after the final norm; head: (V, C); targets: T ids → (T), f32, nats.
/// Differentiable in `hidden`: when it records a graph, the unit gradient of each row is computed in the same pass (its upstream
/// gradient is one scalar a row), so the backward multiplies and recomputes nothing.
pub fn token_logprobs(hidden: &Tensor, head: &FrozenLinear, targets: &[u32]) -> Result<Tensor> {
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
    for (chunk, targets) in targets.chunks(ROWS).enumerate() {
        let rows = plain.narrow(0, chunk * ROWS, targets.len())?;
        if plain.device().is_cpu() {
            let (found, unit) = on_cpu(&rows, head, targets, hidden.track_op())?;
            logprobs.push(found);
            units.extend(unit);
            continue;
        }
        let (found, weights) = composed(&head.forward(&rows)?, targets)?;
        logprobs.push(found);
        if hidden.track_op() {
            // d log p(target) / d logits = onehot − softmax.
            units.push(head.backward(&weights)?);
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
    if hidden.device().is_cpu() {
        return Ok(hidden.contiguous()?.apply_op1(Known { logprobs, units })?);
    }
    // On other devices: values from `logprobs`, gradient from a product that is zero in value.
    let slope = (hidden * &units)?.sum(1)?.to_dtype(DType::F32)?;
    Ok((&logprobs + (&slope - slope.detach())?)?)
}

/// (T) log-probs and, where wanted, the unit gradients (T, C): `(onehot − softmax)·W`, in the logits' own memory.
fn on_cpu(
    hidden: &Tensor,
    head: &FrozenLinear,
    targets: &[u32],
    wanted: bool,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let (rows, v) = (targets.len(), head.out_features());
    let mut logits = cpu::with_floats([hidden], |[hidden]| head.on_cpu(hidden))?;
    let logprobs: Vec<f32> = logits
        .par_chunks_mut(v)
        .zip(targets)
        .map(|(row, target)| {
            let aim = row[*target as usize];
            let (max, sum) = softmax_row(row);
            if wanted {
                let scale = -(1.0 / sum) as f32;
                scale_row(row, scale);
                row[*target as usize] += 1.0;
            }
            (f64::from(aim - max) - sum.ln()) as f32
        })
        .collect();
    let units = match wanted {
        true => Some(cpu::tensor(head.backward_on_cpu(&logits)?, hidden.shape())?),
        false => None,
    };
    Ok((cpu::tensor(logprobs, rows)?, units))
}

fn composed(logits: &Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    let (rows, v) = logits.dims2()?;
    let wide = candle_nn::ops::log_softmax(&logits.to_dtype(DType::F32)?, 1)?;
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let logprobs = wide.gather(&index, 1)?.squeeze(1)?;
    let ones = Tensor::ones((rows, 1), DType::F32, logits.device())?;
    let onehot = Tensor::zeros((rows, v), DType::F32, logits.device())?.scatter_add(&index, &ones, 1)?;
    Ok((logprobs, (onehot - wide.exp()?)?.to_dtype(logits.dtype())?))
}

/// An op whose value and gradient are known already.
struct Known {
    logprobs: Tensor,
    units: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "token-logprobs"
    }

    fn cpu_fwd(&self, _storage: &CpuStorage, _layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.logprobs.to_vec1()?), self.logprobs.shape().clone()))
    }

    fn bwd(&self, _hidden: &Tensor, _logprobs: &Tensor, upstream: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.units.broadcast_mul(&upstream.unsqueeze(1)?).map(Some)
    }
}
