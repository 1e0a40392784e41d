//! What the processor has, asked once a call.

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
pub(super) fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
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
