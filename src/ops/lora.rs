//! A frozen linear with a low-rank part: `x·Wᵀ + b + (x·Aᵀ)·(s·B)ᵀ`, trained and served with the same bits.

use std::ops::Range;
use std::rc::Rc;

use candle_core::{DType, Shape, Tensor, TensorId};
use half::bf16;

use super::linear::{few_rows, takes_few};
use super::tape::{self, Gradients};
use super::{FrozenLinear, cpu, cuda, trained};
use crate::error::{Error, Result};
use crate::kernels::cpu::{self as kernels, Adapted, Left, Packed, Width, forward_together, multiply};
use crate::kernels::cuda::{self as gpu, LowRows};

/// The low-rank part of a linear in training: variables for all rows.
#[derive(Clone, Copy)]
pub struct Trained<'a> {
    /// What it is added to, if anything.
    pub base: Option<&'a FrozenLinear>,
    /// A: (R, in), f32.
    pub a: &'a Tensor,
    /// B: (out, R), f32.
    pub b: &'a Tensor,
    /// Factor of the product. B is scaled rather than the product, as in a published adapter: both then give the same bits.
    pub scale: f64,
}

/// The linears of one input with their low-rank parts. x: (N, in) → (N, out) each. Differentiable in x and in every A and B.
pub fn low_rank<const L: usize>(x: &Tensor, of: [Trained<'_>; L]) -> Result<[Tensor; L]> {
    let plain = x.contiguous()?;
    let (mut sites, mut packed_b) = (Vec::with_capacity(L), Vec::with_capacity(L));
    for Trained { base, a, b, scale } in of {
        if let Some(base) = base {
            base.check(x)?;
        }
        let packed_a = match x.device().is_cpu() {
            true => {
                packed_b.push(pack(base, b, scale as f32)?);
                Some(pack(base, a, 1.0)?)
            }
            false => None,
        };
        let ids = [a.id(), b.id()];
        sites.push(Site { base: base.cloned(), ids, a: a.contiguous()?, b: b.contiguous()?, scale, packed_a });
    }
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(of.iter().flat_map(|of| [of.a, of.b])).collect();
    let id = x.id();
    let outputs = if trained::takes(&plain, &sites) {
        let (outputs, together) = trained::forward(&plain, &sites)?;
        let mut kept = together.kept();
        // What is cheap to make again is not kept.
        let again = tape::recipe(x).unwrap_or_else(|| {
            kept.push(plain.clone());
            Rc::new(move || Ok(plain.clone()))
        });
        tape::push_all(
            &inputs,
            &outputs.iter().collect::<Vec<_>>(),
            &kept.iter().collect::<Vec<_>>(),
            move |all, gradients| together.backward(&again()?, &sites, all, id, gradients),
        );
        outputs
    } else {
        let outputs = match x.device().is_cpu() {
            true => forward_on_cpu(&plain, &sites, &packed_b)?,
            false => sites.iter().map(|site| site.forward(&plain)).collect::<Result<Vec<_>>>()?,
        };
        tape::push_all(&inputs, &outputs.iter().collect::<Vec<_>>(), &[&plain.clone()], move |all, gradients| {
            for (site, dy) in sites.iter().zip(all) {
                if let Some(dy) = dy {
                    let dy = dy.tensor.contiguous()?;
                    match &site.packed_a {
                        Some(a) => site.backward_on_cpu(&plain, a, &dy, id, gradients)?,
                        None => site.backward(&plain, &dy, id, gradients)?,
                    }
                }
            }
            Ok(())
        });
        outputs
    };
    outputs.try_into().map_err(|_| Error::internal("a product for every linear. This is a bug."))
}

/// One linear of [`low_rank`].
pub(super) struct Site {
    pub(super) base: Option<FrozenLinear>,
    /// Of A and B.
    pub(super) ids: [TensorId; 2],
    a: Tensor,
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// A as a published adapter holds it on a CPU.
    packed_a: Option<Packed>,
}

/// A or B, scaled, as a published adapter beside that linear holds it on a CPU.
fn pack(base: Option<&FrozenLinear>, of: &Tensor, scale: f32) -> Result<Packed> {
    let is_bf16 = base.map(FrozenLinear::low_rank_dtype) == Some(DType::BF16);
    let packed = cpu::with_floats([&of.contiguous()?], |[values]| {
        let scaled = values.iter().map(|value| value * scale);
        let width = match is_bf16 {
            true => Width::Bf16(scaled.map(bf16::from_f32).collect()),
            false => Width::F32(scaled.collect()),
        };
        let (n, k) = of.dims2()?;
        Ok(Packed::new(&width, n, k))
    })?;
    Ok(packed)
}

fn forward_on_cpu(x: &Tensor, sites: &[Site], packed_b: &[Packed]) -> Result<Vec<Tensor>> {
    let rows = x.dim(0)?;
    if tape::is_unread() {
        let zeros = |site: &Site| Ok(Tensor::zeros((rows, site.b.dim(0)?), DType::F32, x.device())?);
        return sites.iter().map(zeros).collect();
    }
    let parts = sites.iter().zip(packed_b).filter_map(|(site, b)| Some((site.packed_a.as_ref()?, b)));
    let parts: Vec<_> = parts.map(|(a, b)| [kernels::LowRank { rows: 0..rows, a, b }]).collect();
    let products = cpu::with_floats([x], |[x]| {
        let together = sites.iter().zip(&parts).filter_map(|(site, parts)| Some((site.base.as_ref()?, parts)));
        let together = together.map(|(base, parts)| Ok(Adapted { weight: base.packed()?, parts }));
        let mut together = forward_together(x, &together.collect::<candle_core::Result<Vec<_>>>()?, &[]).into_iter();
        let one = |(site, [part]): (&Site, &[kernels::LowRank<'_>; 1])| match &site.base {
            Some(_) => together.next().unwrap_or_default(),
            None => part.b.forward(&part.a.forward(x)),
        };
        Ok(sites.iter().zip(&parts).map(one).collect::<Vec<_>>())
    })?;
    let tensors = products.into_iter().zip(sites).map(|(y, site)| Ok(cpu::tensor(y, (rows, site.b.dim(0)?))?));
    tensors.collect()
}

impl Site {
    /// A and the scaled B in what they are multiplied in: beside a bf16 weight in bf16, as a published adapter holds them. They are small; x
    /// and dy are not, and stay as they are then.
    pub(super) fn beside(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let dtype = if x.dtype() == DType::BF16 { DType::BF16 } else { DType::F32 };
        Ok([self.a.detach().to_dtype(dtype)?, (self.b.detach() * self.scale)?.to_dtype(dtype)?])
    }

    /// Of candle's operations.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [a, b] = self.beside(x)?;
        let low = x.to_dtype(a.dtype())?.matmul(&a.t()?)?;
        let high = low.matmul(&b.t()?)?.to_dtype(x.dtype())?;
        Ok(match &self.base {
            Some(base) => (base.product(x)? + high)?,
            None => high,
        })
    }

    fn backward(&self, x: &Tensor, dy: &Tensor, input: TensorId, gradients: &mut Gradients) -> Result<()> {
        let [a, b] = self.beside(x)?;
        let (wide, dhigh) = (x.to_dtype(a.dtype())?, dy.to_dtype(a.dtype())?);
        let dlow = dhigh.matmul(&b)?;
        gradients.add(self.ids[0], dlow.t()?.matmul(&wide)?.to_dtype(DType::F32)?)?;
        let low = wide.matmul(&a.t()?)?;
        gradients.add(self.ids[1], (dhigh.t()?.matmul(&low)?.to_dtype(DType::F32)? * self.scale)?)?;
        if gradients.wants(input) {
            let dx = dlow.matmul(&a)?.to_dtype(x.dtype())?;
            let dx = match &self.base {
                Some(base) => (base.backward(dy)? + dx)?,
                None => dx,
            };
            gradients.add(input, dx)?;
        }
        Ok(())
    }

    fn backward_on_cpu(
        &self,
        x: &Tensor,
        packed_a: &Packed,
        dy: &Tensor,
        input: TensorId,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let ((rows, width), (out, rank)) = (x.dims2()?, self.b.dims2()?);
        let scale = self.scale as f32;
        let mut dlow = vec![0f32; rows * rank];
        let [da, db] = cpu::with_floats([x, &self.b, dy], |[x, b, dy]| {
            let low = packed_a.forward(x);
            let scaled: Vec<f32> = b.iter().map(|value| value * scale).collect();
            multiply(Left::Rows(dy), &scaled, (rows, out, rank), &mut dlow, false);
            let mut da = vec![0f32; rank * width];
            multiply(Left::Turned(&dlow), x, (rank, rows, width), &mut da, false);
            // dBᵀ: (R, out), then turned.
            let mut turned = vec![0f32; rank * out];
            multiply(Left::Turned(&low), dy, (rank, rows, out), &mut turned, false);
            let mut db = vec![0f32; out * rank];
            for (to, turned) in turned.chunks_exact(out).enumerate() {
                for (db, value) in db.chunks_exact_mut(rank).zip(turned) {
                    db[to] = value * scale;
                }
            }
            Ok([da, db])
        })?;
        gradients.add(self.ids[0], cpu::tensor(da, self.a.shape())?)?;
        gradients.add(self.ids[1], cpu::tensor(db, self.b.shape())?)?;
        cpu::with_floats([&self.a], |[a]| match &self.base {
            Some(base) => Ok(base.pull_back(dy, Some([&dlow, a]), input, gradients)),
            None => {
                let onto = |dx: &mut [f32]| {
                    multiply(Left::Rows(&dlow), a, (rows, rank, width), dx, true);
                    Ok(())
                };
                let fresh = || {
                    let mut dx = vec![0f32; rows * width];
                    onto(&mut dx).map(|()| dx)
                };
                Ok(gradients.add_floats(input, Shape::from((rows, width)), fresh, onto))
            }
        })?
    }
}

/// Rows of a step with the A and B (scaled) of one adapter.
pub type ServedRows<'a> = (Range<usize>, &'a FrozenLinear, &'a FrozenLinear);

/// `base(x)` of several linears over one input, with the low-rank parts of some rows added. x: (N, in) → (N, out) each. Differentiable
/// in x where there are no parts. `soon` are the A's of the linears that come next.
pub fn linears<const L: usize>(
    x: &Tensor,
    of: [(&FrozenLinear, Vec<ServedRows<'_>>); L],
    soon: &[&FrozenLinear],
) -> Result<[Tensor; L]> {
    let mut found = Vec::with_capacity(L);
    if x.device().is_cpu() && !tape::tracked(&[x]) {
        of.iter().try_for_each(|(base, _)| base.check(x))?;
        let x = x.contiguous()?;
        let parts = of.iter().map(|(_, parts)| parts.iter().map(on_cpu).collect());
        let parts = parts.collect::<candle_core::Result<Vec<Vec<_>>>>()?;
        let products = of.iter().zip(&parts).map(|((base, _), parts)| Ok(Adapted { weight: base.packed()?, parts }));
        let products = products.collect::<candle_core::Result<Vec<_>>>()?;
        let soon = soon.iter().map(|a| a.packed()).collect::<candle_core::Result<Vec<_>>>()?;
        let numbers = cpu::with_floats([&x], |[x]| Ok(forward_together(x, &products, &soon)))?;
        for (numbers, (base, _)) in numbers.into_iter().zip(&of) {
            found.push(cpu::tensor(numbers, (x.dim(0)?, base.out_features()))?);
        }
    } else if cuda::takes(x) && !tape::tracked(&[x]) && of.iter().flat_map(|(_, parts)| parts).all(fits) {
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
    let bases: Vec<_> = of.iter().map(|(base, _)| *base).collect();
    bases.iter().try_for_each(|base| base.check(x))?;
    let products = match takes_few(x, bases.iter().copied()) {
        true => few_rows(x, &bases)?,
        false => bases.iter().map(|base| base.product(x)).collect::<Result<Vec<_>>>()?,
    };
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
    if tape::tracked(&[x]) {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;
    use half::f16;

    use super::super::{Codes, only_added, record, record_again};
    use super::*;

    fn numbers(shape: (usize, usize), seed: usize) -> Tensor {
        let of = |index: usize| ((index * 7919 + seed * 104_729) % 997) as f32 / 498.0 - 1.0;
        Tensor::from_vec((0..shape.0 * shape.1).map(of).collect(), shape, &Device::Cpu).unwrap()
    }

    /// In bf16, as beside a bf16 weight on a GPU: near the same in f32, and the gradients of A and B are f32.
    #[test]
    fn composed_low_rank_parts_in_bf16() {
        let (x, a, b, dy) = (numbers((5, 9), 3), numbers((2, 9), 4), numbers((6, 2), 5), numbers((5, 6), 6));
        let run = |dtype: DType| {
            let x = x.to_dtype(dtype).unwrap();
            let (y, tape) = record([&x, &a, &b], || {
                let ids = [a.id(), b.id()];
                let site = Site { base: None, ids, a: a.clone(), b: b.clone(), scale: 1.5, packed_a: None };
                let (y, id, input) = (site.forward(&x)?, x.id(), x.clone());
                tape::push(&[&x], &y, &[], move |dy, gradients| site.backward(&input, &dy.tensor, id, gradients));
                Ok(y)
            })
            .unwrap();
            let mut found = tape.backward([(&y, dy.clone())]).unwrap();
            let [dx, da, db] = [&x, &a, &b].map(|leaf| found.remove(leaf).unwrap());
            assert_eq!([&y, &dx, &da, &db].map(|tensor| tensor.dtype()), [dtype, dtype, DType::F32, DType::F32]);
            [y, dx, da, db].map(|tensor| tensor.to_dtype(DType::F32).unwrap())
        };
        for (narrow, wide) in run(DType::BF16).iter().zip(&run(DType::F32)) {
            let most = |of: &Tensor| of.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(most(&(narrow - wide).unwrap()) < 0.02 * most(wide), "{narrow} {wide}");
        }
    }

    /// Beside weights of 16 bits and of codes: what plain products of the same numbers give, as near as the weight's products are.
    #[test]
    fn gradients_beside_narrow_weights() {
        let (rows, inputs, out) = (7, 64, 40);
        let codes: Vec<i8> = (0..out * inputs).map(|index| (index * 7919 % 255) as i8).collect();
        let scales: Vec<_> =
            (0..out * inputs / 32).map(|index| f16::from_f32(0.001 * (1 + index % 9) as f32)).collect();
        let decoded = codes.iter().enumerate().map(|(at, code)| f32::from(*code) * scales[at / 32].to_f32());
        let decoded = Tensor::from_vec(decoded.collect::<Vec<_>>(), (out, inputs), &Device::Cpu).unwrap();
        let codes = Codes { four_bits: false, group: 32, codes, scales, offsets: None };
        let plain = numbers((out, inputs), 1);
        let narrow = |dtype: DType| plain.to_dtype(dtype).unwrap();
        let bases = [
            (FrozenLinear::new(&narrow(DType::BF16), None).unwrap(), narrow(DType::BF16)),
            (FrozenLinear::new(&narrow(DType::F16), None).unwrap(), narrow(DType::F16)),
            (FrozenLinear::from_codes(codes, (out, inputs), None).unwrap(), decoded),
        ];
        let [x, dy] = [numbers((rows, inputs), 2), numbers((rows, out), 3)];
        let [a, b] = [numbers((3, inputs), 4), numbers((out, 3), 5)];
        for (base, weight) in bases {
            // Eight bits of what is multiplied, where the processor multiplies bf16.
            let most = if base.low_rank_dtype() == DType::BF16 { 0.01 } else { 1e-5 };
            let run = || low_rank(&x, [Trained { base: Some(&base), a: &a, b: &b, scale: 1.5 }]);
            let ([y], tape) = record([&x, &a, &b], run).unwrap();
            let mut found = tape.backward([(&y, dy.clone())]).unwrap();
            let product = |left: &Tensor, right: &Tensor| left.matmul(right).unwrap();
            let weight = weight.to_dtype(DType::F32).unwrap();
            let [scaled, at] = [(&b * 1.5).unwrap(), a.t().unwrap()];
            let [low, dlow] = [product(&x, &at), product(&dy, &scaled)];
            let wanted = [
                (product(&x, &weight.t().unwrap()) + product(&low, &scaled.t().unwrap())).unwrap(),
                (product(&dy, &weight) + product(&dlow, &a)).unwrap(),
                product(&dlow.t().unwrap(), &x),
                (product(&dy.t().unwrap(), &low) * 1.5).unwrap(),
            ];
            let got = [y].into_iter().chain([&x, &a, &b].map(|leaf| found.remove(leaf).unwrap()));
            for (index, (got, wanted)) in got.zip(&wanted).enumerate() {
                let largest = |of: &Tensor| of.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                let gap = largest(&(&got - wanted).unwrap()) / largest(wanted);
                assert!(gap < most, "{index} beside {:?}: off by {gap}", base.low_rank_dtype());
            }
        }
    }

    /// What is only added is left out where a tape is made again; the gradients are the same bits.
    #[test]
    fn a_tape_made_again_leaves_out_what_is_only_added() {
        let linear = FrozenLinear::new(&numbers((6, 9), 1), None).unwrap();
        let (x, a, b, dy) = (numbers((5, 9), 3), numbers((2, 9), 4), numbers((6, 2), 5), numbers((5, 6), 6));
        let leaves = [&x, &a, &b];
        let adapted = || low_rank(&x, [Trained { base: Some(&linear), a: &a, b: &b, scale: 1.5 }]);
        let work = || only_added(|| Ok([adapted()?[0].clone(), linear.forward(&x)?]));
        let [first, second] = [record(leaves, work).unwrap(), record_again(leaves, Vec::new(), work).unwrap()];
        let largest = |y: &Tensor| y.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(first.0.iter().all(|y| largest(y) > 0.1) && second.0.iter().all(|y| largest(y) == 0.0));
        // A recording that is over leaves nothing behind, and what is not marked is computed.
        assert!(largest(&only_added(|| linear.forward(&x)).unwrap()) > 0.1);
        assert!(largest(&record_again(leaves, Vec::new(), adapted).unwrap().0[0]) > 0.1);
        let [first, second] = [first, second].map(|([y, z], tape)| {
            let found = tape.backward([(&y, dy.clone()), (&z, dy.clone())]).unwrap();
            leaves.map(|leaf| found.get(leaf).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
        });
        assert_eq!(first, second);
    }

    /// What a GPU runs gives on a CPU what the kernels give.
    #[test]
    fn composed_low_rank_parts_are_the_kernels_with_their_gradients() {
        let linear = FrozenLinear::new(&numbers((6, 9), 1), Some(&numbers((1, 6), 2).squeeze(0).unwrap())).unwrap();
        for base in [Some(&linear), None] {
            let (x, a, b, dy) = (numbers((5, 9), 3), numbers((2, 9), 4), numbers((6, 2), 5), numbers((5, 6), 6));
            let (y, tape) =
                record([&x, &a, &b], || low_rank(&x, [Trained { base, a: &a, b: &b, scale: 1.5 }])).unwrap();
            let found = tape.backward([(&y[0], dy.clone())]).unwrap();
            let (other, tape) = record([&x, &a, &b], || {
                let ids = [a.id(), b.id()];
                let site = Site { base: base.cloned(), ids, a: a.clone(), b: b.clone(), scale: 1.5, packed_a: None };
                let (y, id, input) = (site.forward(&x)?, x.id(), x.clone());
                tape::push(&[&x], &y, &[], move |dy, gradients| site.backward(&input, &dy.tensor, id, gradients));
                Ok(y)
            })
            .unwrap();
            let others = tape.backward([(&other, dy)]).unwrap();
            let near = |one: &Tensor, other: &Tensor| {
                let gap = (one - other).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                assert!(gap.to_scalar::<f32>().unwrap() < 1e-5);
            };
            near(&y[0], &other);
            for leaf in [&x, &a, &b] {
                near(found.get(leaf).unwrap(), others.get(leaf).unwrap());
            }
        }
    }
}
