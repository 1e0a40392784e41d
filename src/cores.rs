//! Which of the machine's cores a thread computes on: all of them, or a share while serving and training both want them.
//!
//! Decoding waits for memory and training for arithmetic, and neither keeps all cores busy by itself: side by side on some cores each
//! they get further than in turns on all.

use std::cell::RefCell;
use std::sync::Arc;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Threads for all cores, and for the share of each side.
pub struct Cores {
    all: Arc<ThreadPool>,
    serving: ThreadPool,
    training: ThreadPool,
}

thread_local! {
    /// Where this thread's operations run, if not on the pool it belongs to.
    static ELSEWHERE: RefCell<Option<Arc<ThreadPool>>> = const { RefCell::new(None) };
}

/// Runs `work`, the parallel part of an operation, on the cores that this thread has.
pub fn spread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    match ELSEWHERE.with_borrow(Clone::clone) {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

impl Cores {
    /// Divides the threads of the global pool, about `training_share` of them to training and at least one to each side; `None`
    /// where there is only one, or where no threads can be had.
    pub fn divided(training_share: f64) -> Option<Cores> {
        let all = rayon::current_num_threads();
        if all < 2 {
            return None;
        }
        let training = ((all as f64 * training_share).round() as usize).clamp(1, all - 1);
        let pool = |name: &'static str, threads: usize| {
            let builder = ThreadPoolBuilder::new().num_threads(threads);
            let built = builder.thread_name(move |index| format!("{name}-{index}")).build();
            built.inspect_err(|error| tracing::warn!(%error, "serving and training take turns")).ok()
        };
        Some(Cores {
            all: Arc::new(pool("cores", all)?),
            serving: pool("serve", all - training)?,
            training: pool("train", training)?,
        })
    }

    /// Part of the machine that training's share is.
    pub fn training_share(&self) -> f64 {
        self.training.current_num_threads() as f64 / self.all.current_num_threads() as f64
    }

    /// Runs a step of serving on all cores, or on serving's share.
    pub fn serve<T: Send>(&self, whole: bool, work: impl FnOnce() -> T + Send) -> T {
        let pool = if whole { &self.all } else { &self.serving };
        pool.install(work)
    }

    /// Runs training, whose operations are on its share, but for the time between [`Cores::widen`] and [`narrow`].
    pub fn train<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.training.install(work)
    }

    /// From now on this thread's operations run on all cores.
    pub fn widen(&self) {
        ELSEWHERE.set(Some(self.all.clone()));
    }
}

/// From now on this thread's operations run on the pool it belongs to.
pub fn narrow() {
    ELSEWHERE.set(None);
}
