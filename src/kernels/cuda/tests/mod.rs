//! The kernels against their twins on the CPU: the same launches, run by a C++ compiler's build of the same sources, or by the GPU that
//! `RDPO_TEST_DEVICE=cuda:N` names in a build with the feature `cuda`.

#![allow(clippy::unwrap_used)]

mod attention;
mod few;
mod head;
mod lora;
mod product;
mod rows;
mod sample;

pub(crate) use sample::sampled;

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, Device, Result};
use half::bf16;

use super::launch::{Arg, Kind, Launch, Queue};
use super::product::{Gemm, Place};
use super::stream;

type Run = unsafe extern "C" fn(*const c_char, *const u32, u32, u32, c_int, *mut *mut c_void) -> *const c_char;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Where the launches of the tests run.
enum Runner {
    Emulated(Emulator),
    Device(CudaDevice),
}

/// Runs launches on this processor, one at a time.
struct Emulator {
    run: Run,
    turn: Mutex<()>,
}

/// None, with the reason printed, where there is neither a GPU named nor a C++ compiler.
fn queue() -> Option<&'static Runner> {
    static RUNNER: OnceLock<Option<Runner>> = OnceLock::new();
    let make = || match gpu() {
        Some(device) => Some(Runner::Device(device)),
        None => build().map(Runner::Emulated),
    };
    RUNNER.get_or_init(make).as_ref()
}

/// The GPU that the environment names, as tests/it/device.rs reads it.
fn gpu() -> Option<CudaDevice> {
    let name = std::env::var("RDPO_TEST_DEVICE").ok().filter(|name| name != "cpu")?;
    let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
    match stream::device(ordinal.expect("RDPO_TEST_DEVICE is `cpu` or `cuda:N`")).unwrap() {
        Device::Cuda(device) => Some(device),
        other => panic!("{other:?} is no GPU"),
    }
}

/// The GPU that the tests run on, if it is one.
fn device() -> Option<&'static CudaDevice> {
    match queue() {
        Some(Runner::Device(device)) => Some(device),
        _ => None,
    }
}

fn build() -> Option<Emulator> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // Elsewhere than it was built, the binary is told where the sources are.
    let root = std::env::var_os("RDPO_TEST_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let source = root.join("src/kernels/cuda/emulate/run.cpp");
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("kernels.so");
    // The check of long jumps takes another fiber's stack for a fault.
    let flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-o"];
    let built = match Command::new(&compiler).args(flags).arg(&library).arg(&source).output() {
        Ok(built) => built,
        Err(error) => {
            eprintln!(
                "skipped: the CUDA kernels are tested with a C++ compiler, and `{compiler}` did not start: {error}"
            );
            return None;
        }
    };
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library was just built from this crate's sources; it runs nothing when it is loaded.
    let loaded = unsafe { dlopen(path.as_ptr(), 2) };
    assert!(!loaded.is_null(), "the emulation does not load");
    // SAFETY: as above.
    let found = unsafe { dlsym(loaded, c"rdpo_launch".as_ptr()) };
    assert!(!found.is_null());
    // SAFETY: the signature is the one in emulate/run.cpp.
    let run = unsafe { std::mem::transmute::<*mut c_void, Run>(found) };
    Some(Emulator { run, turn: Mutex::new(()) })
}

impl Queue for Runner {
    unsafe fn launch(&self, launch: Launch) -> Result<()> {
        // SAFETY: the caller's.
        match self {
            Runner::Emulated(emulator) => unsafe { emulator.launch(launch) },
            Runner::Device(device) => unsafe { device.launch(launch) },
        }
    }

    unsafe fn multiply(&self, gemm: Gemm) -> Result<()> {
        // SAFETY: the caller's.
        match self {
            Runner::Emulated(emulator) => unsafe { emulator.multiply(gemm) },
            Runner::Device(device) => unsafe { device.multiply(gemm) },
        }
    }
}

/// What stands in memory behind an argument of four bytes.
const BEYOND: u64 = 0x5bad_c0de << 32;

impl Queue for Emulator {
    unsafe fn launch(&self, launch: Launch) -> Result<()> {
        // A driver refuses an empty grid, and so few threads have so much shared memory.
        assert!(launch.grid.iter().all(|blocks| *blocks > 0) && launch.shared <= 227 << 10, "{launch:?}");
        let mut values: Vec<Vec<u64>> = launch
            .args
            .iter()
            .map(|arg| match arg {
                Arg::At(address) => vec![*address],
                Arg::Long(value) => vec![*value as u64],
                // A kernel that takes it for a wider one must not find zeros behind it.
                Arg::Int(value) => vec![u64::from(*value as u32) | BEYOND],
                Arg::Float(value) => vec![u64::from(value.to_bits()) | BEYOND],
                Arg::Table(words) => words.to_vec(),
            })
            .collect();
        let mut places: Vec<*mut c_void> = values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        let name = CString::new(launch.kernel.as_str()).unwrap();
        let grid = launch.grid.map(|blocks| blocks as u32);
        let count = places.len() as c_int;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's addresses; every argument has eight bytes or more, of which a narrower one takes the first.
        let fault = unsafe {
            let (threads, shared) = (launch.threads as u32, launch.shared as u32);
            (self.run)(name.as_ptr(), grid.as_ptr(), threads, shared, count, places.as_mut_ptr())
        };
        // SAFETY: a fault is a string of the library's.
        assert!(fault.is_null(), "{}: {}", launch.kernel, unsafe { CStr::from_ptr(fault) }.to_string_lossy());
        Ok(())
    }

    unsafe fn multiply(&self, gemm: Gemm) -> Result<()> {
        let Gemm { size: [m, n, k], a, b, c, alpha, beta } = gemm;
        // SAFETY: the caller's.
        let read = |of: &Place, row: usize, column: usize| unsafe {
            let (row, column) = if of.turned { (column, row) } else { (row, column) };
            let at = column * of.pitch + row;
            match of.kind {
                Kind::F32 => *(of.at as *const f32).add(at),
                Kind::Bf16 => (*(of.at as *const bf16).add(at)).to_f32(),
            }
        };
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let sum: f32 = (0..k).map(|at| read(&a, row, at) * read(&b, at, column)).sum();
            let value = alpha * sum + if beta == 0.0 { 0.0 } else { beta * read(&c, row, column) };
            // SAFETY: the caller's.
            unsafe {
                match c.kind {
                    Kind::F32 => *(c.at as *mut f32).add(column * c.pitch + row) = value,
                    Kind::Bf16 => *(c.at as *mut bf16).add(column * c.pitch + row) = bf16::from_f32(value),
                }
            }
        }
        Ok(())
    }
}

/// An array for a kernel, with a border behind it that nothing may touch.
struct Array {
    held: Held,
    bytes: usize,
    kind: Option<Kind>,
}

/// Aligned to 16 bytes and more, as a GPU's allocations are.
enum Held {
    Here(Vec<u128>),
    There(CudaStorage),
}

const BORDER: usize = 16;
const UNTOUCHED: u128 = u128::MAX;

impl Array {
    fn of_bytes(bytes: &[u8], kind: Option<Kind>) -> Self {
        let mut held = vec![UNTOUCHED; bytes.len().div_ceil(16) + BORDER];
        // SAFETY: the copy is inside what was allocated.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), held.as_mut_ptr().cast::<u8>(), bytes.len()) };
        let held = match device() {
            Some(device) => {
                let words: Vec<u32> =
                    all_bytes(&held).chunks(4).map(|of| u32::from_ne_bytes(of.try_into().unwrap())).collect();
                Held::There(device.storage_from_slice(&words).unwrap())
            }
            None => Held::Here(held),
        };
        Array { held, bytes: bytes.len(), kind }
    }

    /// `values` as `kind` rounds them.
    fn of(kind: Kind, values: &[f32]) -> Self {
        let bytes: Vec<u8> = match kind {
            Kind::F32 => values.iter().flat_map(|value| value.to_ne_bytes()).collect(),
            Kind::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_ne_bytes()).collect(),
        };
        Array::of_bytes(&bytes, Some(kind))
    }

    /// `len` numbers that are NaN until a kernel writes them.
    fn blank(kind: Kind, len: usize) -> Self {
        let size = if kind == Kind::F32 { 4 } else { 2 };
        Array::of_bytes(&vec![0xff; len * size], Some(kind))
    }

    fn of_ids(ids: &[u32]) -> Self {
        Array::of_bytes(&ids.iter().flat_map(|id| id.to_ne_bytes()).collect::<Vec<_>>(), None)
    }

    fn at(&self) -> u64 {
        match &self.held {
            Held::Here(held) => held.as_ptr() as u64,
            Held::There(storage) => stream::address(storage).unwrap(),
        }
    }

    /// What it holds once the launches are done.
    fn bytes(&self) -> Cow<'_, [u8]> {
        let mut all = match &self.held {
            Held::Here(held) => Cow::Borrowed(all_bytes(held)),
            Held::There(storage) => match storage.to_cpu_storage().unwrap() {
                CpuStorage::U32(words) => Cow::Owned(words.iter().flat_map(|word| word.to_ne_bytes()).collect()),
                other => panic!("{other:?} are no words"),
            },
        };
        assert!(all[self.bytes..].iter().all(|byte| *byte == 0xff), "written past the end of an array");
        match &mut all {
            Cow::Borrowed(all) => *all = &all[..self.bytes],
            Cow::Owned(all) => all.truncate(self.bytes),
        }
        all
    }

    fn numbers(&self) -> Vec<f32> {
        match self.kind.unwrap() {
            Kind::F32 => self.bytes().chunks(4).map(|of| f32::from_ne_bytes(of.try_into().unwrap())).collect(),
            Kind::Bf16 => {
                self.bytes().chunks(2).map(|of| bf16::from_ne_bytes(of.try_into().unwrap()).to_f32()).collect()
            }
        }
    }
}

fn all_bytes(held: &[u128]) -> &[u8] {
    // SAFETY: all of it is initialized.
    unsafe { std::slice::from_raw_parts(held.as_ptr().cast::<u8>(), held.len() * 16) }
}

/// Numbers in (-1, 1).
fn random(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Random numbers as `kind` holds them, for the kernel and for its twin.
fn given(kind: Kind, count: usize, seed: u32) -> (Array, Vec<f32>) {
    let array = Array::of(kind, &random(count, seed));
    let numbers = array.numbers();
    (array, numbers)
}

/// How much more than by emulation a number may be off on a GPU: its exponentials and roots are approximations, its products are fused
/// with sums.
const DEVICE_SLACK: f32 = 4.0;

/// Every number within `most` of the largest wanted, or within a bf16's rounding of it.
fn assert_near(what: &str, got: &Array, wanted: &[f32], most: f32) {
    let most = if device().is_some() { DEVICE_SLACK * most } else { most };
    let numbers = got.numbers();
    assert_eq!(numbers.len(), wanted.len(), "{what}");
    let largest = wanted.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(largest > 0.0, "{what}: nothing is wanted");
    for (index, (got_one, wanted)) in numbers.iter().zip(wanted).enumerate() {
        let rounding = if got.kind == Some(Kind::Bf16) { wanted.abs() / 256.0 } else { 0.0 };
        let off = (got_one - wanted).abs();
        assert!(off <= most * largest + rounding, "{what}, number {index}: {got_one}, its twin {wanted}");
    }
}

const KINDS: [Kind; 2] = [Kind::F32, Kind::Bf16];
