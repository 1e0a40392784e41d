//! A GPU's stream as a queue of launches, and the memory behind candle's storages.

use std::ffi::c_void;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys as cublas};
use candle_core::cuda_backend::cudarc::driver::result::{device::get_default_mem_pool, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum as PoolAttribute;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, DevicePtr, sys};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape};

use super::launch::{Arg, Kind, Launch, Queue};
use super::product::{Gemm, Place};

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

/// A place in what a GPU was asked to do.
pub struct Mark(CudaEvent);

/// Behind all that was asked so far.
pub fn mark(device: &CudaDevice) -> Result<Mark> {
    Ok(Mark(device.cuda_stream().record_event(None).w()?))
}

impl Mark {
    /// Until the GPU is there.
    pub fn wait(&self) -> Result<()> {
        Ok(self.0.synchronize().w()?)
    }
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
    let of_pool =
        [PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT];
    read(device, of_pool).map_or(0, |[held, used]| held.saturating_sub(used))
}

/// Most bytes that the pool had of the driver, and most of them in use; `None` where there is no pool.
pub fn peak_bytes(device: &CudaDevice) -> Option<[u64; 2]> {
    read(device, [PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH])
}

fn read(device: &CudaDevice, attributes: [PoolAttribute; 2]) -> Option<[u64; 2]> {
    let (pool, mut found) = (pool(device)?, [0u64; 2]);
    for (attribute, bytes) in attributes.into_iter().zip(&mut found) {
        // SAFETY: the pool is there for as long as the device, and these attributes are a u64 each.
        unsafe { mem_pool::get_attribute(pool, attribute, std::ptr::from_mut(bytes).cast()) }.ok()?;
    }
    Some(found)
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
        let place = |arg: &Arg| match arg {
            Arg::At(address) => std::ptr::from_ref(address).cast_mut().cast(),
            Arg::Int(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::Long(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::Float(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::Table(words) => words.as_ptr().cast_mut().cast(),
        };
        let mut args: Vec<*mut c_void> = launch.args.iter().map(place).collect();
        let stream = self.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let mut overlapping = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: stream.cu_stream(),
            attrs: &raw mut overlapping,
            numAttrs: u32::from(cfg!(overlapping_launches)),
        };
        // SAFETY: the caller's; the arguments are read before it returns, and every kernel begins by waiting for the launches before it.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.cu_function(), args.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .w()?;
        Ok(())
    }

    unsafe fn multiply(&self, gemm: Gemm) -> Result<()> {
        if gemm.size.contains(&0) {
            return Ok(());
        }
        let int = |value: usize| i32::try_from(value).expect("a size of one step fits 31 bits. This is a bug.");
        let [m, n, k] = gemm.size.map(int);
        let turn = |place: &Place| match place.turned {
            true => cublas::cublasOperation_t::CUBLAS_OP_T,
            false => cublas::cublasOperation_t::CUBLAS_OP_N,
        };
        let numbers = |place: &Place| match place.kind {
            Kind::F32 => cublas::cudaDataType::CUDA_R_32F,
            Kind::Bf16 => cublas::cudaDataType::CUDA_R_16BF,
        };
        let (Gemm { a, b, c, .. }, handle) = (&gemm, self.cublas_handle());
        let compute = cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let algorithm = cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;
        let (alpha, beta) = (std::ptr::from_ref(&gemm.alpha).cast(), std::ptr::from_ref(&gemm.beta).cast());
        let [lda, ldb, ldc] = [a, b, c].map(|place| int(place.pitch));
        let [at_a, at_b] = [a, b].map(|place| place.at as *const _);
        // SAFETY: the caller's; the handle is of this device's stream, and alpha and beta are read before it returns.
        unsafe {
            let (kind_a, kind_b, kind_c) = (numbers(a), numbers(b), numbers(c));
            let at_c = c.at as *mut _;
            gemm_ex(
                *handle.handle(),
                turn(a),
                turn(b),
                m,
                n,
                k,
                alpha,
                at_a,
                kind_a,
                lda,
                at_b,
                kind_b,
                ldb,
                beta,
                at_c,
                kind_c,
                ldc,
                compute,
                algorithm,
            )
        }
        .w()?;
        Ok(())
    }
}

/// Memory for `shape`, holding anything.
pub(crate) fn fresh(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
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
