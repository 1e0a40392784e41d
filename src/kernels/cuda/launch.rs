//! What a launch is made of. The launches of this module only name addresses, so that the tests can run them on a CPU.

use candle_core::{DType, Result};

use super::product::Gemm;

/// Words of a table that comes with a launch: less than the 4 KiB that all its arguments may have.
pub(super) const WORDS: usize = 320;

/// An argument of a kernel, of the width its signature has.
#[derive(Clone, Debug)]
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))] // only a GPU reads them
pub(super) enum Arg {
    /// Where an array begins on the device; zero for none.
    At(u64),
    Int(i32),
    Long(i64),
    Float(f32),
    /// A structure by value.
    Table(Box<[u64; WORDS]>),
}

impl Arg {
    /// A count or size that kernels take as `int`.
    pub(super) fn int(value: usize) -> Self {
        Arg::Int(i32::try_from(value).expect("a size of one step fits 31 bits. This is a bug."))
    }
}

/// The numbers of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    Bf16,
}

impl Kind {
    pub(super) fn of(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Kind::F32),
            DType::BF16 => Ok(Kind::Bf16),
            other => candle_core::bail!("the GPU's kernels are for f32 and bf16, not {other:?}"),
        }
    }

    /// The kernel for these numbers.
    pub(super) fn name(self, kernel: &str) -> String {
        match self {
            Kind::F32 => format!("{kernel}_float"),
            Kind::Bf16 => format!("{kernel}_bf16"),
        }
    }
}

/// One launch: which kernel on how many blocks of how many threads with how many bytes of shared memory.
#[derive(Clone, Debug)]
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))] // only a GPU reads them
pub(super) struct Launch {
    pub(super) kernel: String,
    pub(super) grid: [usize; 3],
    pub(super) threads: usize,
    pub(super) shared: usize,
    pub(super) args: Vec<Arg>,
}

/// Runs launches in order: a stream of a GPU, or the tests' emulation.
pub(super) trait Queue {
    /// # Safety
    /// Every address must be that of an array as long as the kernel takes it to be, and none that is written may be in use.
    unsafe fn launch(&self, launch: Launch) -> Result<()>;

    /// # Safety
    /// As [`Queue::launch`], for the matrices.
    unsafe fn multiply(&self, gemm: Gemm) -> Result<()>;
}
