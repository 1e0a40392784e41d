//! The worker: one thread that claims the oldest queued job and runs its body; cancel and pause reach the body through
//! [`Context::check`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Job, Status, Store};
use crate::error::{Code, Error, Result};

/// What a job does, step by step; it must be resumable: rows already stored are not done again.
pub type Body = Arc<dyn Fn(&Context) -> Result<()> + Send + Sync>;

/// How long [`Jobs::shutdown`] waits for the body to notice.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between attempts to record the end of a job while the store cannot be written.
const RETRY: Duration = Duration::from_secs(1);

/// What the body is given.
#[derive(Clone)]
pub struct Context {
    /// The job as it was when claimed.
    pub job: Job,
    /// The store.
    pub store: Store,
    control: Arc<Control>,
}

impl Context {
    /// `Err` (kind `Cancelled`) once the user asked to cancel or pause, or the server stops; cheap, call it often.
    pub fn check(&self) -> Result<()> {
        if self.control.interrupted.load(Ordering::Acquire) { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// Moves the job to its next stage; nothing if it is there already, or runs again because the server stopped while its adapter went
    /// live.
    pub fn stage(&self, status: Status) -> Result<()> {
        let _turn = self.control.lock();
        self.check()?;
        let now = self.store.get(&self.job.id)?.status;
        if now != status && now != Status::Publishing {
            self.store.set_status(&self.job.id, status, None)?;
        }
        Ok(())
    }

    /// Records progress of a stage, `{"done", "total"}`, as progress and as an event.
    pub fn progress(&self, stage: Status, done: usize, total: usize) -> Result<()> {
        let name = stage.name();
        let patch = json!({ name: { "done": done, "total": total } });
        let data = json!({"stage": name, "done": done, "total": total});
        self.store.report_progress(&self.job.id, &patch, &format!("{name} {done}/{total}"), &data)
    }

    /// Appends an event.
    pub fn event(&self, level: &str, kind: &str, message: &str, data: &Value) -> Result<()> {
        self.store.event(&self.job.id, level, kind, message, data)
    }
}

/// What the handle and the worker share.
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// The running body must stop. Outside the mutex so that [`Context::check`] costs one load.
    interrupted: AtomicBool,
}

#[derive(Default)]
struct State {
    running: Option<String>,
    stopping: bool,
    ended: bool,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle: submit, look, cancel, pause, resume.
#[derive(Clone)]
pub struct Jobs {
    store: Store,
    control: Arc<Control>,
}

impl Jobs {
    /// Starts the worker thread. Jobs that were in progress when the process died are queued again first.
    pub fn start(store: Store, body: Body) -> Result<Self> {
        store.requeue_interrupted()?;
        let control = Arc::new(Control {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            interrupted: AtomicBool::new(false),
        });
        let jobs = Jobs { store, control };
        let worker = jobs.clone();
        std::thread::Builder::new()
            .name("jobs".into())
            .spawn(move || worker.work(&body))
            .map_err(|error| Error::internal(format!("cannot start the job thread: {error}")))?;
        Ok(jobs)
    }

    /// The store, for reading.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Stores and queues a job.
    pub fn submit(&self, request: &Value) -> Result<Job> {
        let job = self.store.create(request)?;
        self.wake();
        Ok(job)
    }

    /// Cancels; 409 if it has ended. A paused job can be cancelled.
    pub fn cancel(&self, id: &str) -> Result<Job> {
        self.interrupt(id, Status::Cancelled)
    }

    /// Pauses; 409 if it is not in progress or queued.
    pub fn pause(&self, id: &str) -> Result<Job> {
        self.interrupt(id, Status::Paused)
    }

    /// Queues a paused or failed job again; 409 otherwise.
    pub fn resume(&self, id: &str) -> Result<Job> {
        let job = self.store.set_status(id, Status::Queued, None)?;
        self.wake();
        Ok(job)
    }

    /// Wakes a watcher at every change of any job, for SSE.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<u64> {
        self.store.watch()
    }

    /// Stops after the current row or layer, leaving the job to be resumed at the next start. Blocks until the worker has
    /// stopped, half a minute at most.
    pub fn shutdown(&self) {
        let mut state = self.control.lock();
        state.stopping = true;
        self.control.interrupted.store(true, Ordering::Release);
        self.control.changed.notify_all();
        while !state.ended {
            let (next, wait) =
                self.control.changed.wait_timeout(state, SHUTDOWN_PATIENCE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if wait.timed_out() {
                tracing::warn!("the running job did not stop in time; it resumes from its last stored row");
                return;
            }
        }
    }

    // The state is stored at once, so that it holds even if the process dies before the body notices; the body is stopped
    // under the same lock that guards its own transitions.
    fn interrupt(&self, id: &str, next: Status) -> Result<Job> {
        let state = self.control.lock();
        let job = self.store.set_status(id, next, None)?;
        if state.running.as_deref() == Some(id) {
            self.control.interrupted.store(true, Ordering::Release);
        }
        Ok(job)
    }

    fn wake(&self) {
        let _state = self.control.lock();
        self.control.changed.notify_all();
    }

    fn work(&self, body: &Body) {
        while let Some(job) = self.next() {
            let id = job.id.clone();
            let context = Context { job, store: self.store.clone(), control: self.control.clone() };
            tracing::info!(job = id, "job started");
            let outcome = catch_unwind(AssertUnwindSafe(|| body(&context)))
                .unwrap_or_else(|panic| Err(Error::internal(format!("the job panicked: {}", panic_text(&*panic)))));
            self.finish(&id, outcome);
        }
        let mut state = self.control.lock();
        state.ended = true;
        self.control.changed.notify_all();
    }

    /// Waits for a queued job; `None` once the server stops.
    fn next(&self) -> Option<Job> {
        let mut state = self.control.lock();
        loop {
            if state.stopping {
                return None;
            }
            match self.store.claim() {
                Ok(Some(job)) => {
                    state.running = Some(job.id.clone());
                    self.control.interrupted.store(false, Ordering::Release);
                    return Some(job);
                }
                Ok(None) => state = self.control.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Err(error) => {
                    tracing::error!(%error, "cannot claim a job");
                    state = self.pause_for(state, RETRY);
                }
            }
        }
    }

    fn pause_for<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.control.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Records how the job ended. On a full disk it tries again until it can, or until the server stops: the next start
    /// then queues the job again.
    fn finish(&self, id: &str, outcome: Result<()>) {
        let mut state = self.control.lock();
        loop {
            match self.record(id, &outcome, &state) {
                Ok(()) => break,
                Err(error) if state.stopping => {
                    tracing::error!(job = id, %error, "cannot record how the job ended");
                    break;
                }
                Err(error) => {
                    tracing::error!(job = id, %error, "cannot record how the job ended; trying again");
                    state = self.pause_for(state, RETRY);
                }
            }
        }
        state.running = None;
    }

    fn record(&self, id: &str, outcome: &Result<()>, state: &State) -> Result<()> {
        let status = self.store.get(id)?.status;
        let interrupted = self.control.interrupted.load(Ordering::Acquire);
        match outcome {
            // Cancelled, paused, or already resumed: what the user asked for stands.
            _ if status.is_final() || (interrupted && !state.stopping) => Ok(()),
            Ok(()) => self.store.set_status(id, Status::Succeeded, None).map(drop),
            Err(error) if error.code == Code::Cancelled && state.stopping => Ok(()),
            Err(error) => {
                // What is out of reach now may be back when the job is resumed.
                let waits = error.code == Code::Unreachable && status.allows(Status::Paused);
                let ended = if waits { Status::Paused } else { Status::Failed };
                tracing::error!(job = id, %error, "job {}", ended.name());
                let (_, kind, code) = error.code.row();
                let body = json!({"message": error.to_string(), "type": kind, "code": code, "param": error.param});
                self.store.set_status(id, ended, Some(body)).map(drop)
            }
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
