//! In place of `stream.rs` in a build without the feature `cuda`: every call is an error.

use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Result, Shape};

use super::launch::{Launch, Queue};

/// An error: there is no GPU in this build.
pub fn device(_ordinal: usize) -> Result<Device> {
    Err(Error::NotCompiledWithCudaSupport)
}

impl Queue for CudaDevice {
    unsafe fn launch(&self, _launch: Launch) -> Result<()> {
        Err(Error::NotCompiledWithCudaSupport)
    }
}

pub(super) fn fresh(_device: &CudaDevice, _shape: &Shape, _dtype: DType) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn address(_storage: &CudaStorage) -> Result<u64> {
    Err(Error::NotCompiledWithCudaSupport)
}
