//! Low-rank parts in training on a GPU: the linears of one input together, every product added to where it belongs.

use std::ops::Range;

use candle_core::{DType, Tensor, TensorId};

use super::cuda;
use super::lora::Site;
use super::tape::{self, Gradient, Gradients};
use crate::error::{Error, Result};
use crate::kernels::cuda::{self as gpu, Matrix};

/// What the way back reads beside the input.
pub(super) struct Together {
    /// x·Aᵀ of all sites, side by side: (N, ΣR).
    low: Tensor,
    /// A of all sites, one below the other: (ΣR, in).
    a: Tensor,
    /// Each site's scaled B, (out, R), and its columns of `low`.
    parts: Vec<(Tensor, Range<usize>)>,
}

/// Whether there are kernels for these numbers, and the weights have them too.
pub(super) fn takes(x: &Tensor, sites: &[Site]) -> bool {
    let same =
        |site: &Site| site.base.as_ref().is_none_or(|base| base.dense().is_ok_and(|one| one.dtype() == x.dtype()));
    cuda::takes(x) && x.dim(0).is_ok_and(|rows| rows > 0) && sites.iter().all(same)
}

/// The sites' outputs, (N, out) each. x: (N, in), contiguous.
pub(super) fn forward(x: &Tensor, sites: &[Site]) -> Result<(Vec<Tensor>, Together)> {
    let beside = sites.iter().map(|site| site.beside(x)).collect::<Result<Vec<_>>>()?;
    let (all_a, all_b): (Vec<_>, Vec<_>) = beside.into_iter().map(|[a, b]| (a, b)).unzip();
    let a = if let [a] = &all_a[..] { a.clone() } else { Tensor::cat(&all_a, 0)? };
    let mut end = 0;
    let columns = all_a.iter().map(|a| {
        let start = end;
        end += a.dims()[0];
        start..end
    });
    let parts: Vec<_> = columns.collect::<Vec<_>>().into_iter().zip(all_b).map(|(columns, b)| (b, columns)).collect();
    let low = x.detach().matmul(&a.t()?)?;
    let unread = tape::is_unread();
    let outputs = sites.iter().zip(&parts).map(|(site, (b, columns))| {
        let y = match &site.base {
            Some(base) if !unread => base.product(x)?,
            _ => fresh(x, (x.dim(0)?, b.dim(0)?), x.dtype())?,
        };
        if !unread {
            add([&y, &low, b], |[y, low, b]| [y, low.columns(columns.clone()), b.t()], 1.0, site.base.is_some())?;
        }
        Ok(y)
    });
    Ok((outputs.collect::<Result<_>>()?, Together { low, a, parts }))
}

impl Together {
    /// What the tape holds for the way back.
    pub(super) fn kept(&self) -> Vec<Tensor> {
        [&self.low, &self.a].into_iter().chain(self.parts.iter().map(|(b, _)| b)).cloned().collect()
    }

    /// Adds the gradients of every A and B, and of the input where they are asked for.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        sites: &[Site],
        all: Vec<Option<Gradient>>,
        input: TensorId,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let contiguous = |dy: Option<Gradient>| dy.map(|dy| dy.tensor.contiguous()).transpose();
        let all = all.into_iter().map(contiguous).collect::<candle_core::Result<Vec<_>>>()?;
        // An output that nothing came of leaves its columns at zero.
        let dlow = self.low.zeros_like()?;
        let mut dx: Option<Tensor> = None;
        for ((site, dy), (b, columns)) in sites.iter().zip(&all).zip(&self.parts) {
            let Some(dy) = dy else { continue };
            add([&dlow, dy, b], |[dlow, dy, b]| [dlow.columns(columns.clone()), dy, b], 1.0, false)?;
            let db = fresh(x, site.b.dims2()?, DType::F32)?;
            // With a scale that is a power of two this is what scaling B gives.
            add(
                [&db, dy, &self.low],
                |[db, dy, low]| [db, dy.t(), low.columns(columns.clone())],
                site.scale as f32,
                false,
            )?;
            gradients.add(site.ids[1], db)?;
            let Some(base) = site.base.as_ref().filter(|_| gradients.wants(input)) else { continue };
            match &dx {
                None => dx = Some(base.backward(dy)?),
                Some(dx) => add([dx, dy, base.dense()?], |all| all, 1.0, true)?,
            }
        }
        let da = fresh(x, self.a.dims2()?, DType::F32)?;
        add([&da, &dlow, x], |[da, dlow, x]| [da, dlow.t(), x], 1.0, false)?;
        for ((site, dy), (_, columns)) in sites.iter().zip(&all).zip(&self.parts) {
            if dy.is_some() {
                gradients.add(site.ids[0], da.narrow(0, columns.start, columns.len())?)?;
            }
        }
        if gradients.wants(input) {
            let onto = dx.is_some();
            let dx = dx.map_or_else(|| fresh(x, x.dims2()?, x.dtype()), Ok)?;
            add([&dx, &dlow, &self.a], |all| all, 1.0, onto)?;
            gradients.add(input, dx)?;
        }
        Ok(())
    }
}

/// A matrix of the GPU that a product is to be written to.
fn fresh(beside: &Tensor, shape: (usize, usize), dtype: DType) -> Result<Tensor> {
    let storage = gpu::fresh(cuda::device_of(beside)?, &shape.into(), dtype)?;
    Ok(cuda::tensor(storage, shape, beside)?)
}

/// Of three tensors' matrices, `y = scale·left·right` or, `onto` it, that added to it.
fn add(
    tensors: [&Tensor; 3],
    of: impl for<'a> FnOnce([Matrix<'a>; 3]) -> [Matrix<'a>; 3],
    scale: f32,
    onto: bool,
) -> Result<()> {
    let [a, b, c] = tensors.map(Tensor::dims2);
    let widths = [a?.1, b?.1, c?.1];
    cuda::with_views(tensors, |views| {
        let [a, b, c] = views;
        let [y, left, right] = of([Matrix::new(a, widths[0]), Matrix::new(b, widths[1]), Matrix::new(c, widths[2])]);
        gpu::multiply(y, left, right, scale, onto)
    })
    .map_err(Error::from)
}
