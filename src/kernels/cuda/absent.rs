//! In place of `stream.rs` in a build without the feature `cuda`: every call is an error.

use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Result, Shape};

use super::launch::{Launch, Queue};
use super::product::Gemm;

/// An error: there is no GPU in this build.
pub fn device(_ordinal: usize) -> Result<Device> {
    Err(Error::NotCompiledWithCudaSupport)
}

/// There is none.
pub struct Mark;

/// An error.
pub fn mark(_device: &CudaDevice) -> Result<Mark> {
    Err(Error::NotCompiledWithCudaSupport)
}

impl Mark {
    /// An error.
    pub fn wait(&self) -> Result<()> {
        Err(Error::NotCompiledWithCudaSupport)
    }
}

impl Queue for CudaDevice {
    unsafe fn launch(&self, _launch: Launch) -> Result<()> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    unsafe fn multiply(&self, _gemm: Gemm) -> Result<()> {
        Err(Error::NotCompiledWithCudaSupport)
    }
}

pub(crate) fn fresh(_device: &CudaDevice, _shape: &Shape, _dtype: DType) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn address(_storage: &CudaStorage) -> Result<u64> {
    Err(Error::NotCompiledWithCudaSupport)
}
