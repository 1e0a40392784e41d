//! A frozen linear with a low-rank part: `x·Wᵀ + b + (x·Aᵀ)·(s·B)ᵀ`, trained and served with the same bits.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use half::bf16;

use super::{FrozenLinear, cpu, cuda};
use crate::error::{Error, Result};
use crate::kernels::cpu::{self as kernels, Adapted, Left, Packed, Width, forward_together, multiply};
use crate::kernels::cuda::{self as gpu, LowRows};

/// The low-rank part for all rows, on top of `base` where it is given. x: (N, in), a: (R, in), b: (out, R) → (N, out).
/// Differentiable in x, a and b. B is scaled rather than the product, as in a published adapter: both then give the same bits.
pub fn low_rank(base: Option<&FrozenLinear>, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        let op = LowRank { base: base.cloned(), scale: scale as f32, a: OnceLock::new() };
        return Ok(x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)?);
    }
    let low = x.to_dtype(DType::F32)?.matmul(&a.t()?)?;
    let high = low.matmul(&(b * scale)?.t()?)?.to_dtype(x.dtype())?;
    Ok(match base {
        Some(base) => (base.forward(x)? + high)?,
        None => high,
    })
}

/// Rows of a step with the A and B (scaled) of one adapter.
pub type ServedRows<'a> = (Range<usize>, &'a FrozenLinear, &'a FrozenLinear);

/// `base(x)` of several linears over one input, with the low-rank parts of some rows added. x: (N, in) → (N, out) each. Differentiable
/// in x where there are no parts.
pub fn linears<const L: usize>(x: &Tensor, of: [(&FrozenLinear, Vec<ServedRows<'_>>); L]) -> Result<[Tensor; L]> {
    let mut found = Vec::with_capacity(L);
    if x.device().is_cpu() && !x.track_op() {
        of.iter().try_for_each(|(base, _)| base.check(x))?;
        let x = x.contiguous()?;
        let parts = of.iter().map(|(_, parts)| parts.iter().map(on_cpu).collect());
        let parts = parts.collect::<candle_core::Result<Vec<Vec<_>>>>()?;
        let products = of.iter().zip(&parts).map(|((base, _), parts)| Ok(Adapted { weight: base.packed()?, parts }));
        let products = products.collect::<candle_core::Result<Vec<_>>>()?;
        let numbers = cpu::with_floats([&x], |[x]| Ok(forward_together(x, &products)))?;
        for (numbers, (base, _)) in numbers.into_iter().zip(&of) {
            found.push(cpu::tensor(numbers, (x.dim(0)?, base.out_features()))?);
        }
    } else if cuda::takes(x) && !x.track_op() && of.iter().flat_map(|(_, parts)| parts).all(fits) {
        found = on_gpu(&x.contiguous()?, &of)?;
    } else {
        for (base, parts) in &of {
            found.push(composed(base, x, parts)?);
        }
    }
    found.try_into().map_err(|_| Error::internal("a product for every linear. This is a bug."))
}

fn on_cpu<'a>((rows, a, b): &ServedRows<'a>) -> candle_core::Result<kernels::LowRank<'a>> {
    Ok(kernels::LowRank { rows: rows.clone(), a: a.packed()?, b: b.packed()? })
}

/// Whether the GPU's kernel has room for it.
fn fits((_, a, _): &ServedRows<'_>) -> bool {
    (1..=gpu::MOST_RANK).contains(&a.out_features())
}

/// [`linears`] on a GPU: the low-rank parts of all of them in one pair of launches.
fn on_gpu(x: &Tensor, of: &[(&FrozenLinear, Vec<ServedRows<'_>>)]) -> Result<Vec<Tensor>> {
    let products = of.iter().map(|(base, _)| base.forward(x)).collect::<Result<Vec<_>>>()?;
    let (mut tensors, mut rows) = (vec![x], Vec::new());
    for ((_, parts), y) in of.iter().zip(&products) {
        for (of, a, b) in parts {
            tensors.extend([a.dense()?, b.dense()?, y]);
            rows.push(of.clone());
        }
    }
    if !rows.is_empty() {
        cuda::with_all(&tensors, |views| {
            let parts = views[1..].chunks_exact(3).zip(rows);
            let parts = parts.map(|(of, rows)| LowRows { rows, a: of[0], b: of[1], y: of[2] });
            gpu::add_low_rank(views[0], x.dim(1)?, &parts.collect::<Vec<_>>())
        })?;
    }
    Ok(products)
}

/// One of [`linears`] of candle's operations.
fn composed(base: &FrozenLinear, x: &Tensor, parts: &[ServedRows<'_>]) -> Result<Tensor> {
    let y = base.forward(x)?;
    if parts.is_empty() {
        return Ok(y);
    }
    if x.track_op() {
        return Err(Error::internal("a published adapter gives no gradient. This is a bug."));
    }
    let mut pieces = Vec::with_capacity(2 * parts.len() + 1);
    let mut covered = 0;
    for (rows, a, b) in parts {
        if rows.start > covered {
            pieces.push(y.narrow(0, covered, rows.start - covered)?);
        }
        let high = b.forward(&a.forward(&x.narrow(0, rows.start, rows.len())?)?)?;
        pieces.push((y.narrow(0, rows.start, rows.len())? + high)?);
        covered = rows.end;
    }
    if covered < y.dim(0)? {
        pieces.push(y.narrow(0, covered, y.dim(0)? - covered)?);
    }
    Ok(Tensor::cat(&pieces, 0)?)
}

struct LowRank {
    base: Option<FrozenLinear>,
    scale: f32,
    /// As the forward packed it, for the backward.
    a: OnceLock<Packed>,
}

impl LowRank {
    /// A or B (scaled) as a published adapter holds it.
    fn packed(&self, values: &[f32], (n, k): (usize, usize), scale: f32) -> Packed {
        let scaled = values.iter().map(|value| value * scale);
        let width = match self.base.as_ref().map(FrozenLinear::low_rank_dtype) {
            Some(DType::BF16) => Width::Bf16(scaled.map(bf16::from_f32).collect()),
            _ => Width::F32(scaled.collect()),
        };
        Packed::new(&width, n, k)
    }
}

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, a, b) = (cpu::floats(s1, l1)?, cpu::floats(s2, l2)?, cpu::floats(s3, l3)?);
        let (rows, _) = l1.shape().dims2()?;
        let (out, rank) = l3.shape().dims2()?;
        let shape = l2.shape().dims2()?;
        let a = self.a.get_or_init(|| self.packed(a, shape, 1.0));
        let b = self.packed(b, (out, rank), self.scale);
        let y = match &self.base {
            Some(base) => base.on_cpu(x, &[kernels::LowRank { rows: 0..rows, a, b: &b }])?,
            None => b.forward(&a.forward(x)),
        };
        Ok((CpuStorage::F32(y), (rows, out).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((rows, width), (out, rank)) = (x.dims2()?, b.dims2()?);
        let dy = dy.contiguous()?;
        let (dx, da, db) = cpu::with_floats([x, a, b, &dy], |[x_values, a, b, dy]| {
            let low = self.a.get_or_init(|| self.packed(a, (rank, width), 1.0)).forward(x_values);
            let scaled: Vec<f32> = b.iter().map(|value| value * self.scale).collect();
            let mut dlow = vec![0f32; rows * rank];
            multiply(Left::Rows(dy), &scaled, (rows, out, rank), &mut dlow, false);
            let mut da = vec![0f32; rank * width];
            multiply(Left::Turned(&dlow), x_values, (rank, rows, width), &mut da, false);
            // dBᵀ: (R, out), then turned.
            let mut turned = vec![0f32; rank * out];
            multiply(Left::Turned(&low), dy, (rank, rows, out), &mut turned, false);
            let mut db = vec![0f32; out * rank];
            for (to, turned) in turned.chunks_exact(out).enumerate() {
                for (db, value) in db.chunks_exact_mut(rank).zip(turned) {
                    db[to] = value * self.scale;
                }
            }
            // Nothing below the first layer is trained: its input wants no gradient.
            if !x.track_op() {
                return Ok((None, da, db));
            }
            let mut dx = match &self.base {
                Some(base) => base.backward_on_cpu(dy)?,
                None => vec![0f32; rows * width],
            };
            multiply(Left::Rows(&dlow), a, (rows, rank, width), &mut dx, true);
            Ok((Some(dx), da, db))
        })?;
        let dx = dx.map(|dx| cpu::tensor(dx, x.shape())).transpose()?;
        Ok((dx, Some(cpu::tensor(da, a.shape())?), Some(cpu::tensor(db, b.shape())?)))
    }
}
