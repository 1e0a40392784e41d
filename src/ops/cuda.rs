//! How ops reach the kernels for a GPU.

use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor,
};

pub use crate::kernels::cuda::device as gpu;
use crate::kernels::cuda::{Mark, View, mark};

/// Keeps a GPU from being further behind the thread that feeds it than one turn: what is asked next finds it at work, and who has it next
/// waits for no more than that.
#[derive(Default)]
pub struct Lag(Option<Mark>);

impl Lag {
    /// Ends a turn: waits until the one before it is done. Nothing on a CPU.
    pub fn turn(&mut self, device: &Device) -> Result<()> {
        let Device::Cuda(device) = device else { return Ok(()) };
        match self.0.replace(mark(device)?) {
            Some(before) => before.wait(),
            None => Ok(()),
        }
    }
}

/// Whether there are kernels for the numbers of a tensor.
pub(super) fn takes(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16)
}

/// Runs `read` on contiguous tensors of a GPU.
pub(super) fn with_views<const N: usize, R>(
    tensors: [&Tensor; N],
    read: impl FnOnce([View<'_>; N]) -> Result<R>,
) -> Result<R> {
    with_all(&tensors, |views| read(std::array::from_fn(|index| views[index])))
}

/// [`with_views`] of any number of tensors.
pub(super) fn with_all<R>(tensors: &[&Tensor], read: impl FnOnce(&[View<'_>]) -> Result<R>) -> Result<R> {
    let held: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let mut views = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        match &**storage {
            Storage::Cuda(storage) => views.push(View::new(storage, layout)?),
            _ => candle_core::bail!("not a tensor of a GPU"),
        }
    }
    read(&views)
}

/// The GPU of a tensor.
pub(super) fn device_of(x: &Tensor) -> Result<&CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device),
        _ => candle_core::bail!("not a tensor of a GPU"),
    }
}

/// A tensor of a kernel's result; `beside` is any tensor of the same GPU.
pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>, beside: &Tensor) -> Result<Tensor> {
    beside.apply_op1_no_bwd(&Result1 { storage: Mutex::new(Some(storage)), shape: shape.into() })
}

/// candle makes a tensor of a storage only as the result of an op.
struct Result1 {
    storage: Mutex<Option<CudaStorage>>,
    shape: Shape,
}

impl CustomOp1 for Result1 {
    fn name(&self) -> &'static str {
        "result"
    }

    fn cpu_fwd(&self, _storage: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("a GPU's result on the CPU")
    }

    fn cuda_fwd(&self, _storage: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let taken = self.storage.lock().unwrap_or_else(PoisonError::into_inner).take();
        match taken {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => candle_core::bail!("a result was taken twice"),
        }
    }
}

/// What is made at its first use and kept, beside what it is made from. It is no part of that: a copy makes its own.
pub(super) struct Once<T>(OnceLock<T>);

impl<T> Once<T> {
    /// The value, made by `make` if it is not there.
    pub(super) fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<&T> {
        if let Some(value) = self.0.get() {
            return Ok(value);
        }
        let value = make()?;
        Ok(self.0.get_or_init(|| value))
    }
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Once(OnceLock::new())
    }
}

impl<T> Clone for Once<T> {
    fn clone(&self) -> Self {
        Once::default()
    }
}

impl<T> PartialEq for Once<T> {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl<T> Eq for Once<T> {}

impl<T> std::fmt::Debug for Once<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("_")
    }
}
