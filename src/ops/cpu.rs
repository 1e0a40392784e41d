//! How ops reach the numbers of CPU tensors.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Tensor};

pub(super) use crate::kernels::cpu::{in_chunks, keep_candle_on_one_thread};

/// The contiguous f32 numbers of a storage.
pub(super) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(all) = storage else {
        candle_core::bail!("the CPU computes in f32, got {:?}", storage_dtype(storage))
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("a CPU kernel needs contiguous input"),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Runs `read` on the numbers of contiguous CPU tensors.
pub(super) fn with_floats<const N: usize, R>(
    tensors: [&Tensor; N],
    read: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let held: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&held) {
        *slice = match &**storage {
            candle_core::Storage::Cpu(storage) => floats(storage, layout)?,
            _ => candle_core::bail!("not a CPU tensor"),
        };
    }
    read(slices)
}

/// A tensor on the CPU.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &candle_core::Device::Cpu)
}

/// Runs `change` on the numbers of a contiguous CPU tensor, in place.
pub(super) fn with_floats_mut(tensor: &Tensor, change: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Change(RefCell::new(Some(change))))
}

struct Change<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(all) = storage else {
            candle_core::bail!("the CPU computes in f32, got {:?}", storage_dtype(storage))
        };
        match (layout.contiguous_offsets(), self.0.take()) {
            (Some((start, end)), Some(change)) => change(&mut all[start..end]),
            _ => candle_core::bail!("a CPU kernel needs contiguous input"),
        }
    }
}
