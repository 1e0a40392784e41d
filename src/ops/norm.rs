//! Root-mean-square normalization (arXiv 1910.07467).

use candle_core::{D, DType, Tensor};

use super::{cpu, cuda, tape};
use crate::error::Result;
use crate::kernels::cpu::{add_row, rms_norm_backward_row, rms_norm_row};
use crate::kernels::cuda as gpu;

/// Rows a task works on at once.
const ROWS: usize = 16;

/// `x / sqrt(mean(x²) + eps) · weight` over the last axis. x: (…, C), weight: (C), frozen. Differentiable in `x`.
/// Gemma's `(1 + w)` form is the caller's: it adds one to the weight at load.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() && !cuda::takes(x) {
        return tape::composed([x], |[x]| {
            let wide = x.to_dtype(DType::F32)?;
            let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
            let normed = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
            Ok(normed.broadcast_mul(&weight.detach().to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
        });
    }
    let norm =
        RmsNorm { x: x.contiguous()?, weight: weight.detach().to_dtype(DType::F32)?.contiguous()?, eps: eps as f32 };
    let (y, id) = (norm.forward()?, x.id());
    if cuda::takes(&y) {
        let norm = norm.clone();
        tape::push_recipe(&y, move || norm.forward());
    }
    tape::push(&[x], &y, &[&norm.x.clone()], move |dy, gradients| {
        let before = gradients.take(id);
        let dx = norm.backward(&dy.tensor.contiguous()?, before.as_ref())?;
        gradients.add(id, dx)
    });
    Ok(y)
}

#[derive(Clone)]
struct RmsNorm {
    x: Tensor,
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    fn forward(&self) -> Result<Tensor> {
        if !self.x.device().is_cpu() {
            let y = cuda::with_views([&self.x, &self.weight], |[x, weight]| gpu::rms_norm(x, weight, self.eps))?;
            return Ok(cuda::tensor(y, self.x.shape(), &self.x)?);
        }
        let y = cpu::with_floats([&self.x, &self.weight], |[x, weight]| {
            let c = weight.len();
            let [y] = cpu::in_chunks(x.len(), ROWS * c, |at, [y]| {
                for (y, x) in y.chunks_exact_mut(c).zip(x[at..].chunks_exact(c)) {
                    rms_norm_row(x, weight, self.eps, y);
                }
            });
            Ok(y)
        })?;
        Ok(cpu::tensor(y, self.x.shape())?)
    }

    /// The gradient of x, on top of what it has `before`.
    fn backward(&self, dy: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
        let inputs = [&self.x, &self.weight, dy];
        let before = before.map(Tensor::contiguous).transpose()?;
        if !self.x.device().is_cpu() {
            let all: Vec<&Tensor> = inputs.into_iter().chain(&before).collect();
            let dx = cuda::with_all(&all, |all| {
                gpu::rms_norm_backward(all[0], all[1], all[2], all.get(3).copied(), self.eps)
            })?;
            return Ok(cuda::tensor(dx, self.x.shape(), &self.x)?);
        }
        let write = |before: Option<&[f32]>| {
            cpu::with_floats(inputs, |[x, weight, dy]| {
                let c = weight.len();
                let [dx] = cpu::in_chunks(x.len(), ROWS * c, |at, [dx]| {
                    let rows = dx.chunks_exact_mut(c).zip(x[at..].chunks_exact(c)).zip(dy[at..].chunks_exact(c));
                    rows.for_each(|((dx, x), dy)| rms_norm_backward_row(x, weight, self.eps, dy, dx));
                    if let Some(before) = before {
                        add_row(&before[at..at + dx.len()], dx);
                    }
                });
                Ok(dx)
            })
        };
        let dx = match &before {
            Some(before) => cpu::with_floats([before], |[before]| write(Some(before)))?,
            None => write(None)?,
        };
        Ok(cpu::tensor(dx, self.x.shape())?)
    }
}
