//! The job worker over a real store: order, restart, cancel, pause, resume, panics, shutdown.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdpo::error::{Error, Result};
use rdpo::jobs::{Body, Context, Jobs, Status, Store};
use serde_json::{Value, json};

/// A stand-in for the method: five rows of work, each durable when done, then training to the end. Rows wait while `hold`
/// is set, so that a test can stop it in the middle.
struct Work {
    done: Mutex<Vec<usize>>,
    hold_at: AtomicUsize,
}

impl Work {
    fn new(hold_at: usize) -> Arc<Self> {
        Arc::new(Work { done: Mutex::new(Vec::new()), hold_at: AtomicUsize::new(hold_at) })
    }

    fn body(self: &Arc<Self>) -> Body {
        let work = self.clone();
        Arc::new(move |context| work.run(context))
    }

    fn run(&self, context: &Context) -> Result<()> {
        match context.job.request["do"].as_str() {
            Some("panic") => panic!("row 3 is impossible"),
            Some("fail") => return Err(Error::unprocessable("weights.gguf", "is truncated")),
            _ => {}
        }
        let have = context.store.rows(&context.job.id, "sample")?.len();
        context.stage(Status::Synthesizing)?;
        for row in have..5 {
            while self.hold_at.load(Ordering::Acquire) == row {
                context.check()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            context.check()?;
            context.store.put_row(&context.job.id, "sample", row, &json!(row * row))?;
            context.progress(Status::Synthesizing, row + 1, 5)?;
            self.done.lock().unwrap().push(row);
        }
        context.stage(Status::Training)?;
        context.stage(Status::Publishing)?;
        while self.hold_at.load(Ordering::Acquire) == PUBLISHING {
            std::thread::sleep(Duration::from_millis(1));
        }
        context.store.set_result(&context.job.id, &json!({"adapter_version": 1}))
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn until_status(jobs: &Jobs, id: &str, status: Status) {
    until(status.name(), || jobs.store().get(id).unwrap().status == status);
}

fn said(jobs: &Jobs, id: &str) -> Vec<String> {
    jobs.store().events(id, 0, 1000).unwrap().into_iter().map(|event| event.message).collect()
}

fn start(work: &Arc<Work>) -> (tempfile::TempDir, Jobs) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("jobs.sqlite")).unwrap();
    let jobs = Jobs::start(store, work.body()).unwrap();
    (folder, jobs)
}

const NO_HOLD: usize = usize::MAX;
/// Held after the last row.
const PUBLISHING: usize = usize::MAX - 1;

#[test]
fn a_job_runs_to_its_end_and_says_each_step() {
    let (_folder, jobs) = start(&Work::new(NO_HOLD));
    let mut watch = jobs.watch();
    watch.mark_unchanged();
    let job = jobs.submit(&json!({})).unwrap();
    assert_eq!(job.status, Status::Queued);
    until_status(&jobs, &job.id, Status::Succeeded);
    assert!(watch.has_changed().unwrap());
    let job = jobs.store().get(&job.id).unwrap();
    assert_eq!(job.progress, json!({"synthesizing": {"done": 5, "total": 5}}));
    assert_eq!(job.result, json!({"adapter_version": 1}));
    assert!(job.started_at.is_some() && job.finished_at.is_some() && job.error.is_none());
    assert_eq!(
        said(&jobs, &job.id).join("\n"),
        "queued\nsynthesizing\nsynthesizing 1/5\nsynthesizing 2/5\nsynthesizing 3/5\nsynthesizing 4/5\n\
         synthesizing 5/5\ntraining\npublishing\nsucceeded"
    );
    jobs.shutdown();
}

#[test]
fn a_job_whose_adapter_goes_live_is_neither_cancelled_nor_paused() {
    let work = Work::new(PUBLISHING);
    let (_folder, jobs) = start(&work);
    let id = jobs.submit(&json!({})).unwrap().id;
    until_status(&jobs, &id, Status::Publishing);
    for error in [jobs.cancel(&id).unwrap_err(), jobs.pause(&id).unwrap_err()] {
        assert!(error.status() == 409 && error.message.contains("roll the adapter back"), "{error}");
    }
    work.hold_at.store(NO_HOLD, Ordering::Release);
    until_status(&jobs, &id, Status::Succeeded);
    assert_eq!(jobs.store().get(&id).unwrap().result, json!({"adapter_version": 1}));
    jobs.shutdown();
}

#[test]
fn a_job_that_was_going_live_when_the_server_died_still_cannot_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jobs.sqlite");
    let (waiting, going_live) = {
        let store = Store::open(&path).unwrap();
        let ids = [(); 2].map(|()| store.create(&json!({})).unwrap().id);
        store.set_status(&ids[1], Status::Publishing, None).unwrap();
        ids.into()
    };
    let work = Work::new(PUBLISHING);
    let jobs = Jobs::start(Store::open(&path).unwrap(), work.body()).unwrap();
    until("the rows are there", || work.done.lock().unwrap().len() == 5);
    for error in [jobs.cancel(&going_live).unwrap_err(), jobs.pause(&going_live).unwrap_err()] {
        assert!(error.status() == 409 && error.message.contains("roll the adapter back"), "{error}");
    }
    assert_eq!(jobs.store().get(&waiting).unwrap().status, Status::Queued);
    work.hold_at.store(NO_HOLD, Ordering::Release);
    until_status(&jobs, &going_live, Status::Succeeded);
    assert!(said(&jobs, &going_live).contains(&"taken up again: the server stopped while publishing".to_owned()));
    until_status(&jobs, &waiting, Status::Succeeded);
    jobs.shutdown();
}

#[test]
fn panics_and_errors_fail_the_job_and_not_the_worker() {
    let (_folder, jobs) = start(&Work::new(NO_HOLD));
    let panics = jobs.submit(&json!({"do": "panic"})).unwrap();
    let fails = jobs.submit(&json!({"do": "fail"})).unwrap();
    let fine = jobs.submit(&json!({})).unwrap();
    until_status(&jobs, &fine.id, Status::Succeeded);
    let error = |id: &str| -> Value { jobs.store().get(id).unwrap().error.unwrap() };
    assert!(error(&panics.id)["message"].as_str().unwrap().contains("row 3 is impossible"));
    assert_eq!(error(&fails.id)["param"], "weights.gguf");
    assert_eq!(error(&fails.id)["code"], "unprocessable");
    jobs.resume(&fails.id).unwrap();
    until("it fails again", || said(&jobs, &fails.id).iter().filter(|text| text.starts_with("failed")).count() == 2);
    jobs.shutdown();
}

#[test]
fn pause_keeps_rows_and_resume_goes_on_from_them() {
    let work = Work::new(3);
    let (_folder, jobs) = start(&work);
    let id = jobs.submit(&json!({})).unwrap().id;
    until("three rows are done", || work.done.lock().unwrap().len() == 3);
    assert_eq!(jobs.pause(&id).unwrap().status, Status::Paused);
    assert_eq!(jobs.pause(&id).unwrap_err().status(), 409);
    let other = jobs.submit(&json!({})).unwrap().id;
    work.hold_at.store(NO_HOLD, Ordering::Release);
    until_status(&jobs, &other, Status::Succeeded);
    assert_eq!(jobs.store().get(&id).unwrap().status, Status::Paused, "a paused job stays so");
    jobs.resume(&id).unwrap();
    until_status(&jobs, &id, Status::Succeeded);
    assert_eq!(*work.done.lock().unwrap(), [0, 1, 2, 0, 1, 2, 3, 4, 3, 4], "no row of the first job is done twice");
    assert_eq!(jobs.resume(&id).unwrap_err().status(), 409);
    jobs.shutdown();
}

#[test]
fn a_paused_job_resumed_before_its_body_stopped_runs_again() {
    let work = Work::new(2);
    let (_folder, jobs) = start(&work);
    let id = jobs.submit(&json!({})).unwrap().id;
    until("two rows are done", || work.done.lock().unwrap().len() == 2);
    jobs.pause(&id).unwrap();
    jobs.resume(&id).unwrap();
    work.hold_at.store(NO_HOLD, Ordering::Release);
    until_status(&jobs, &id, Status::Succeeded);
    assert_eq!(*work.done.lock().unwrap(), [0, 1, 2, 3, 4]);
    jobs.shutdown();
}

#[test]
fn cancel_ends_running_queued_and_paused_jobs() {
    let work = Work::new(1);
    let (_folder, jobs) = start(&work);
    let running = jobs.submit(&json!({})).unwrap().id;
    let queued = jobs.submit(&json!({})).unwrap().id;
    until("a row is done", || work.done.lock().unwrap().len() == 1);
    assert_eq!(jobs.cancel(&queued).unwrap().status, Status::Cancelled);
    assert_eq!(jobs.cancel(&running).unwrap().status, Status::Cancelled);
    assert_eq!(jobs.cancel(&running).unwrap_err().status(), 409);
    assert_eq!(jobs.resume(&running).unwrap_err().status(), 409);
    let paused = jobs.submit(&json!({})).unwrap().id;
    jobs.pause(&paused).unwrap();
    assert_eq!(jobs.cancel(&paused).unwrap().status, Status::Cancelled);
    assert_eq!(jobs.cancel("rdpo-none").unwrap_err().status(), 404);
    jobs.shutdown();
    assert_eq!(jobs.store().get(&running).unwrap().status, Status::Cancelled, "the body's end does not overwrite it");
}

#[test]
fn a_stopped_server_resumes_its_job_at_the_next_start() {
    let work = Work::new(4);
    let (folder, jobs) = start(&work);
    let id = jobs.submit(&json!({})).unwrap().id;
    until("four rows are done", || work.done.lock().unwrap().len() == 4);
    jobs.shutdown();
    assert_eq!(jobs.store().get(&id).unwrap().status, Status::Synthesizing);
    drop(jobs);
    work.hold_at.store(NO_HOLD, Ordering::Release);
    let path = folder.path().join("jobs.sqlite");
    let mut store = None;
    // The worker thread drops its handle of the file a moment after it has said that it ended.
    until("the file is free", || {
        store = Store::open(&path).ok();
        store.is_some()
    });
    let jobs = Jobs::start(store.unwrap(), work.body()).unwrap();
    until_status(&jobs, &id, Status::Succeeded);
    assert_eq!(*work.done.lock().unwrap(), [0, 1, 2, 3, 4]);
    assert!(said(&jobs, &id).iter().any(|text| text == "queued again: the server stopped while synthesizing"));
    jobs.shutdown();
}
