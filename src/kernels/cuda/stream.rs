//! A GPU's stream as a queue of launches, and the memory behind candle's storages.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::result::{device::get_default_mem_pool, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum as PoolAttribute;
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
    keep_memory(&device);
    Ok(Device::Cuda(device))
}

/// The pool that candle's allocations come from; none where the driver has no pools.
fn pool(device: &CudaDevice) -> Option<sys::CUmemoryPool> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return None;
    }
    // SAFETY: the context is of that device.
    unsafe { get_default_mem_pool(context.cu_device()) }.ok()
}

/// By default a pool gives back to the driver what is free in it whenever somebody waits for the device, which training does after every
/// block: each would begin with asking the driver for memory.
fn keep_memory(device: &CudaDevice) {
    let Some(pool) = pool(device) else { return };
    let mut threshold = u64::MAX;
    // SAFETY: the pool is there for as long as the device, and the attribute is a u64.
    let kept = unsafe {
        let attribute = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut threshold).cast())
    };
    if let Err(error) = kept {
        tracing::warn!(%error, "the driver takes freed memory back at every wait");
    }
}

/// Bytes that the pool has of the driver and nobody uses; none where there is no pool.
pub fn idle_bytes(device: &CudaDevice) -> u64 {
    let Some(pool) = pool(device) else { return 0 };
    let read = |attribute| {
        let mut bytes = 0u64;
        // SAFETY: the pool is there for as long as the device, and both attributes are a u64.
        unsafe { mem_pool::get_attribute(pool, attribute, std::ptr::from_mut(&mut bytes).cast()) }.ok().map(|()| bytes)
    };
    let held = read(PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    let used = read(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    held.zip(used).map_or(0, |(held, used)| held.saturating_sub(used))
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
