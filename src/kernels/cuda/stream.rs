//! A GPU's stream as a queue of launches, and the memory behind candle's storages.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, sys};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape};

use super::launch::{Arg, Launch, Queue};

const MODULE: &str = "rdpo";
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
/// Shared memory that every kernel may have; more is asked for.
const PLAIN_SHARED: usize = 48 << 10;

/// GPU `ordinal` with one stream for all threads: work of any thread is done in the order it was asked for.
pub fn device(ordinal: usize) -> Result<Device> {
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: candle's device launches, copies and frees on its one stream alone, so there is nothing to order by events.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

impl Queue for CudaDevice {
    unsafe fn launch(&self, launch: Launch) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let function = self.get_or_load_custom_func(&launch.kernel, MODULE, PTX)?;
        if launch.shared > PLAIN_SHARED {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, launch.shared as i32).w()?;
        }
        let mut builder = function.builder();
        for arg in &launch.args {
            match arg {
                Arg::At(address) => builder.arg(address),
                Arg::Int(value) => builder.arg(value),
                Arg::Long(value) => builder.arg(value),
                Arg::Float(value) => builder.arg(value),
                Arg::Table(words) => builder.arg(&**words),
            };
        }
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.threads as u32, 1, 1),
            shared_mem_bytes: launch.shared as u32,
        };
        // SAFETY: the caller's.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// Memory for `shape`, holding anything.
pub(super) fn fresh(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: every kernel that is given it writes it whole before it is read.
    unsafe { device.alloc_uninit(shape, dtype) }
}

/// Where the numbers of a storage begin.
pub(super) fn address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device().cuda_stream();
    let address = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("the GPU's kernels take f32, bf16 and u32, not {:?}", storage.dtype()),
    };
    Ok(address)
}
