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

impl Level {
    pub(super) fn is_avx512(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Level::Avx512;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
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
