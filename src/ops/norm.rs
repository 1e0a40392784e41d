//! Root-mean-square normalization (arXiv 1910.07467).

use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::{cpu, cuda};
use crate::cores::spread;
use crate::error::Result;
use crate::kernels::cpu::{rms_norm_backward_row, rms_norm_row};
use crate::kernels::cuda::{self as gpu, View};

/// `x / sqrt(mean(x²) + eps) · weight` over the last axis. x: (…, C), weight: (C), frozen. Differentiable in `x`.
/// Gemma's `(1 + w)` form is the caller's: it adds one to the weight at load.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.device().is_cpu() || cuda::takes(x) {
        let weight = weight.detach().to_dtype(DType::F32)?.contiguous()?;
        return Ok(x.contiguous()?.apply_op1(RmsNorm { weight, eps: eps as f32 })?);
    }
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    Ok(normed.broadcast_mul(&weight.detach().to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
}

struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu::floats(storage, layout)?;
        let mut y = vec![0f32; x.len()];
        cpu::with_floats([&self.weight], |[weight]| {
            let c = weight.len();
            let rows = y.par_chunks_mut(c).with_min_len(16).zip(x.par_chunks(c));
            spread(|| rows.for_each(|(y, x)| rms_norm_row(x, weight, self.eps, y)));
            Ok(())
        })?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let x = View::new(storage, layout)?;
        let y = cuda::with_views([&self.weight], |[weight]| gpu::rms_norm(x, weight, self.eps))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        if !x.device().is_cpu() {
            let inputs = [x, &self.weight, &dy];
            let dx = cuda::with_views(inputs, |[x, weight, dy]| gpu::rms_norm_backward(x, weight, dy, self.eps))?;
            return cuda::tensor(dx, x.shape(), x).map(Some);
        }
        let mut dx = vec![0f32; x.elem_count()];
        cpu::with_floats([x, &self.weight, &dy], |[x, weight, dy]| {
            let c = weight.len();
            let rows = dx.par_chunks_mut(c).with_min_len(16).zip(x.par_chunks(c).zip(dy.par_chunks(c)));
            spread(|| rows.for_each(|(dx, (x, dy))| rms_norm_backward_row(x, weight, self.eps, dy, dx)));
            Ok(())
        })?;
        cpu::tensor(dx, x.shape()).map(Some)
    }
}
