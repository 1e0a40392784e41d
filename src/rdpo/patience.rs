//! A stage that asks remote roles outlives their endpoints: it waits, goes on with the rows that are left, and pauses the job
//! where nobody answers for too long.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::run::Run;
use crate::error::{Code, Error, Result};
use crate::roles::Target;

/// How often a stop is looked for while the job waits.
const TICK: Duration = Duration::from_millis(100);
/// Time between two looks at the endpoints, and the shortest wait: what fails though its endpoint is up fails again.
const LEAST: Duration = Duration::from_secs(1);

impl Run<'_> {
    /// Does `work`, which leaves rows of `kind` and begins with those that are missing, again after each time no endpoint of a
    /// remote role among `asked` could be reached.
    pub(super) fn patiently<T>(&self, kind: &str, asked: &[Target], mut work: impl FnMut() -> Result<T>) -> Result<T> {
        let mut since: Option<Instant> = None;
        let mut had = 0;
        loop {
            let error = match work() {
                Err(error) if error.code == Code::Unreachable => error,
                other => return other,
            };
            let have = self.context.store.rows(&self.context.job.id, kind)?.len();
            if have > had {
                (had, since) = (have, None);
            }
            self.wait(&error, asked, *since.get_or_insert_with(Instant::now))?;
        }
    }

    /// Until the endpoints answer again; the error itself once patience has run out, which pauses the job.
    fn wait(&self, error: &Error, asked: &[Target], since: Instant) -> Result<()> {
        let remotes = || asked.iter().filter_map(Target::remote);
        let patience = remotes().map(|remote| remote.patience()).max().unwrap_or_default();
        let message = format!("waiting, for {} s at most: {}", patience.as_secs(), error.message);
        self.show_waiting(json!({"reason": error.message}))?;
        self.context.event("warn", "message", &message, &json!({"waiting": true}))?;
        let mut asked_at = Instant::now();
        let outcome = loop {
            if let Err(stopped) = self.context.check() {
                break Err(stopped);
            }
            if asked_at.elapsed() >= LEAST {
                let reachable = remotes().map(|remote| remote.is_reachable());
                if !self.runtime.block_on(futures_util::future::join_all(reachable)).contains(&false) {
                    break self.context.event("info", "message", "going on", &json!({"waiting": false}));
                }
                asked_at = Instant::now();
            }
            if since.elapsed() >= patience {
                let message = format!("no row was finished in {} s: {}", patience.as_secs(), error.message);
                break Err(Error { message, ..error.clone() });
            }
            std::thread::sleep(TICK);
        };
        self.show_waiting(Value::Null)?;
        outcome
    }

    fn show_waiting(&self, why: Value) -> Result<()> {
        self.context.store.set_progress(&self.context.job.id, &json!({ "waiting": why }))
    }
}
