//! Linear layer over a frozen weight: the backward gives `dX = dY·W` and nothing else.

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor, TensorId};

use super::tape::Gradients;
use super::{cpu, cuda, tape};
use crate::error::{Error, Result};
pub use crate::kernels::cpu::Codes;
use crate::kernels::cpu::{Packed, Width};
use crate::kernels::cuda as gpu;

/// A frozen `(out, in)` weight in its compute form: packed for the kernel on the CPU, a plain tensor on a GPU. Cloning shares it.
#[derive(Clone)]
pub struct FrozenLinear {
    weight: Weight,
}

#[derive(Clone)]
enum Weight {
    Packed(Arc<Packed>),
    /// With its bias.
    Dense(Tensor, Option<Tensor>),
}

impl FrozenLinear {
    /// Takes a weight `(out, in)` in f32, f16 or bf16 (kept in that width; on the CPU products accumulate in f32, and
    /// with a bf16 weight the input is rounded to bf16 where the processor multiplies bf16) and an optional
    /// bias `(out)`. On a GPU it shares their memory: a second copy of each while a checkpoint is loaded would leave holes behind that
    /// little fits in. Whoever goes on to change them gives a copy.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (n, k) = weight.dims2()?;
        if let Some(bias) = bias
            && bias.dims() != [n]
        {
            return Err(Error::internal(format!("bias {:?} of a weight with {n} rows", bias.dims())));
        }
        if !weight.device().is_cpu() {
            let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
            let weight = weight.detach().contiguous()?;
            // The kernel of few rows reads weights before it waits for what was asked earlier: they are whole from here on.
            weight.device().synchronize()?;
            return Ok(FrozenLinear { weight: Weight::Dense(weight, bias) });
        }
        let flat = weight.flatten_all()?;
        let width = match weight.dtype() {
            DType::BF16 => Width::Bf16(flat.to_vec1()?),
            DType::F16 => Width::F16(flat.to_vec1()?),
            _ => Width::F32(flat.to_dtype(DType::F32)?.to_vec1()?),
        };
        FrozenLinear::packed_from(&width, (n, k), bias)
    }

    fn packed_from(width: &Width, (n, k): (usize, usize), bias: Option<&Tensor>) -> Result<Self> {
        cpu::keep_candle_on_one_thread();
        let mut packed = Packed::new(width, n, k);
        if let Some(bias) = bias {
            packed = packed.with_bias(bias.to_dtype(DType::F32)?.to_vec1()?);
        }
        Ok(FrozenLinear { weight: Weight::Packed(Arc::new(packed)) })
    }

    /// Takes a quantized weight `(n, k)` and a bias as [`FrozenLinear::new`] does; it stays quantized, and its numbers are read as bf16
    /// where the processor multiplies bf16, else as f32. On the CPU only.
    pub fn from_codes(codes: Codes, (n, k): (usize, usize), bias: Option<&Tensor>) -> Result<Self> {
        FrozenLinear::packed_from(&Width::Codes(codes), (n, k), bias)
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        match &self.weight {
            Weight::Packed(packed) => packed.k(),
            Weight::Dense(weight, _) => weight.dims()[1],
        }
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        match &self.weight {
            Weight::Packed(packed) => packed.n(),
            Weight::Dense(weight, _) => weight.dims()[0],
        }
    }

    /// Bytes of memory it holds.
    pub fn bytes(&self) -> usize {
        let tensor = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match &self.weight {
            Weight::Packed(packed) => packed.bytes(),
            Weight::Dense(weight, bias) => tensor(weight) + bias.as_ref().map_or(0, tensor),
        }
    }

    /// `x·Wᵀ + b`. x: (N, in) → (N, out). Differentiable in `x` only. Each output row depends on its input row alone, bit for bit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let y = match tape::is_unread() {
            true => Tensor::zeros((x.dim(0)?, self.out_features()), x.dtype(), x.device())?,
            false => self.product(&x.contiguous()?)?,
        };
        let (linear, id) = (self.clone(), x.id());
        tape::push(&[x], &y, &[], move |dy, gradients| linear.pull_back(&dy.tensor, None, id, gradients));
        Ok(y)
    }

    pub(super) fn check(&self, x: &Tensor) -> Result<()> {
        match x.dims2()?.1 == self.in_features() {
            true => Ok(()),
            false => {
                let inputs = self.in_features();
                Err(Error::internal(format!("a linear of {inputs} inputs was given {:?}", x.dims())))
            }
        }
    }

    /// The dtype that A and B of a low-rank part beside this weight are multiplied in: both then take the same activations.
    pub fn low_rank_dtype(&self) -> DType {
        match &self.weight {
            Weight::Packed(packed) if packed.is_bf16() => DType::BF16,
            Weight::Packed(_) => DType::F32,
            Weight::Dense(weight, _) => weight.dtype(),
        }
    }

    pub(super) fn packed(&self) -> candle_core::Result<&Packed> {
        match &self.weight {
            Weight::Packed(packed) => Ok(packed),
            Weight::Dense(..) => candle_core::bail!("a CPU tensor met a weight on another device"),
        }
    }

    /// The weight, (out, in), on a GPU.
    pub(super) fn dense(&self) -> candle_core::Result<&Tensor> {
        Ok(self.dense_and_bias()?.0)
    }

    /// [`FrozenLinear::forward`] of contiguous x, not recorded.
    pub(super) fn product(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed(packed) => {
                let y = cpu::with_floats([x], |[x]| Ok(packed.forward(x)))?;
                Ok(cpu::tensor(y, (x.dim(0)?, packed.n()))?)
            }
            Weight::Dense(weight, bias) => {
                if takes_few(x, [self]) {
                    return few_rows(x, &[self])?.pop().ok_or_else(|| Error::internal("no product. This is a bug."));
                }
                let y = x.detach().matmul(&weight.t()?)?;
                match bias {
                    Some(bias) => Ok(y.broadcast_add(bias)?),
                    None => Ok(y),
                }
            }
        }
    }

    /// `dy·W`, the gradient of [`FrozenLinear::forward`] in its input. dy: (N, out) → (N, in).
    pub(super) fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        // cuBLAS takes no broadcast gradient.
        let dy = dy.detach().contiguous()?;
        match &self.weight {
            Weight::Packed(packed) => {
                let dx = cpu::with_floats([&dy], |[dy]| Ok(packed.backward(dy, None)))?;
                Ok(cpu::tensor(dx, (dy.dim(0)?, packed.k()))?)
            }
            Weight::Dense(weight, _) => Ok(dy.matmul(weight)?),
        }
    }

    /// Adds the gradient of the input where it is asked for: `dy·W`, and on a CPU `dlow·A` where `low` has both. dy: (N, out), dlow: (N, R),
    /// A: (R, in).
    pub(super) fn pull_back(
        &self,
        dy: &Tensor,
        low: Option<[&[f32]; 2]>,
        input: TensorId,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Weight::Packed(packed) = &self.weight else { return gradients.add(input, self.backward(dy)?) };
        if !gradients.wants(input) {
            return Ok(());
        }
        let dy = dy.contiguous()?;
        let shape = Shape::from((dy.dim(0)?, packed.k()));
        let fresh = || cpu::with_floats([&dy], |[dy]| Ok(packed.backward(dy, low)));
        let onto = |dx: &mut [f32]| {
            cpu::with_floats([&dy], |[dy]| {
                packed.backward_onto(dy, low, dx);
                Ok(())
            })
        };
        gradients.add_floats(input, shape, fresh, onto)
    }

    fn dense_and_bias(&self) -> candle_core::Result<(&Tensor, Option<&Tensor>)> {
        match &self.weight {
            Weight::Dense(weight, bias) => Ok((weight, bias.as_ref())),
            Weight::Packed(_) => candle_core::bail!("a GPU tensor met a weight on the CPU"),
        }
    }

    /// Rows of the weight, as an embedding table. ids: N token ids → (N, in), in the compute dtype.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.out_features()) {
            return Err(Error::invalid(
                "prompt",
                format!("token id {id} is outside the vocabulary of {}", self.out_features()),
            ));
        }
        match &self.weight {
            Weight::Packed(packed) => {
                let mut rows = vec![0f32; ids.len() * packed.k()];
                rows.chunks_mut(packed.k()).zip(ids).for_each(|(row, id)| packed.row(*id as usize, row));
                Ok(cpu::tensor(rows, (ids.len(), packed.k()))?)
            }
            Weight::Dense(weight, _) => Ok(weight.index_select(&Tensor::new(ids, weight.device())?, 0)?),
        }
    }
}

/// Whether the GPU's kernel of few rows takes contiguous x and these linears.
pub(super) fn takes_few<'a>(x: &Tensor, of: impl IntoIterator<Item = &'a FrozenLinear>) -> bool {
    let Ok((rows, k)) = x.dims2() else { return false };
    let same = |linear: &FrozenLinear| linear.dense().is_ok_and(|weight| weight.dtype() == x.dtype());
    cuda::takes(x)
        && (1..=gpu::MOST_ROWS).contains(&rows)
        && k.is_multiple_of(8)
        && x.layout().start_offset().is_multiple_of(8)
        && of.into_iter().all(same)
}

/// The linears of one input in one launch, where [`takes_few`] says so.
pub(super) fn few_rows(x: &Tensor, of: &[&FrozenLinear]) -> Result<Vec<Tensor>> {
    let weights = of.iter().map(|linear| linear.dense_and_bias()).collect::<candle_core::Result<Vec<_>>>()?;
    let tensors: Vec<_> = weights.iter().flat_map(|(weight, bias)| std::iter::once(*weight).chain(*bias)).collect();
    let (rows, k) = x.dims2()?;
    let products = cuda::with_all(&[&[x], &tensors[..]].concat(), |views| {
        let mut rest = views[1..].iter().copied();
        let mut next = || rest.next().expect("a view for every tensor. This is a bug.");
        let products: Vec<_> = weights.iter().map(|(_, bias)| (next(), bias.map(|_| next()))).collect();
        gpu::few_rows(views[0], k, &products)
    })?;
    let tensor = |(y, linear): (_, &&FrozenLinear)| Ok(cuda::tensor(y, (rows, linear.out_features()), x)?);
    products.into_iter().zip(of).map(tensor).collect()
}
