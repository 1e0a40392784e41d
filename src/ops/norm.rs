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
    tape::push(&[x], &y, &[&norm.x.clone()], move |dy, gradients| {
        let before = gradients.take(id);
        let dx = norm.backward(&dy.tensor.contiguous()?, before.as_ref())?;
        gradients.add(id, dx)
    });
    Ok(y)
}

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
        if !self.x.device().is_cpu() {
            let dx = cuda::with_views(inputs, |[x, weight, dy]| gpu::rms_norm_backward(x, weight, dy, self.eps))?;
            let dx = cuda::tensor(dx, self.x.shape(), &self.x)?;
            return Ok(match before {
                Some(before) => (before + dx)?,
                None => dx,
            });
        }
        let before = before.map(Tensor::contiguous).transpose()?;
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
