//! Rotary embedding (arXiv 2104.09864), gated activation (arXiv 2002.05202) and seeded dropout.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, D, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::{cpu, cuda};
use crate::cores::spread;
use crate::error::{Error, Result};
pub use crate::kernels::cpu::Activation;
use crate::kernels::cpu::{self as kernels, rope_row};
use crate::kernels::cuda::{self as gpu, View};

/// Numbers a task works on at once.
const CHUNK: usize = 4096;

/// `act(gate) ⊙ up`. gate, up: (N, F) → (N, F). Differentiable in both.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        return Err(Error::internal(format!("gate {:?} and up {:?} differ in shape", gate.dims(), up.dims())));
    }
    if gate.device().is_cpu() || cuda::takes(gate) {
        return Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, Gated { activation })?);
    }
    let gate = match activation {
        Activation::Silu => gate.silu()?,
        Activation::GeluTanh => gate.gelu()?,
    };
    Ok((gate * up)?)
}

struct Gated {
    activation: Activation,
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up) = (cpu::floats(s1, l1)?, cpu::floats(s2, l2)?);
        let mut out = vec![0f32; gate.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
        spread(|| chunks.for_each(|((out, gate), up)| kernels::gated(self.activation, gate, up, out)));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let out = gpu::gated(self.activation, View::new(s1, l1)?, View::new(s2, l2)?)?;
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        if !gate.device().is_cpu() {
            let back = |[gate, up, dout]: [View<'_>; 3]| gpu::gated_backward(self.activation, gate, up, dout);
            let [dgate, dup] = cuda::with_views([gate, up, &dout], back)?;
            let (dgate, dup) = (cuda::tensor(dgate, gate.shape(), gate)?, cuda::tensor(dup, up.shape(), up)?);
            return Ok((Some(dgate), Some(dup)));
        }
        let (mut dgate, mut dup) = (vec![0f32; gate.elem_count()], vec![0f32; up.elem_count()]);
        cpu::with_floats([gate, up, &dout], |[gate, up, dout]| {
            let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dout.par_chunks(CHUNK));
            let chunks = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK)).zip(inputs);
            spread(|| {
                chunks.for_each(|((dgate, dup), ((gate, up), dout))| {
                    kernels::gated_backward(self.activation, gate, up, dout, dgate, dup);
                });
            });
            Ok(())
        })?;
        Ok((Some(cpu::tensor(dgate, gate.shape())?), Some(cpu::tensor(dup, up.shape())?)))
    }
}

/// Rotates pairs `(i, i + D/2)` of each head (Hugging Face's half-split layout). x: (N, H, D); cos, sin: (N, D/2), f32, already
/// picked for the tokens' positions. Differentiable in `x`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() || cuda::takes(x) {
        return Ok(x.contiguous()?.apply_op1(Rope { cos: cos.contiguous()?, sin: sin.contiguous()?, sign: 1.0 })?);
    }
    let half = x.dim(D::Minus1)? / 2;
    let (left, right) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.to_dtype(x.dtype())?.unsqueeze(1)?, sin.to_dtype(x.dtype())?.unsqueeze(1)?);
    let first = (left.broadcast_mul(&cos)? - right.broadcast_mul(&sin)?)?;
    let second = (right.broadcast_mul(&cos)? + left.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[first, second], D::Minus1)?)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
    sign: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu::floats(storage, layout)?;
        let (_, h, d) = layout.shape().dims3()?;
        let mut y = vec![0f32; x.len()];
        cpu::with_floats([&self.cos, &self.sin], |[cos, sin]| {
            let tables = cos.par_chunks(d / 2).zip(sin.par_chunks(d / 2));
            let rows = y.par_chunks_mut(h * d).with_min_len(16).zip(x.par_chunks(h * d)).zip(tables);
            spread(|| rows.for_each(|((y, x), (cos, sin))| rope_row(x, cos, sin, self.sign, y)));
            Ok(())
        })?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (x, shape) = (View::new(storage, layout)?, layout.shape().dims3()?);
        let y = cuda::with_views([&self.cos, &self.sin], |tables| gpu::rope(x, shape, tables, self.sign))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        // The inverse of a rotation is the rotation back.
        let back = Rope { cos: self.cos.clone(), sin: self.sin.clone(), sign: -self.sign };
        dy.detach().contiguous()?.apply_op1(back).map(Some)
    }
}

/// Inverted dropout with probability `p`, whose mask is a function of `seed` and the element index alone, so that a recomputed
/// layer sees the same mask. Differentiable in `x`.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    if p <= 0.0 {
        return Ok(x.clone());
    }
    let keep = 1.0 / (1.0 - p);
    let limit = (f64::from(p) * 2f64.powi(32)) as u64;
    let mask: Vec<f32> =
        (0..x.elem_count() as u64).map(|index| if mix(seed, index) >> 32 < limit { 0.0 } else { keep }).collect();
    let mask = Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?;
    Ok((x * mask)?)
}

/// Two rounds of the SplitMix64 finalizer over seed and index.
fn mix(seed: u64, index: u64) -> u64 {
    let round = |value: u64| {
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    round(round(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}
