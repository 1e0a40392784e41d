//! A failure of the device that a test orders: what a GPU's driver says when it has no memory left.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Result;

/// Residual blocks that still succeed before one fails; `usize::MAX` for no failure.
pub(crate) struct Fault(AtomicUsize);

impl Default for Fault {
    fn default() -> Self {
        Fault(AtomicUsize::new(usize::MAX))
    }
}

impl Fault {
    /// Lets `blocks` more succeed, and one fail.
    pub(crate) fn order(&self, blocks: usize) {
        self.0.store(blocks, Ordering::Relaxed);
    }

    /// Whether what was ordered is still to come.
    pub(crate) fn is_ordered(&self) -> bool {
        self.0.load(Ordering::Relaxed) != usize::MAX
    }

    pub(super) fn meet(&self) -> Result<()> {
        let left = |left: usize| (left != usize::MAX).then(|| left.checked_sub(1).unwrap_or(usize::MAX));
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
            Ok(0) => {
                let driver = Box::from("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
                Err(candle_core::Error::Cuda(driver).bt().into())
            }
            _ => Ok(()),
        }
    }
}
