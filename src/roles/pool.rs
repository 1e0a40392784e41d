//! The endpoints of a remote role: which one is asked next, which rests, which is out and when it comes back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, RequestBuilder, Url};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::RoleOptions;
use crate::error::{Code, Error, Result};
use crate::telemetry::metrics;

/// Failures in a row that put an endpoint out.
const MOST_FAILURES: u32 = 3;
/// How long an endpoint that was put out is left alone; doubles each time until it has answered a request again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest `retry-after` a request waits for.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// How long a health probe waits.
const PROBE: Duration = Duration::from_secs(5);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Endpoints that serve the same model.
pub(super) struct Pool {
    role: &'static str,
    client: Client,
    /// `Bearer …`, marked so that no log shows it.
    key: Option<HeaderValue>,
    urls: Vec<Url>,
    /// Requests at once to each.
    most: usize,
    states: Mutex<Vec<State>>,
    /// Wakes those who wait for a place.
    changed: Notify,
}

#[derive(Clone, Default)]
struct State {
    busy: usize,
    /// In a row.
    failures: u32,
    out: bool,
    /// Times it was put out since it last answered.
    outs: u32,
    /// Whether a task looks after it while it is out.
    watched: bool,
    /// It asked to be left alone until then.
    rests_until: Option<Instant>,
}

/// What a request finds.
enum Look {
    Free(usize),
    /// Nothing is free before this, or before a place is given back.
    Later(Option<Instant>),
    /// Nothing is to be had soon.
    Nobody(String),
}

/// One request's place at an endpoint; given back when dropped.
pub(super) struct Place {
    pool: Arc<Pool>,
    index: usize,
}

impl Pool {
    pub(super) fn new(role: &'static str, options: &RoleOptions, timeout: Duration) -> Result<Arc<Self>> {
        let field = |key: &str| format!("roles.{role}.{key}");
        let urls = options.url.iter().chain(&options.urls);
        let urls: Vec<Url> = urls.map(|url| base(url, &field("urls"))).collect::<Result<_>>()?;
        let most = options.max_concurrency.unwrap_or(16);
        if most == 0 {
            return Err(Error::invalid(field("max_concurrency"), "must be at least 1"));
        }
        let key = match &options.api_key_env {
            None => None,
            Some(name) => Some(bearer(name, &field("api_key_env"))?),
        };
        let client = Client::builder()
            .connect_timeout(CONNECT.min(timeout))
            // Between two reads: a long stream is no time-out.
            .read_timeout(timeout)
            // The key goes to the addresses of the settings and nowhere else.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| Error::internal(format!("cannot make an HTTP client: {error}")))?;
        let states = Mutex::new(vec![State::default(); urls.len()]);
        let pool = Pool { role, client, key, urls, most, states, changed: Notify::new() };
        (0..pool.urls.len()).for_each(|index| pool.show(index, true));
        Ok(Arc::new(pool))
    }

    /// Requests worth having in flight.
    pub(super) fn capacity(&self) -> usize {
        self.most.saturating_mul(self.urls.len())
    }

    /// Whether an endpoint can be asked now or soon; those that are out are probed at once.
    pub(super) async fn is_reachable(self: &Arc<Self>) -> bool {
        if !matches!(self.look(&mut self.lock(), None), Look::Nobody(_)) {
            return true;
        }
        let probes = (0..self.urls.len()).map(|index| async move {
            let well = self.lock()[index].out && self.probe(index).await;
            if well {
                self.take_back(index);
            }
            well
        });
        futures_util::future::join_all(probes).await.contains(&true)
    }

    /// A place at the endpoint with the fewest requests, at `failed`, where the last try was, only if no other has one; waits
    /// while any endpoint is up.
    pub(super) async fn place(self: &Arc<Self>, failed: Option<usize>) -> Result<Place> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let look = {
                let mut states = self.lock();
                let look = self.look(&mut states, failed);
                if let Look::Free(index) = look {
                    states[index].busy += 1;
                    return Ok(Place { pool: self.clone(), index });
                }
                look
            };
            match look {
                Look::Nobody(why) => {
                    return Err(Error::new(Code::Unreachable, format!("`{}` is remote: {why}", self.role)));
                }
                // Woken or due: look again.
                Look::Later(Some(until)) => drop(timeout_at(until, changed).await),
                _ => changed.await,
            }
        }
    }

    fn look(self: &Arc<Self>, states: &mut [State], failed: Option<usize>) -> Look {
        let now = Instant::now();
        let mut soonest: Option<Instant> = None;
        let (mut up, mut full) = (0, false);
        // (was tried last, requests there, which)
        let mut free: Option<(bool, usize, usize)> = None;
        for (index, state) in states.iter_mut().enumerate() {
            if state.out {
                self.watch(index, state);
                continue;
            }
            up += 1;
            match state.rests_until.filter(|until| *until > now) {
                Some(until) => soonest = Some(soonest.map_or(until, |other| other.min(until))),
                None if state.busy >= self.most => full = true,
                None => {
                    let this = (failed == Some(index), state.busy, index);
                    free = Some(free.map_or(this, |best| best.min(this)));
                }
            }
        }
        match (free, soonest) {
            (Some((.., index)), _) => Look::Free(index),
            _ if up == 0 => Look::Nobody(format!("none of its {} endpoints answers", states.len())),
            (None, Some(until)) if !full && until - now > LONGEST_REST => {
                Look::Nobody(format!("it asks to be asked again in {} s", (until - now).as_secs()))
            }
            (None, soonest) => Look::Later(soonest),
        }
    }

    /// Whether a request that just failed at one endpoint finds another at once.
    pub(super) fn has_another(self: &Arc<Self>, than: usize) -> bool {
        matches!(self.look(&mut self.lock(), Some(than)), Look::Free(index) if index != than)
    }

    fn put_out(self: &Arc<Self>, index: usize, state: &mut State) {
        state.out = true;
        state.outs += 1;
        self.show(index, false);
        tracing::warn!(role = self.role, endpoint = %self.urls[index], "the endpoint is out until it answers again");
        self.watch(index, state);
    }

    /// Lets a task ask the endpoint now and then whether it is there again.
    fn watch(self: &Arc<Self>, index: usize, state: &mut State) {
        if std::mem::replace(&mut state.watched, true) {
            return;
        }
        let watcher = Watcher { pool: Arc::downgrade(self), index };
        let mut pause = FIRST_PAUSE * 2u32.saturating_pow(state.outs.saturating_sub(1).min(16));
        let jitter = 0.75 + rand::random::<f64>() / 2.0;
        tokio::spawn(async move {
            loop {
                sleep(pause.min(LONGEST_PAUSE).mul_f64(jitter)).await;
                pause *= 2;
                let Some(pool) = watcher.pool.upgrade() else { return };
                if !pool.lock()[watcher.index].out {
                    return;
                }
                if pool.probe(watcher.index).await {
                    pool.take_back(watcher.index);
                    return;
                }
            }
        });
    }

    /// On probation: one more failure puts it out again, for longer.
    fn take_back(&self, index: usize) {
        let state = &mut self.lock()[index];
        (state.out, state.failures) = (false, MOST_FAILURES - 1);
        self.show(index, true);
        self.changed.notify_waiters();
        tracing::info!(role = self.role, endpoint = %self.urls[index], "the endpoint is back");
    }

    async fn probe(&self, index: usize) -> bool {
        let request = self.authorized(self.client.get(self.at(index, "models"))).timeout(PROBE);
        request.send().await.is_ok_and(|reply| !reply.status().is_server_error())
    }

    fn at(&self, index: usize, path: &str) -> Url {
        let mut url = self.urls[index].clone();
        url.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
        url
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.header(AUTHORIZATION, key.clone()),
            None => request,
        }
    }

    fn show(&self, index: usize, up: bool) {
        metrics().remote_endpoint_up.with_label_values(&[self.role, &index.to_string()]).set(up.into());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// A request to this endpoint, with the key.
    pub(super) fn post(&self, path: &str) -> RequestBuilder {
        self.pool.authorized(self.pool.client.post(self.pool.at(self.index, path)))
    }

    /// The endpoint answered.
    pub(super) fn worked(&self) {
        let state = &mut self.pool.lock()[self.index];
        (state.failures, state.outs) = (0, 0);
    }

    /// The endpoint asks to be left alone for so long.
    pub(super) fn rest(&self, time: Duration) {
        // A time nobody can wait for is as good as a day.
        let until = Instant::now() + time.min(Duration::from_secs(86_400));
        let state = &mut self.pool.lock()[self.index];
        state.rests_until = state.rests_until.max(Some(until));
    }

    /// The endpoint did not answer, or not as one that is well.
    pub(super) fn failed(&self, why: &str) {
        tracing::warn!(role = self.pool.role, endpoint = %self.pool.urls[self.index], why, "the endpoint failed");
        let states = &mut self.pool.lock();
        let state = &mut states[self.index];
        state.failures += 1;
        if state.failures >= MOST_FAILURES && !state.out {
            self.pool.put_out(self.index, state);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pool.lock()[self.index].busy -= 1;
        self.pool.changed.notify_waiters();
    }
}

/// Held by the task that looks after an endpoint; where the task is dropped with its runtime, the next request starts another.
struct Watcher {
    pool: Weak<Pool>,
    index: usize,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.lock()[self.index].watched = false;
        }
    }
}

/// One more in a gauge of the role, until dropped.
pub(super) struct Counted(prometheus::IntGauge);

impl Counted {
    pub(super) fn new(gauge: &prometheus::IntGaugeVec, role: &str) -> Self {
        let gauge = gauge.with_label_values(&[role]);
        gauge.inc();
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The header with the key in the environment variable `name`, marked so that no log shows it.
pub(super) fn bearer(name: &str, field: &str) -> Result<HeaderValue> {
    let wrong = |why: &str| Error::invalid(field, format!("the environment variable {name} {why}"));
    let key = std::env::var(name).map_err(|_| wrong("is not set"))?;
    let header = HeaderValue::from_str(&format!("Bearer {}", key.trim()));
    let mut header = header.map_err(|_| wrong("holds what cannot be sent in a header"))?;
    header.set_sensitive(true);
    Ok(header)
}

/// An endpoint's URL: http or https.
pub(super) fn address(text: &str, field: &str) -> Result<Url> {
    // The text may hold a password: it is not repeated.
    let wrong = |why: &str| Error::invalid(field, format!("an endpoint's address {why}"));
    let url = Url::parse(text).map_err(|error| wrong(&format!("cannot be read: {error}")))?;
    if matches!(url.scheme(), "http" | "https") { Ok(url) } else { Err(wrong("begins with http:// or https://")) }
}

/// A base URL, without what could be a secret, since addresses are shown.
fn base(text: &str, field: &str) -> Result<Url> {
    let url = address(text, field)?;
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        let why =
            "an endpoint's address has no user, password, query or fragment: name the key's variable in `api_key_env`";
        return Err(Error::invalid(field, why));
    }
    Ok(url)
}
