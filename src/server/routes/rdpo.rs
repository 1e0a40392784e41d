//! Jobs: start, look, follow, steer; and two of their parts alone, synthesis and the behaviours.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::http::header::ACCEPT;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{List, PageOf, Routes, TokensUsed, reads};
use crate::error::{Code, Error, Result};
use crate::jobs::{EventRow, Job, Status};
use crate::rdpo::{JobRequest, Pair, Sample, find_behavior, known_behaviors, synthesize as run_synthesis};
use crate::server::AppState;
use crate::server::limits::within;
use crate::server::reply::{Reply, blocking, error_body, event, parse, sse};

/// Events read at a time while a stream is written.
const BATCH: usize = 500;
/// A comment is sent after this long without an event, so that nobody in between closes the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Most conversations of one synthesis request; a job has no such limit.
const MOST_CONVERSATIONS: usize = 256;

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.get("/v1/rdpo/behaviors", behaviors);
    routes.post("/v1/rdpo/synthesize", synthesize);
    routes.on("/v1/rdpo/train", vec![("get", reads().to(list)), ("post", web::post().to(create))]);
    routes.get("/v1/rdpo/train/{id}", get);
    routes.get("/v1/rdpo/train/{id}/events", events);
    routes.get("/v1/rdpo/train/{id}/pairs", pairs);
    routes.get("/v1/rdpo/train/{id}/report", report);
    routes.post("/v1/rdpo/train/{id}/cancel", cancel);
    routes.post("/v1/rdpo/train/{id}/pause", pause);
    routes.post("/v1/rdpo/train/{id}/resume", resume);
}

/// The fields of a query.
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// Reads them; one that is not `known` is an error naming it.
    pub(super) fn read(request: &HttpRequest, known: &[&str]) -> Result<Self> {
        let fields = web::Query::<BTreeMap<String, String>>::from_query(request.query_string())
            .map_err(|error| Error::new(Code::InvalidValue, format!("the query cannot be read: {error}")))?
            .into_inner();
        match fields.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(Query(fields)),
            Some(name) => {
                let message = format!("`{name}` is not a field of this query; it has: {}", known.join(", "));
                Err(Error::new(Code::UnknownField, message).at(name.as_str()))
            }
        }
    }

    /// One of them.
    pub(super) fn get<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let read =
            |text: &String| text.parse().map_err(|_| Error::invalid(name, format!("`{text}` is no value of `{name}`")));
        self.0.get(name).map(read).transpose()
    }
}

/// How many entries a list gets.
pub(super) fn limit(given: Option<usize>, usual: usize, most: usize) -> Result<usize> {
    let limit = given.unwrap_or(usual);
    let message = || Error::invalid("limit", format!("must be in 1..={most}, not {limit}"));
    if (1..=most).contains(&limit) { Ok(limit) } else { Err(message()) }
}

/// A job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct JobObject {
    /// `rdpo-…`.
    id: String,
    /// `rdpo.job`.
    object: &'static str,
    /// Where it is.
    status: Status,
    /// The request with its defaults filled in; a list leaves out `prompts`, `pairs` and `eval_prompts`.
    #[schema(value_type = Object)]
    request: Value,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds the worker first took it.
    #[schema(required)]
    started_at: Option<i64>,
    /// Unix seconds of its end.
    #[schema(required)]
    finished_at: Option<i64>,
    /// Why it failed, or paused by itself.
    #[schema(value_type = Option<Object>, required)]
    error: Option<Value>,
    /// Counters by stage, e.g. `{"synthesizing": {"done": 3, "total": 16}}`; `waiting` has a `reason` while a remote role is out of reach.
    #[schema(value_type = Object)]
    progress: Value,
    /// What it left: adapter, report, counts of pairs; a list leaves out the report's samples.
    #[schema(value_type = Object)]
    result: Value,
    /// Version it published, if it did.
    #[schema(required)]
    adapter_version: Option<u64>,
}

impl From<Job> for JobObject {
    fn from(job: Job) -> Self {
        JobObject {
            id: job.id,
            object: "rdpo.job",
            status: job.status,
            request: job.request,
            created_at: job.created_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
            error: job.error,
            progress: job.progress,
            adapter_version: job.result["adapter"]["version"].as_u64(),
            result: job.result,
        }
    }
}

/// Jobs, newest first.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct JobList {
    /// `list`.
    object: &'static str,
    /// The jobs.
    data: Vec<JobObject>,
    /// Id of the first one.
    #[schema(required)]
    first_id: Option<String>,
    /// Id of the last one, for `after`.
    #[schema(required)]
    last_id: Option<String>,
    /// Whether older ones follow.
    has_more: bool,
}

/// A pair that was kept, with its number.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct NumberedPair {
    /// Number among the job's pairs, for `after`.
    index: usize,
    /// Which prompt of the request.
    prompt_index: usize,
    /// The turns the student learns under.
    #[schema(value_type = Vec<Object>)]
    prompt: Value,
    /// The better answer.
    chosen: String,
    /// The worse answer.
    rejected: String,
    /// Score of the better one.
    score_chosen: f64,
    /// Score of the worse one.
    score_rejected: f64,
}

/// Self-critique conversations.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Samples {
    /// `list`.
    object: &'static str,
    /// By prompt, then by sample.
    data: Vec<Sample>,
    /// Tokens spent.
    usage: TokensUsed,
}

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request = JobRequest::parse(&parse(&body)?)?;
    let job = blocking(move || {
        request.check(&state.roles)?;
        state.jobs.submit(&serde_json::to_value(&request)?)
    })
    .await?;
    Ok(HttpResponse::Ok().json(JobObject::from(job)))
}

async fn list(state: web::Data<AppState>, request: HttpRequest) -> Reply {
    let query = Query::read(&request, &["after", "limit"])?;
    let limit = limit(query.get("limit")?, 20, 100)?;
    let after: Option<String> = query.get("after")?;
    let page = blocking(move || state.jobs.store().list(after.as_deref(), limit)).await?;
    let (first_id, last_id) = (page.data.first().map(|job| job.id.clone()), page.data.last().map(|job| job.id.clone()));
    let data = page.data.into_iter().map(JobObject::from).collect();
    Ok(HttpResponse::Ok().json(JobList { object: "list", data, first_id, last_id, has_more: page.has_more }))
}

async fn read(state: &web::Data<AppState>, id: String) -> Result<Job> {
    let state = state.clone();
    blocking(move || state.jobs.store().get(&id)).await
}

async fn get(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    Ok(HttpResponse::Ok().json(JobObject::from(read(&state, id.into_inner()).await?)))
}

async fn report(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = read(&state, id.into_inner()).await?;
    match job.result.get("report") {
        Some(report) => Ok(HttpResponse::Ok().json(report)),
        None => {
            let message = format!("job `{}` has no report: it is {}", job.id, job.status.name());
            Err(Error::not_found(message).into())
        }
    }
}

async fn cancel(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.cancel(&id)).await?;
    Ok(HttpResponse::Ok().json(JobObject::from(job)))
}

async fn pause(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.pause(&id)).await?;
    Ok(HttpResponse::Ok().json(JobObject::from(job)))
}

async fn resume(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.resume(&id)).await?;
    Ok(HttpResponse::Ok().json(JobObject::from(job)))
}

/// The pairs kept, in their order; `after` is the index of the last one seen.
async fn pairs(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let query = Query::read(&request, &["after", "limit"])?;
    let limit = limit(query.get("limit")?, 100, 1000)?;
    let after: Option<usize> = query.get("after")?;
    let rows = blocking(move || {
        state.jobs.store().status(&id)?;
        state.jobs.store().rows(&id, "pair")
    })
    .await?;
    let mut rest = rows
        .into_iter()
        .filter(|(index, _)| after.is_none_or(|after| *index > after))
        .take(limit + 1)
        .map(|(index, pair)| {
            let Pair { prompt_index, prompt, chosen, rejected, score_chosen, score_rejected } =
                serde_json::from_value(pair).map_err(|error| Error::internal(format!("pair {index}: {error}")))?;
            let prompt = serde_json::to_value(prompt)?;
            Ok(NumberedPair { index, prompt_index, prompt, chosen, rejected, score_chosen, score_rejected })
        })
        .collect::<Result<Vec<_>>>()?;
    let has_more = rest.len() > limit;
    rest.truncate(limit);
    Ok(HttpResponse::Ok().json(PageOf::new(rest, has_more)))
}

async fn events(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let (id, query) = (id.into_inner(), Query::read(&request, &["after", "limit", "stream"])?);
    let (after, limit) = (query.get::<i64>("after")?, limit(query.get("limit")?, 100, 1000)?);
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let accepts = header(ACCEPT.as_str()).is_some_and(|accept| accept.contains("text/event-stream"));
    if query.get("stream")?.unwrap_or(accepts) {
        // A browser that reconnects says in a header where it was.
        let seen = header("last-event-id").and_then(|last| last.parse().ok());
        let (store, asked) = (state.jobs.store().clone(), id.clone());
        blocking(move || store.status(&asked)).await?;
        return Ok(follow(state, id, seen.or(after).unwrap_or(0)));
    }
    let after = after.unwrap_or(0);
    let mut data = blocking(move || state.jobs.store().events(&id, after, limit + 1)).await?;
    let has_more = data.len() > limit;
    data.truncate(limit);
    Ok(HttpResponse::Ok().json(PageOf::new(data, has_more)))
}

/// Every event after `after`, then those to come, until the job has ended or the server stops.
fn follow(state: web::Data<AppState>, id: String, mut after: i64) -> HttpResponse {
    let mut changes = state.jobs.watch();
    sse(async_stream::stream! {
        // Every job's changes wake this one: what it has sent itself keeps the connection open.
        let mut sent = Instant::now();
        loop {
            changes.borrow_and_update();
            let (store, id) = (state.jobs.store().clone(), id.clone());
            // The status is read first: whatever was said before a final one is then among the events.
            let read = blocking(move || Ok((store.status(&id)?, store.events(&id, after, BATCH)?))).await;
            let (status, rows) = match read {
                Ok(read) => read,
                Err(error) => {
                    yield event(&error_body(&error));
                    break;
                }
            };
            for row in &rows {
                after = row.id;
                sent = Instant::now();
                yield numbered(row);
            }
            if rows.len() == BATCH {
                continue;
            }
            if status.is_final() {
                yield web::Bytes::from_static(b"data: [DONE]\n\n");
                break;
            }
            let change = tokio::select! {
                change = tokio::time::timeout_at(sent + KEEP_ALIVE, changes.changed()) => change,
                // The client comes back with the number of the last event it saw.
                () = state.drain.begun() => break,
            };
            match change {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => break,
                Err(_quiet) => {
                    sent = Instant::now();
                    yield web::Bytes::from_static(b": still here\n\n");
                }
            }
        }
    })
}

fn numbered(row: &EventRow) -> web::Bytes {
    let data = event(row);
    let mut bytes = format!("id: {}\n", row.id).into_bytes();
    bytes.extend_from_slice(&data);
    bytes.into()
}

/// `{behavior, prompts, synthesis, seed}`: the fields of a job that matter here, checked as a job's are.
fn synthesis_request(body: &Value) -> Result<JobRequest> {
    const FIELDS: [&str; 4] = ["behavior", "prompts", "synthesis", "seed"];
    let unknown = body.as_object().and_then(|fields| fields.keys().find(|key| !FIELDS.contains(&key.as_str())));
    if let Some(key) = unknown {
        let message = format!("`{key}` is not a field of this request; it has: {}", FIELDS.join(", "));
        return Err(Error::new(Code::UnknownField, message).at(key.as_str()));
    }
    if body.is_object() && body["prompts"].as_array().is_none_or(Vec::is_empty) {
        return Err(Error::invalid("prompts", "must be a list with at least one prompt"));
    }
    let request = JobRequest::parse(body)?;
    let conversations = request.prompts.len().saturating_mul(request.synthesis.samples_per_prompt);
    if conversations > MOST_CONVERSATIONS {
        let message =
            format!("asks for {conversations} conversations; more than {MOST_CONVERSATIONS} are a job's work");
        return Err(Error::invalid("prompts", message));
    }
    Ok(request)
}

async fn synthesize(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request = synthesis_request(&parse(&body)?)?;
    let behavior = find_behavior(&state.roles, &request.behavior)?;
    let prompts: Vec<_> = request.prompts.iter().cloned().enumerate().collect();
    let found: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let mut keep = {
        let found = found.clone();
        move |sample: Sample| {
            found.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            Ok(())
        }
    };
    let work = run_synthesis(&state.roles, &behavior, &prompts, &request.synthesis, request.seed, &mut keep);
    within(state.limits.request_timeout, work).await?;
    let mut samples = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
    samples.sort_by_key(|sample| (sample.prompt_index, sample.sample));
    let prompt: usize = samples.iter().map(|sample| sample.prompt_tokens).sum();
    let completion: usize = samples.iter().map(|sample| sample.completion_tokens).sum();
    Ok(HttpResponse::Ok().json(Samples { object: "list", data: samples, usage: TokensUsed::new(prompt, completion) }))
}

async fn behaviors(state: web::Data<AppState>) -> Reply {
    let known = blocking(move || known_behaviors(&state.roles)).await?;
    Ok(HttpResponse::Ok().json(List::new(known)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn synthesis_takes_its_own_fields_only() {
        let request = synthesis_request(&json!({"prompts": ["a"], "synthesis": {"max_tokens": 8}, "seed": 3})).unwrap();
        assert_eq!((request.prompts.len(), request.synthesis.max_tokens, request.seed), (1, 8, 3));
        let param = |body: Value| synthesis_request(&body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"prompts": ["a"], "loss": {}})), "loss");
        assert_eq!(param(json!({"prompts": []})), "prompts");
        assert_eq!(param(json!({"behavior": "safety"})), "prompts");
        assert_eq!(param(json!({"prompts": ["a"], "synthesis": {"rounds": 9}})), "synthesis.rounds");
        assert_eq!(
            param(json!({"prompts": ["a", "a", "a", "a", "a"], "synthesis": {"samples_per_prompt": 64}})),
            "prompts"
        );
    }

    #[test]
    fn a_job_on_the_wire() {
        let job = Job {
            id: "rdpo-1".into(),
            status: Status::Succeeded,
            request: json!({"prompts": ["a"], "seed": 1}),
            created_at: 1,
            started_at: Some(2),
            finished_at: Some(3),
            error: None,
            progress: json!({}),
            result: json!({"adapter": {"version": 4}, "report": {"win_rate": 0.5, "samples": [1]}}),
        };
        let full = serde_json::to_value(JobObject::from(job)).unwrap();
        assert_eq!((&full["object"], &full["status"]), (&json!("rdpo.job"), &json!("succeeded")));
        assert_eq!((&full["adapter_version"], &full["request"]["prompts"]), (&json!(4), &json!(["a"])));
    }

    #[test]
    fn limits_are_named() {
        assert_eq!(limit(None, 20, 100).unwrap(), 20);
        assert_eq!(limit(Some(0), 20, 100).unwrap_err().param.unwrap(), "limit");
        assert!(limit(Some(101), 20, 100).is_err());
    }
}
