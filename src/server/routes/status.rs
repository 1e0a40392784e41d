//! Health, readiness, version, metrics, the API's own description.

use actix_web::{HttpResponse, web};
use prometheus::{Encoder, TextEncoder};
use serde::Serialize;
use utoipa::ToSchema;

use super::Routes;
use crate::error::{Code, Error};
use crate::server::reply::Reply;
use crate::server::{AppState, openapi};
use crate::telemetry::metrics;

pub(super) fn configure(routes: &mut Routes<'_>) {
    // The port only answers once every role is loaded: until the server stops, health and readiness are the same.
    routes.get("/health", healthy);
    routes.get("/ping", healthy);
    routes.get("/ready", ready);
    routes.get("/version", version);
    routes.get("/metrics", exposition);
    routes.get("/openapi.yaml", description);
}

/// What runs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// Version of the server.
    version: &'static str,
}

async fn healthy(state: web::Data<AppState>) -> Reply {
    let dead = state.roles.engines().into_iter().find(|(_, engine)| !engine.is_alive());
    match dead {
        None => Ok(HttpResponse::Ok().finish()),
        Some((name, _)) => {
            let message = format!("the engine of `{name}` has stopped: restart the server, and see its log");
            Err(Error::new(Code::Overloaded, message).into())
        }
    }
}

async fn ready(state: web::Data<AppState>) -> Reply {
    state.drain.check()?;
    healthy(state).await
}

async fn version() -> HttpResponse {
    HttpResponse::Ok().json(Version { version: env!("CARGO_PKG_VERSION") })
}

async fn description() -> Reply {
    Ok(HttpResponse::Ok().content_type("application/yaml").body(openapi::yaml()?))
}

async fn exposition(state: web::Data<AppState>) -> Reply {
    // Leases are counted when they are looked at.
    state.roles.adapters().list();
    // All engines share one gate.
    if let Some((_, engine)) = state.roles.engines().first() {
        metrics().gpu_utilization_ratio.set(engine.gate().utilization());
    }
    state.roles.memory().measure();
    let mut text = Vec::new();
    let mut families = metrics().registry.gather();
    families.extend(prometheus::gather());
    TextEncoder::new().encode(&families, &mut text).map_err(|error| Error::internal(error.to_string()))?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}
