//! What the processor has, asked once a call, and memory that tasks write.

use rayon::prelude::*;

use crate::cores::spread;

/// The widest instructions that the kernels may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// The level of this processor.
pub(super) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// Whether pairs of bf16 numbers can be multiplied and summed in f32 by one instruction.
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Keeps candle's own element-wise operations on the thread that asks for them, unless `CANDLE_NUM_THREADS` says how many it takes.
///
/// Above 64 Ki numbers candle hands them to a pool of its own whose threads spin while they wait for each other. Beside rayon's
/// threads, a server's and other processes on the same cores, that waiting took three quarters of a training step. What is large
/// runs on rayon in these kernels; what is left to candle is small.
pub fn keep_candle_on_one_thread() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
            // SAFETY: Rust's own readers of the environment are locked out meanwhile. It happens once, when the first model is
            // loaded, before this process has served or trained anything.
            unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
        }
    });
}

/// A raw output that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Out(pub(super) *mut f32);
// SAFETY: every task writes its own rows and columns only.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub(super) fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// A vector of `len` numbers that `fill` writes all of.
///
/// # Safety
/// `fill` writes every one of the `len` numbers behind the pointer it is given.
pub(super) unsafe fn filled(len: usize, fill: impl FnOnce(Out)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(Out(values.as_mut_ptr()));
    // SAFETY: the capacity is `len`, and `fill` wrote them all.
    unsafe { values.set_len(len) };
    values
}

/// N vectors of `len` numbers, worked out some at a time: `work` is given where a chunk of at most `chunk` begins and its places in each
/// vector, zeroed. Chunk by chunk they are zeroed by whoever writes them, in cache.
pub fn in_chunks<const N: usize>(
    len: usize,
    chunk: usize,
    work: impl Fn(usize, [&mut [f32]; N]) + Sync,
) -> [Vec<f32>; N] {
    let mut found: [Vec<f32>; N] = std::array::from_fn(|_| Vec::with_capacity(len));
    let places = found.each_mut().map(|values| Out(values.as_mut_ptr()));
    let one = |index: usize| {
        let at = index * chunk;
        let count = chunk.min(len - at);
        let parts = places.map(|place| {
            // SAFETY: the chunk is inside the capacity and this task's alone.
            unsafe {
                place.at(at).write_bytes(0, count);
                std::slice::from_raw_parts_mut(place.at(at), count)
            }
        });
        work(at, parts);
    };
    spread(|| (0..len.div_ceil(chunk)).into_par_iter().for_each(one));
    for values in &mut found {
        // SAFETY: the tasks zeroed them all, at least.
        unsafe { values.set_len(len) };
    }
    found
}
