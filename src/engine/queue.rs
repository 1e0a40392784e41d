//! Requests that were accepted and have not begun, by role: a flood of one leaves the others their room.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Code, Error, Result};
use crate::telemetry::metrics;

/// Counts those who wait.
pub struct Queue {
    most: usize,
    waiting: Mutex<HashMap<&'static str, usize>>,
}

impl Queue {
    /// With room for so many of each role.
    pub fn new(most: usize) -> Self {
        Queue { most, waiting: Mutex::default() }
    }

    /// Most of a role that may wait.
    pub fn most(&self) -> usize {
        self.most
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.lock().values().sum()
    }

    /// A place; 429 where there is none.
    pub fn enter(&self, role: &'static str) -> Result<()> {
        let mut waiting = self.lock();
        let of_role = waiting.entry(role).or_default();
        if *of_role >= self.most {
            metrics().queue_rejections_total.with_label_values(&[role]).inc();
            let text = format!("{of_role} requests are waiting already; try again in a moment");
            return Err(Error::new(Code::RateLimited, text));
        }
        *of_role += 1;
        Ok(())
    }

    /// Gives a place back.
    pub fn leave(&self, role: &'static str) {
        let mut waiting = self.lock();
        let of_role = waiting.entry(role).or_default();
        *of_role = of_role.saturating_sub(1);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<&'static str, usize>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
