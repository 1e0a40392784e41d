//! Who has the device: decode steps first, training between residual blocks, with a bounded share for each.
//!
//! On a GPU, or on one core, they take turns, and training has a share of the time. On several cores each side has some of them while
//! both want to run, and all of them while it is alone.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cores::{self, Cores};

/// Serving counts as busy until this long after its last step: between two steps it only samples and schedules.
const GRACE: Duration = Duration::from_millis(5);

/// Most device time training may save up, so that a long wait does not become a long stall.
const MOST_CREDIT_SECONDS: f64 = 0.25;

/// Most of it that training takes in one turn, so that what a long prompt earned it is not one long stall for those who decode.
const MOST_TURN_SECONDS: f64 = 0.03;

/// How long the device is kept for training that has just given it back with time still due: it comes again at once.
const BETWEEN_SLICES: Duration = Duration::from_millis(1);

/// A lock with priorities over one device.
pub struct Gate {
    /// Seconds training earns for each second serving uses.
    rate: f64,
    /// Where both sides can run at once.
    cores: Option<Cores>,
    state: Mutex<State>,
    changed: Condvar,
}

/// How much of the device one side holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Whole,
    Share,
}

struct State {
    serving: Option<Hold>,
    training: Option<Hold>,
    serving_waits: usize,
    training_waits: usize,
    /// Device time training is owed.
    credit_seconds: f64,
    /// How long training held the device the last time.
    last_slice_seconds: f64,
    /// Device time training has had since serving had it.
    turn_seconds: f64,
    last_trained: Option<Instant>,
    last_served: Option<Instant>,
    /// Device time used since [`Gate::utilization`] was asked last, and when that was.
    used_seconds: f64,
    asked: Instant,
}

/// Holding it is having the device.
pub struct GateGuard<'a> {
    gate: &'a Gate,
    since: Instant,
    serving: bool,
    hold: Hold,
}

impl Gate {
    /// Serving and training take turns. `training_share`: the share of device time training keeps while serving is busy, in (0, 1].
    pub fn new(training_share: f64) -> Self {
        Self::with(training_share, None)
    }

    /// Serving and training divide the cores, training having about `training_share` of them while both run; with one core they
    /// take turns.
    pub fn on_cores(training_share: f64) -> Self {
        Self::with(training_share, Cores::divided(training_share))
    }

    fn with(training_share: f64, cores: Option<Cores>) -> Self {
        let share = training_share.clamp(0.01, 0.99);
        let state = State {
            serving: None,
            training: None,
            serving_waits: 0,
            training_waits: 0,
            credit_seconds: 0.0,
            last_slice_seconds: 0.0,
            turn_seconds: 0.0,
            last_trained: None,
            last_served: None,
            used_seconds: 0.0,
            asked: Instant::now(),
        };
        Gate { rate: share / (1.0 - share), cores, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// For an engine step: next in line, at most one slice of training away.
    pub fn serve(&self) -> GateGuard<'_> {
        let mut state = self.lock();
        state.serving_waits += 1;
        let is_here = loop {
            let is_here = state.training_is_here();
            let must_wait = self.must_wait(state.training, is_here && state.training_is_due());
            if state.serving.is_none() && !must_wait {
                break is_here;
            }
            state = self.changed.wait_timeout(state, BETWEEN_SLICES).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.serving_waits -= 1;
        let hold = self.hold(is_here);
        state.serving = Some(hold);
        state.turn_seconds = 0.0;
        GateGuard { gate: self, since: Instant::now(), serving: true, hold }
    }

    /// For one slice of training: waits while serving is owed the device. To be asked by the thread that trains, within
    /// [`Gate::training`]: what that thread computes meanwhile runs on the cores it was given.
    pub fn train(&self) -> GateGuard<'_> {
        let mut state = self.lock();
        state.training_waits += 1;
        let is_here = loop {
            let is_here = state.serving_is_here();
            let must_wait = self.must_wait(state.serving, is_here && !state.training_is_due());
            if state.training.is_none() && !must_wait {
                break is_here;
            }
            state = self.changed.wait_timeout(state, GRACE).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.training_waits -= 1;
        let hold = self.hold(is_here);
        state.training = Some(hold);
        if let (Some(cores), Hold::Whole) = (&self.cores, hold) {
            cores.widen();
        }
        GateGuard { gate: self, since: Instant::now(), serving: false, hold }
    }

    /// Runs a whole training, whose slices ask [`Gate::train`], on a thread that belongs to training's share of the cores.
    pub fn training<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.cores {
            Some(cores) => cores.train(work),
            None => work(),
        }
    }

    /// For what the other side holds; with nothing to divide, also for the turn it is owed.
    fn must_wait(&self, other: Option<Hold>, is_owed: bool) -> bool {
        other.map_or(self.cores.is_none() && is_owed, |hold| hold == Hold::Whole)
    }

    fn hold(&self, other_is_here: bool) -> Hold {
        if self.cores.is_some() && other_is_here { Hold::Share } else { Hold::Whole }
    }

    /// Share of the time since this was asked last in which the device was held; what is held now counts when it is given back.
    pub fn utilization(&self) -> f64 {
        let mut state = self.lock();
        let used = std::mem::take(&mut state.used_seconds);
        let passed = std::mem::replace(&mut state.asked, Instant::now()).elapsed().as_secs_f64();
        (used / passed.max(f64::MIN_POSITIVE)).min(1.0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Slices have a length of their own: one is due when it overdraws the credit by no more than half of it, so that a client's
    /// longest waits are half a slice above the mean and not a whole one.
    fn training_is_due(&self) -> bool {
        let enough = (self.last_slice_seconds / 2.0).min(MOST_CREDIT_SECONDS / 2.0);
        self.credit_seconds > enough && self.turn_seconds < MOST_TURN_SECONDS
    }

    fn training_is_here(&self) -> bool {
        self.training.is_some()
            || self.training_waits > 0
            || self.last_trained.is_some_and(|at| at.elapsed() < BETWEEN_SLICES)
    }

    /// One who waits to serve counts from the moment he waits: the thread that trains is back for its next slice before he has even
    /// woken.
    fn serving_is_here(&self) -> bool {
        self.serving.is_some() || self.serving_waits > 0 || self.last_served.is_some_and(|at| at.elapsed() < GRACE)
    }
}

impl GateGuard<'_> {
    /// Runs an engine step on the cores it was given, on one of their threads, which hands an operation's parts to the others without
    /// going to sleep meanwhile.
    pub fn run<T: Send>(self, work: impl FnOnce(Self) -> T + Send) -> T {
        match &self.gate.cores {
            Some(cores) => cores.serve(self.hold == Hold::Whole, || work(self)),
            None => rayon::scope(|_| work(self)),
        }
    }

    /// Part of the device that is held.
    fn part(&self) -> f64 {
        match (&self.gate.cores, self.hold) {
            (Some(cores), Hold::Share) if self.serving => 1.0 - cores.training_share(),
            (Some(cores), Hold::Share) => cores.training_share(),
            _ => 1.0,
        }
    }
}

impl Drop for GateGuard<'_> {
    fn drop(&mut self) {
        let used = self.since.elapsed().as_secs_f64();
        let mut state = self.gate.lock();
        state.used_seconds += used * self.part();
        if self.serving {
            state.serving = None;
            state.last_served = Some(Instant::now());
            if state.training_waits > 0 {
                state.credit_seconds = (state.credit_seconds + used * self.gate.rate).min(MOST_CREDIT_SECONDS);
            }
        } else {
            cores::narrow();
            state.training = None;
            (state.last_slice_seconds, state.last_trained) = (used, Some(Instant::now()));
            state.turn_seconds += used;
            // What training takes while nobody serves is not held against it later.
            let lately = |at: Instant| at.elapsed().as_secs_f64() < used + GRACE.as_secs_f64();
            if state.serving_waits > 0 || state.last_served.is_some_and(lately) {
                state.credit_seconds = (state.credit_seconds - used).max(-MOST_CREDIT_SECONDS);
            }
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{scope, sleep};

    use super::*;

    /// Runs a training loop of 2 ms slices beside `serve` for a while; returns the device seconds training had.
    fn train_beside(gate: &Gate, serve: impl FnOnce()) -> f64 {
        let stop = AtomicBool::new(false);
        scope(|threads| {
            let training = threads.spawn(|| {
                let mut seconds = 0.0;
                gate.training(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let guard = gate.train();
                        sleep(Duration::from_millis(2));
                        seconds += guard.since.elapsed().as_secs_f64();
                    }
                });
                seconds
            });
            serve();
            stop.store(true, Ordering::Relaxed);
            training.join().unwrap_or(0.0)
        })
    }

    #[test]
    fn training_has_the_device_when_nobody_serves() {
        let gate = Gate::new(0.3);
        let trained = train_beside(&gate, || sleep(Duration::from_millis(300)));
        assert!(trained > 0.2, "trained {trained} s of 0.3");
    }

    #[test]
    fn with_several_cores_both_run_at_once_on_their_share_and_alone_on_all() {
        let Some(cores) = Cores::divided(0.5) else { return };
        let (all, training) = (rayon::current_num_threads(), cores.training_share());
        let gate = Gate::with(0.5, Some(cores));
        let width = || cores::spread(rayon::current_num_threads);
        assert_eq!(gate.serve().run(|_| width()), all, "alone");
        gate.training(|| {
            sleep(2 * GRACE);
            let slice = gate.train();
            assert_eq!(width(), all, "alone");
            scope(|threads| {
                let serving = threads.spawn(|| {
                    let step = gate.serve();
                    (step.hold, step.run(|_| width()), Instant::now())
                });
                sleep(Duration::from_millis(20));
                let ended = Instant::now();
                drop(slice);
                let slice = gate.train();
                let (hold, served_on, served_at) = serving.join().expect("no panic");
                assert!(served_at > ended, "who has all cores is waited for");
                assert_eq!((hold, slice.hold), (Hold::Share, Hold::Share));
                assert_eq!(served_on + width(), all, "at once");
                assert_eq!(width() as f64, training * all as f64);
            });
        });
    }

    #[test]
    fn utilization_is_what_was_held_since_it_was_asked() {
        let gate = Gate::new(0.5);
        let guard = gate.serve();
        sleep(Duration::from_millis(20));
        drop(guard);
        let share = gate.utilization();
        assert!(share > 0.5 && share <= 1.0, "{share}");
        sleep(Duration::from_millis(5));
        assert_eq!(gate.utilization(), 0.0);
    }

    #[test]
    fn who_waits_to_serve_is_next_after_one_slice() {
        let gate = Gate::new(0.5);
        let slowest = std::cell::Cell::new(Duration::ZERO);
        train_beside(&gate, || {
            // Each request comes long after the one before: serving is not busy then, and is owed the device at once.
            for _ in 0..20 {
                sleep(Duration::from_millis(12));
                let asked = Instant::now();
                drop(gate.serve());
                slowest.set(slowest.get().max(asked.elapsed()));
            }
        });
        assert!(slowest.get() < Duration::from_millis(60), "serving waited {:?} for slices of 2 ms", slowest.get());
    }

    #[test]
    fn training_keeps_its_share_and_no_more_while_serving_is_busy() {
        // Sleeps are as long as they should be only on a quiet machine: one fair run of three is asked for.
        let shares: Vec<f64> = (0..3)
            .map(|_| {
                let gate = Gate::new(0.3);
                let mut served = 0.0;
                let trained = train_beside(&gate, || {
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_millis(800) {
                        let guard = gate.serve();
                        sleep(Duration::from_millis(3));
                        served += guard.since.elapsed().as_secs_f64();
                    }
                });
                trained / (trained + served)
            })
            .collect();
        assert!(shares.iter().any(|share| (0.15..0.5).contains(share)), "training had {shares:?} of the device");
    }
}
