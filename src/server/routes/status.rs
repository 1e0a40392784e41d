//! Health, readiness, version, metrics, the API's own description.

use actix_web::HttpResponse;
use prometheus::{Encoder, TextEncoder};
use serde::Serialize;
use utoipa::ToSchema;

use super::Routes;
use crate::error::Error;
use crate::server::openapi;
use crate::server::reply::Reply;
use crate::telemetry::metrics;

pub(super) fn configure(routes: &mut Routes<'_>) {
    // The port only answers once every role is loaded, so health and readiness are the same.
    for path in ["/health", "/ready", "/ping"] {
        routes.get(path, healthy);
    }
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

async fn healthy() -> HttpResponse {
    HttpResponse::Ok().finish()
}

async fn version() -> HttpResponse {
    HttpResponse::Ok().json(Version { version: env!("CARGO_PKG_VERSION") })
}

async fn description() -> Reply {
    Ok(HttpResponse::Ok().content_type("application/yaml").body(openapi::yaml()?))
}

async fn exposition() -> Reply {
    let mut text = Vec::new();
    let mut families = metrics().registry.gather();
    families.extend(prometheus::gather());
    TextEncoder::new().encode(&families, &mut text).map_err(|error| Error::internal(error.to_string()))?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}
