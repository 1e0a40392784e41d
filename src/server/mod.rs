//! HTTP: parse a request, call a role or a job, render the answer. Sees no tensor.

mod answer;
mod constrain;
mod forward;
mod guard;
mod limits;
mod messages;
pub mod openapi;
mod reply;
mod routes;
mod sampling;
mod tools;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix_web::middleware::{Compress, from_fn};
use actix_web::{App, HttpServer, web};

use crate::error::{Error, Result};
use crate::jobs::{Body, Jobs, Store};
use crate::roles::{Roles, RolesOptions};
use crate::telemetry::{metrics, start_series};

/// What the HTTP side is told (the `[server]` section's limits).
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Keys that open `/v1`; none leaves it open.
    pub api_keys: Vec<String>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Longest that an answer may take; `None` is without end.
    pub request_timeout: Option<Duration>,
    /// How long answers in progress are waited for when the server is told to stop.
    pub drain: Duration,
    /// Whether a request may bring a template.
    pub trust_request_chat_template: bool,
}

/// What was answered may still be on its way out when the server stops.
const FLUSH: Duration = Duration::from_secs(2);

/// How long a request's head may take. The default of 5 s turns a stall of the machine into 408s for who has just connected.
const HEAD_PATIENCE: Duration = Duration::from_secs(60);

/// What handlers share.
pub struct AppState {
    /// Models and adapters.
    pub roles: Arc<Roles>,
    /// Jobs.
    pub jobs: Jobs,
    /// Limits.
    pub limits: ServerLimits,
    /// Answers that can be gone on from.
    responses: routes::StoredResponses,
    /// What is in flight, and whether more may come.
    drain: Arc<limits::Drain>,
}

impl AppState {
    /// Loads the roles and starts the job worker.
    pub fn load(roles: RolesOptions, store: &std::path::Path, limits: ServerLimits) -> Result<Arc<Self>> {
        start_series();
        let store = Store::open(store)?;
        let roles = Roles::load(roles)?;
        crate::rdpo::sweep(&store, &roles);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("jobs")
            .enable_all()
            .build()
            .map_err(|error| Error::internal(format!("cannot start the job runtime: {error}")))?;
        let body: Body = {
            let roles = roles.clone();
            Arc::new(move |context| crate::rdpo::run(context, &roles, runtime.handle()))
        };
        let jobs = Jobs::start(store, body)?;
        let (responses, drain) = Default::default();
        Ok(Arc::new(AppState { roles, jobs, limits, responses, drain }))
    }
}

/// Binds an address, or says which setting to change.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    TcpListener::bind((host, port)).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "another program has the port: stop it, or choose another with `server.port`"
            }
            _ => "check `server.host` and `server.port`",
        };
        Error::invalid("server.port", format!("cannot listen on {host}:{port}: {error} ({advice})"))
    })
}

/// Serves until `shutdown` resolves, then refuses what comes (503, and `/ready` says so too), lets answers in progress end and
/// leaves running jobs to be resumed.
pub async fn run(state: Arc<AppState>, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<()> {
    metrics().start_time_seconds.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64()));
    let backend = if candle_core::utils::cuda_is_available() { "cuda" } else { "cpu" };
    // Whoever builds for others says the commit: asking git here would build everything again after each one.
    let version = [env!("CARGO_PKG_VERSION"), backend, option_env!("RDPO_GIT_SHA").unwrap_or("unknown")];
    metrics().build_info.with_label_values(&version).set(1);
    let data = web::Data::from(state.clone());
    let server = HttpServer::new(move || {
        App::new()
            .app_data(data.clone())
            .app_data(web::PayloadConfig::new(data.limits.max_body_bytes))
            .wrap(Compress::default())
            .wrap(from_fn(guard::guard))
            .configure(routes::configure)
            .default_service(web::to(reply::no_route))
    })
    .workers(2)
    .shutdown_timeout(FLUSH.as_secs())
    .client_request_timeout(HEAD_PATIENCE)
    // A client that closes its side is gone: its request is dropped, which takes its work out of the batch.
    .h1_allow_half_closed(false)
    .disable_signals()
    .listen(listener)?
    .run();
    let handle = server.handle();
    let running = actix_web::rt::spawn(server);
    shutdown.await;
    tracing::info!("stopping: answers in progress have {} s", state.limits.drain.as_secs());
    state.drain.begin();
    let jobs = state.jobs.clone();
    let stopped = actix_web::rt::task::spawn_blocking(move || jobs.shutdown());
    let cut = state.drain.end(state.limits.drain).await;
    if cut > 0 {
        tracing::warn!(answers = cut, "not ended in time (`server.drain_seconds`): they are cut off");
    }
    let _ = stopped.await;
    let _ = tokio::time::timeout(2 * FLUSH, handle.stop(true)).await;
    running.await.map_err(|error| Error::internal(error.to_string()))??;
    Ok(())
}
