//! Who has the device: decode steps first, training between residual blocks, with a bounded share for each.
//!
//! On a GPU, or on one core, they take turns, and training has a share of the time. On several cores each side has some of them while
//! both want to run, and all of them while it is alone; what cores do not make up of training's share, serving makes up by waiting
//! now and then while training has all of them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cores::Cores;

/// Serving counts as busy until this long after its last step: between two steps it only samples and schedules.
const GRACE: Duration = Duration::from_millis(5);

/// Most device time training may save up, so that a long wait does not become a long stall.
const MOST_CREDIT_SECONDS: f64 = 0.25;

/// Most of it that training takes in one turn, so that what a long prompt earned it is not one long stall for those who decode.
const MOST_TURN_SECONDS: f64 = 0.03;

/// Least time for which serving waits so that training has all cores: it takes them with the next task of an operation, not at once.
const LEAST_LOAN_SECONDS: f64 = 0.003;

/// How long the device is kept for training that has just given it back with time still due: it comes again at once.
const BETWEEN_SLICES: Duration = Duration::from_millis(1);

/// A lock with priorities over one device.
pub struct Gate {
    /// Seconds of the whole device that training earns for each second serving uses.
    rate: f64,
    /// Where both sides can run at once.
    cores: Option<Cores>,
    state: Mutex<State>,
    changed: Condvar,
}

/// How serving holds the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// Nobody trained when the step began.
    Alone,
    Beside,
}

struct State {
    serving: Option<Hold>,
    training: bool,
    /// Since when training has the whole device.
    lent: Option<Instant>,
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
    side: Side,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Serving(Hold),
    Training,
}

impl Gate {
    /// Serving and training take turns. `training_share`: the share of device time training keeps while serving is busy, in (0, 1].
    pub fn new(training_share: f64) -> Self {
        Self::with(training_share, None)
    }

    /// Serving and training divide the cores while both run, training having as many of them as `training_share` is sure to hold and
    /// all of them at times; with one core they take turns.
    pub fn on_cores(training_share: f64) -> Self {
        Self::with(training_share, Cores::divided(training_share))
    }

    fn with(training_share: f64, cores: Option<Cores>) -> Self {
        let share = training_share.clamp(0.01, 0.99);
        let state = State {
            serving: None,
            training: false,
            lent: None,
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
        let mut gate = Gate { rate: 0.0, cores, state: Mutex::new(state), changed: Condvar::new() };
        // What is missing is made good in time in which serving, that has 1 - share of it by right, has nothing.
        gate.rate = (share - gate.always()).max(0.0) / (1.0 - share);
        gate
    }

    /// For an engine step: next in line, at most one slice of training away, and on several cores at most what training is owed.
    pub fn serve(&self) -> GateGuard<'_> {
        let mut state = self.lock();
        self.lend(&mut state, false);
        state.serving_waits += 1;
        let is_here = loop {
            let is_here = state.training_is_here();
            let is_owed = is_here && self.training_is_due(&state);
            let must_wait = if self.cores.is_some() { is_owed } else { state.training || is_owed };
            if state.serving.is_none() {
                self.lend(&mut state, must_wait);
                if !must_wait {
                    break is_here;
                }
            }
            state = self.changed.wait_timeout(state, BETWEEN_SLICES).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.serving_waits -= 1;
        let hold = if is_here { Hold::Beside } else { Hold::Alone };
        state.serving = Some(hold);
        state.turn_seconds = 0.0;
        GateGuard { gate: self, since: Instant::now(), side: Side::Serving(hold) }
    }

    /// For one slice of training: waits while serving is owed the device. To be asked by the thread that trains, within
    /// [`Gate::training`]: what that thread computes meanwhile runs on the cores that training has at the time.
    pub fn train(&self) -> GateGuard<'_> {
        let mut state = self.lock();
        state.training_waits += 1;
        let is_all_its_own = loop {
            let is_all_its_own = !state.serving_is_here() || self.training_is_due(&state);
            let must_wait = match (&self.cores, state.serving) {
                (Some(_), held) => held == Some(Hold::Alone),
                (None, held) => held.is_some() || !is_all_its_own,
            };
            if !state.training && !must_wait {
                break is_all_its_own;
            }
            state = self.changed.wait_timeout(state, GRACE).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.training_waits -= 1;
        state.training = true;
        let is_lent = is_all_its_own && state.serving.is_none();
        self.lend(&mut state, is_lent);
        GateGuard { gate: self, since: Instant::now(), side: Side::Training }
    }

    /// Runs a whole training, whose slices ask [`Gate::train`], on a thread that belongs to training's share of the cores.
    pub fn training<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.cores {
            Some(cores) => cores.train(work),
            None => work(),
        }
    }

    /// Slices have a length of their own: one is due when it overdraws the credit by no more than half of it, so that a client's
    /// longest waits are half a slice above the mean and not a whole one. All cores are training's as soon as that is worth it, and
    /// until what it is owed is used up.
    fn training_is_due(&self, state: &State) -> bool {
        let enough = match self.cores {
            Some(_) if state.lent.is_some() => 0.0,
            Some(_) => LEAST_LOAN_SECONDS,
            None => (state.last_slice_seconds / 2.0).min(MOST_CREDIT_SECONDS / 2.0),
        };
        state.credit_seconds > enough && state.turn_seconds < MOST_TURN_SECONDS
    }

    /// From now on training has the whole device, or the cores that are always its own; the time for which it had it all is held against
    /// it, unless nobody served.
    fn lend(&self, state: &mut State, is_lent: bool) {
        if let Some(since) = state.lent.take() {
            let lent = since.elapsed().as_secs_f64();
            state.used_seconds += lent * (1.0 - self.always());
            state.turn_seconds += lent;
            let lately = |at: Instant| at.elapsed().as_secs_f64() < lent + GRACE.as_secs_f64();
            if state.serving_waits > 0 || state.last_served.is_some_and(lately) {
                state.credit_seconds = (state.credit_seconds - lent).max(-MOST_CREDIT_SECONDS);
            }
        }
        state.lent = is_lent.then(Instant::now);
        if let Some(cores) = &self.cores {
            cores.lend(is_lent);
        }
    }

    /// Part of the device that is training's all the time while both run.
    fn always(&self) -> f64 {
        self.cores.as_ref().map_or(0.0, Cores::training_share)
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
    fn training_is_here(&self) -> bool {
        self.training || self.training_waits > 0 || self.last_trained.is_some_and(|at| at.elapsed() < BETWEEN_SLICES)
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
            Some(cores) => cores.serve(self.side == Side::Serving(Hold::Alone), || work(self)),
            None => rayon::scope(|_| work(self)),
        }
    }

    /// Part of the device that is held, what is lent not counted.
    fn part(&self) -> f64 {
        match self.side {
            Side::Serving(Hold::Alone) => 1.0,
            Side::Serving(Hold::Beside) => 1.0 - self.gate.always(),
            Side::Training => self.gate.always(),
        }
    }
}

impl Drop for GateGuard<'_> {
    fn drop(&mut self) {
        let used = self.since.elapsed().as_secs_f64();
        let mut state = self.gate.lock();
        state.used_seconds += used * self.part();
        match self.side {
            Side::Serving(hold) => {
                state.serving = None;
                state.last_served = Some(Instant::now());
                if hold == Hold::Beside {
                    state.credit_seconds = (state.credit_seconds + used * self.gate.rate).min(MOST_CREDIT_SECONDS);
                }
            }
            Side::Training => {
                self.gate.lend(&mut state, false);
                state.training = false;
                (state.last_slice_seconds, state.last_trained) = (used, Some(Instant::now()));
            }
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{scope, sleep};

    use super::*;
    use crate::cores;

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
        // Threads that an operation of this thread has.
        let width = || {
            let seen = Mutex::new(HashSet::new());
            cores::each(0..8 * all, |_| {
                seen.lock().expect("no panic").insert(std::thread::current().id());
                sleep(Duration::from_millis(2));
            });
            seen.into_inner().expect("no panic").len()
        };
        assert_eq!(gate.serve().run(|_| width()), all, "alone");
        gate.training(|| {
            sleep(2 * GRACE);
            let _slice = gate.train();
            assert_eq!(width(), all, "alone");
            scope(|threads| {
                let step = threads.spawn(|| {
                    let step = gate.serve();
                    (step.side == Side::Serving(Hold::Beside), step.run(|_| width()))
                });
                let (is_shared, served_on) = step.join().expect("no panic");
                assert!(is_shared, "served in the middle of a slice");
                assert_eq!(served_on + width(), all, "at once");
                assert_eq!(width() as f64, training * all as f64);
            });
        });
    }

    #[test]
    fn what_cores_do_not_make_up_of_a_share_training_has_as_all_of_them() {
        let (all, share) = (rayon::current_num_threads() as f64, 0.75);
        // Sleeps are as long as they should be only on a quiet machine: one fair run of three is asked for.
        let shares: Vec<f64> = (0..3)
            .filter_map(|_| Some(Gate::with(share, Some(Cores::divided(0.5)?))))
            .map(|gate| {
                let (stop, worked) = (AtomicBool::new(false), Mutex::new(0.0));
                let passed = scope(|threads| {
                    let training = threads.spawn(|| {
                        let begin = Instant::now();
                        gate.training(|| {
                            while !stop.load(Ordering::Relaxed) {
                                let _slice = gate.train();
                                cores::each(0..20, |_| {
                                    let since = Instant::now();
                                    sleep(Duration::from_millis(1));
                                    *worked.lock().expect("no panic") += since.elapsed().as_secs_f64();
                                });
                            }
                        });
                        begin.elapsed().as_secs_f64()
                    });
                    for _ in 0..60 {
                        gate.serve().run(|_| sleep(Duration::from_millis(5)));
                    }
                    stop.store(true, Ordering::Relaxed);
                    training.join().expect("no panic")
                });
                worked.into_inner().expect("no panic") / passed / all
            })
            .collect();
        let is_fair = |found: &f64| (found - share).abs() < 0.08;
        assert!(shares.is_empty() || shares.iter().any(is_fair), "training had {shares:?} of the cores, not {share}");
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
