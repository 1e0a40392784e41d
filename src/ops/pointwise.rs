//! Rotary embedding (arXiv 2104.09864), gated activation (arXiv 2002.05202), seeded dropout, sums and shapes.

use candle_core::shape::ShapeWithOneHole;
use candle_core::{D, DType, Device, Tensor};

use super::{cpu, cuda, tape};
use crate::error::{Error, Result};
pub use crate::kernels::cpu::Activation;
use crate::kernels::cpu::{self as kernels, Dropout, add_row, rope_row};
use crate::kernels::cuda::{self as gpu, View};

/// Numbers a task works on at once.
const CHUNK: usize = 4096;
/// Rows a task rotates at once.
const ROWS: usize = 16;

/// `act(gate) ⊙ up`. gate, up: (N, F) → (N, F). Differentiable in both.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        return Err(Error::internal(format!("gate {:?} and up {:?} differ in shape", gate.dims(), up.dims())));
    }
    if !gate.device().is_cpu() && !cuda::takes(gate) {
        return tape::composed([gate, up], |[gate, up]| {
            let gate = match activation {
                Activation::Silu => gate.silu()?,
                Activation::GeluTanh => gate.gelu()?,
            };
            Ok((gate * up)?)
        });
    }
    let ids = [gate.id(), up.id()];
    let inputs = [gate.contiguous()?, up.contiguous()?];
    let out = gated_forward(&inputs, activation)?;
    if cuda::takes(&out) {
        let inputs = inputs.clone();
        tape::push_recipe(&out, move || gated_forward(&inputs, activation));
    }
    tape::push(&[gate, up], &out, &[&inputs[0].clone(), &inputs[1].clone()], move |dout, gradients| {
        for (id, gradient) in ids.into_iter().zip(gated_backward(&inputs, &dout.tensor.contiguous()?, activation)?) {
            gradients.add(id, gradient)?;
        }
        Ok(())
    });
    Ok(out)
}

fn gated_forward([gate, up]: &[Tensor; 2], activation: Activation) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        let out = cuda::with_views([gate, up], |[gate, up]| gpu::gated(activation, gate, up))?;
        return Ok(cuda::tensor(out, gate.shape(), gate)?);
    }
    let out = cpu::with_floats([gate, up], |[gate, up]| {
        let [out] = cpu::in_chunks(gate.len(), CHUNK, |at, [out]| {
            let rows = at..at + out.len();
            kernels::gated(activation, &gate[rows.clone()], &up[rows], out);
        });
        Ok(out)
    })?;
    Ok(cpu::tensor(out, gate.shape())?)
}

fn gated_backward([gate, up]: &[Tensor; 2], dout: &Tensor, activation: Activation) -> Result<[Tensor; 2]> {
    let inputs = [gate, up, dout];
    if !gate.device().is_cpu() {
        let back = |[gate, up, dout]: [View<'_>; 3]| gpu::gated_backward(activation, gate, up, dout);
        let [dgate, dup] = cuda::with_views(inputs, back)?;
        return Ok([cuda::tensor(dgate, gate.shape(), gate)?, cuda::tensor(dup, up.shape(), up)?]);
    }
    let [dgate, dup] = cpu::with_floats(inputs, |[gate, up, dout]| {
        Ok(cpu::in_chunks(gate.len(), CHUNK, |at, [dgate, dup]| {
            let rows = at..at + dgate.len();
            kernels::gated_backward(activation, &gate[rows.clone()], &up[rows.clone()], &dout[rows], dgate, dup);
        }))
    })?;
    Ok([cpu::tensor(dgate, gate.shape())?, cpu::tensor(dup, up.shape())?])
}

/// Rotates pairs `(i, i + D/2)` of each head (Hugging Face's half-split layout). x: (N, H, D); cos, sin: (N, D/2), f32, already
/// picked for the tokens' positions. Differentiable in `x`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() && !cuda::takes(x) {
        return tape::composed([x], |[x]| {
            let half = x.dim(D::Minus1)? / 2;
            let (left, right) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
            let (cos, sin) = (cos.to_dtype(x.dtype())?.unsqueeze(1)?, sin.to_dtype(x.dtype())?.unsqueeze(1)?);
            let first = (left.broadcast_mul(&cos)? - right.broadcast_mul(&sin)?)?;
            let second = (right.broadcast_mul(&cos)? + left.broadcast_mul(&sin)?)?;
            Ok(Tensor::cat(&[first, second], D::Minus1)?)
        });
    }
    let tables = [cos.contiguous()?, sin.contiguous()?];
    let (y, id) = (rotated(&x.contiguous()?, &tables, 1.0)?, x.id());
    // The inverse of a rotation is the rotation back.
    tape::push(&[x], &y, &[], move |dy, gradients| {
        gradients.add(id, rotated(&dy.tensor.contiguous()?, &tables, -1.0)?)
    });
    Ok(y)
}

fn rotated(x: &Tensor, [cos, sin]: &[Tensor; 2], sign: f32) -> Result<Tensor> {
    let (_, h, d) = x.dims3()?;
    if !x.device().is_cpu() {
        let y = cuda::with_views([x, cos, sin], |[x_view, cos, sin]| gpu::rope(x_view, x.dims3()?, [cos, sin], sign))?;
        return Ok(cuda::tensor(y, x.shape(), x)?);
    }
    let y = cpu::with_floats([x, cos, sin], |[x, cos, sin]| {
        let [y] = cpu::in_chunks(x.len(), ROWS * h * d, |at, [y]| {
            let table = at / h / 2;
            let tables = cos[table..].chunks_exact(d / 2).zip(sin[table..].chunks_exact(d / 2));
            for ((y, x), (cos, sin)) in y.chunks_exact_mut(h * d).zip(x[at..].chunks_exact(h * d)).zip(tables) {
                rope_row(x, cos, sin, sign, y);
            }
        });
        Ok(y)
    })?;
    Ok(cpu::tensor(y, x.shape())?)
}

/// Inverted dropout with probability `p`, whose mask is a function of `seed` and the element index alone: a recomputed layer sees the same
/// mask, and the backward makes it again instead of keeping it. Differentiable in `x`.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    if p <= 0.0 {
        return Ok(x.clone());
    }
    let mask = Dropout::new(p, seed);
    let (y, id) = (dropped(&x.contiguous()?, mask)?, x.id());
    tape::push(&[x], &y, &[], move |dy, gradients| gradients.add(id, dropped(&dy.tensor.contiguous()?, mask)?));
    Ok(y)
}

/// `mask · x`.
fn dropped(x: &Tensor, mask: Dropout) -> Result<Tensor> {
    if cuda::takes(x) {
        let y = cuda::with_views([x], |[x]| gpu::dropout(mask, x))?;
        return Ok(cuda::tensor(y, x.shape(), x)?);
    }
    if x.device().is_cpu() {
        let y = cpu::with_floats([x], |[x]| {
            let [y] = cpu::in_chunks(x.len(), CHUNK, |at, [y]| mask.row(at, &x[at..at + y.len()], y));
            Ok(y)
        })?;
        return Ok(cpu::tensor(y, x.shape())?);
    }
    let ones = Tensor::ones(x.shape(), DType::F32, &Device::Cpu)?;
    Ok((x.detach() * dropped(&ones, mask)?.to_device(x.device())?.to_dtype(x.dtype())?)?)
}

/// `x + y`, of one shape. Differentiable in both.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let plain = x.dims() == y.dims() && x.dtype() == y.dtype() && x.is_contiguous() && y.is_contiguous();
    let sum = match plain {
        true if cuda::takes(x) => cuda::tensor(cuda::with_views([x, y], |[x, y]| gpu::sum(x, y))?, x.shape(), x)?,
        true if x.device().is_cpu() => {
            let sum = cpu::with_floats([x, y], |[x, y]| {
                let [sum] = cpu::in_chunks(x.len(), CHUNK, |at, [sum]| {
                    sum.copy_from_slice(&x[at..at + sum.len()]);
                    add_row(&y[at..at + sum.len()], sum);
                });
                Ok(sum)
            })?;
            cpu::tensor(sum, x.shape())?
        }
        _ => (x.detach() + y.detach())?,
    };
    let ids = [x.id(), y.id()];
    tape::push(&[x, y], &sum, &[], move |dy, gradients| {
        for id in ids {
            gradients.add_shared(id, &dy.tensor)?;
        }
        Ok(())
    });
    Ok(sum)
}

/// The numbers in another shape. Differentiable in x.
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    let y = x.detach().reshape(shape)?;
    let (id, shape) = (x.id(), x.shape().clone());
    tape::push(&[x], &y, &[], move |dy, gradients| {
        let tensor = dy.tensor.reshape(shape)?;
        gradients.put(id, tape::Gradient { tensor, shared: dy.shared })
    });
    Ok(y)
}
