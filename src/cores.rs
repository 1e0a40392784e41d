//! Which of the machine's cores a thread computes on: all of them, or a share while serving and training both want them.
//!
//! Decoding waits for memory and training for arithmetic, and neither keeps all cores busy by itself: side by side on some cores each
//! they get further than in turns on all.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{Scope, ThreadPool, ThreadPoolBuilder};

/// Threads for all cores, and for the share of each side.
pub struct Cores {
    all: ThreadPool,
    serving: ThreadPool,
    /// As many threads as there are cores; those past training's share sleep but for the time in which all are lent.
    training: ThreadPool,
    share: Arc<Share>,
}

/// Training's share of the cores.
struct Share {
    cores: usize,
    /// Whether it has all of them at the moment.
    all_are_lent: AtomicBool,
}

thread_local! {
    /// Set on a thread that trains.
    static SHARE: RefCell<Option<Arc<Share>>> = const { RefCell::new(None) };
    /// Whether this thread works on an item.
    static WORKS: Cell<bool> = const { Cell::new(false) };
}

/// Hands the items of an operation, one at a time, to the cores that this thread has; those may become more or fewer meanwhile.
///
/// Within an item of another operation all items are this thread's: while it waited for others to end theirs it would take up further
/// items of the outer operation, and one of them may wait for the very item that it is in the middle of.
pub fn each<T: Send>(items: impl ExactSizeIterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    each_with(items, || (), |(), item| work(item));
}

/// As [`each`], with something that each thread makes for itself.
pub fn each_with<T: Send, S>(
    items: impl ExactSizeIterator<Item = T> + Send,
    own: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) + Sync,
) {
    if WORKS.get() {
        let mut own = own();
        return items.for_each(|item| work(&mut own, item));
    }
    let operation = Operation {
        items: Mutex::new(items),
        own,
        work,
        helpers: AtomicUsize::new(0),
        threads: rayon::current_num_threads(),
        share: SHARE.with_borrow(Clone::clone),
    };
    rayon::scope(|scope| operation.begin(scope));
}

/// An operation in progress.
struct Operation<I, O, W> {
    items: Mutex<I>,
    own: O,
    work: W,
    /// Threads that take part beside the one that began.
    helpers: AtomicUsize,
    threads: usize,
    share: Option<Arc<Share>>,
}

impl<T: Send, S, I, O, W> Operation<I, O, W>
where
    I: ExactSizeIterator<Item = T> + Send,
    O: Fn() -> S + Sync,
    W: Fn(&mut S, T) + Sync,
{
    fn begin<'a>(&'a self, scope: &Scope<'a>) {
        let mut own = None;
        while let Some((item, left)) = self.next() {
            let wanted = self.wanted().min(left);
            while self.helpers.load(Ordering::Relaxed) < wanted {
                self.helpers.fetch_add(1, Ordering::Relaxed);
                scope.spawn(|_| self.help());
            }
            self.work_on(&mut own, item);
        }
    }

    /// Takes part until nothing is left, or until there are more helpers than wanted.
    fn help(&self) {
        let mut own = None;
        let one_less = |helpers: usize| (helpers > self.wanted()).then(|| helpers - 1);
        while self.helpers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_err()
            && let Some((item, _)) = self.next()
        {
            self.work_on(&mut own, item);
        }
    }

    fn work_on(&self, own: &mut Option<S>, item: T) {
        let _works = Works(WORKS.replace(true));
        (self.work)(own.get_or_insert_with(&self.own), item);
    }

    /// An item, and how many are left.
    fn next(&self) -> Option<(T, usize)> {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        items.next().map(|item| (item, items.len()))
    }

    fn wanted(&self) -> usize {
        let few = self.share.as_ref().filter(|share| !share.all_are_lent.load(Ordering::Relaxed));
        few.map_or(self.threads, |share| share.cores) - 1
    }
}

/// What [`WORKS`] was before an item; dropped, also by a panic, it is that again.
struct Works(bool);

impl Drop for Works {
    fn drop(&mut self) {
        WORKS.set(self.0);
    }
}

impl Cores {
    /// Divides the threads of the global pool, no more than `training_share` of them to training but at least one to each side; `None`
    /// where there is only one, or where no threads can be had.
    pub fn divided(training_share: f64) -> Option<Cores> {
        let all = rayon::current_num_threads();
        if all < 2 {
            return None;
        }
        let training = ((all as f64 * training_share) as usize).clamp(1, all - 1);
        let pool = |name: &'static str, threads: usize| {
            let builder = ThreadPoolBuilder::new().num_threads(threads);
            let built = builder.thread_name(move |index| format!("{name}-{index}")).build();
            built.inspect_err(|error| tracing::warn!(%error, "serving and training take turns")).ok()
        };
        Some(Cores {
            all: pool("cores", all)?,
            serving: pool("serve", all - training)?,
            training: pool("train", all)?,
            share: Arc::new(Share { cores: training, all_are_lent: AtomicBool::new(false) }),
        })
    }

    /// Part of the machine that training's share is.
    pub fn training_share(&self) -> f64 {
        self.share.cores as f64 / self.all.current_num_threads() as f64
    }

    /// Runs a step of serving on all cores, or on serving's share.
    pub fn serve<T: Send>(&self, whole: bool, work: impl FnOnce() -> T + Send) -> T {
        let pool = if whole { &self.all } else { &self.serving };
        pool.install(work)
    }

    /// Runs training, whose operations are on its share, or on all cores while they are lent to it.
    pub fn train<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.training.install(|| {
            SHARE.set(Some(self.share.clone()));
            let found = work();
            SHARE.set(None);
            found
        })
    }

    /// Whether training has all cores from now on, operations in progress too.
    pub fn lend(&self, all: bool) {
        self.share.all_are_lent.store(all, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::thread::{self, sleep};
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_item_is_worked_on_once_by_threads_with_something_of_their_own() {
        let mut numbers = vec![0; 1000];
        let made = AtomicUsize::new(0);
        each_with(
            numbers.iter_mut().enumerate(),
            || made.fetch_add(1, Ordering::Relaxed),
            |_, (index, number)| *number += index,
        );
        assert!(numbers.into_iter().eq(0..1000));
        assert!((1..=rayon::current_num_threads()).contains(&made.into_inner()));
    }

    #[test]
    fn an_operation_within_an_item_is_its_threads_own() {
        let Some(cores) = Cores::divided(0.5) else { return };
        let (inner, threads) = (AtomicUsize::new(0), Mutex::new(HashSet::new()));
        cores.serve(true, || {
            each(0..64 * rayon::current_num_threads(), |_| {
                let here = thread::current().id();
                each(0..8, |_| {
                    assert_eq!(thread::current().id(), here);
                    inner.fetch_add(1, Ordering::Relaxed);
                });
                threads.lock().expect("no panic").insert(here);
                sleep(Duration::from_millis(1));
            });
        });
        let all = rayon::current_num_threads();
        assert_eq!((inner.into_inner(), threads.into_inner().expect("no panic").len()), (64 * all * 8, all));
    }

    #[test]
    fn an_operation_in_progress_gets_cores_that_are_lent_and_gives_them_back() {
        let Some(cores) = Cores::divided(0.5) else { return };
        let (narrow, wide) = (cores.share.cores, rayon::current_num_threads());
        let (lent_at, back_at) = (30 * wide, 60 * wide);
        let seen = Mutex::new(Vec::new());
        cores.train(|| {
            each(0..90 * wide, |item| {
                if item == lent_at || item == back_at {
                    cores.lend(item == lent_at);
                }
                seen.lock().expect("no panic").push(thread::current().id());
                sleep(Duration::from_millis(1));
            });
        });
        let seen = seen.into_inner().expect("no panic");
        let threads = |items: &[thread::ThreadId]| items.iter().collect::<HashSet<_>>().len();
        assert_eq!(seen.len(), 90 * wide);
        // Who was at work when the last ones changed ends what he does.
        let of = [&seen[..lent_at], &seen[lent_at..back_at], &seen[back_at + wide..]].map(threads);
        assert_eq!(of, [narrow, wide, narrow]);
    }
}
